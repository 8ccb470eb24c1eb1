"""The seven methods: how each is set up with its own library, and the learning rate it is trained at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import adapters
import peft
import torch
from torch import nn
from transformers import PreTrainedModel as Encoder

import peft_kernels as pk
from word_polarity.encoder import add_lora, load_encoder
from word_polarity.training import Trainer


@dataclass(frozen=True)
class Method:
    """A way to fine-tune the encoder; its head is new and trained in every one.

    Attributes:
        name: as in the table.
        add: makes the model from the encoder; a seed initialises what is new.
        learning_rate: the best on the validation words, as `--tune` found it (docs/methods.md).
        ratio: LoRA+'s; none for the others.
    """

    name: str
    add: Callable[[Encoder, int], nn.Module]
    learning_rate: float
    ratio: float | None = None

    def build(self, seed: int) -> nn.Module:
        """The model on the fused kernels, ready to be trained; `seed` initialises head and adapter."""
        model = self.add(load_encoder(seed), seed)
        pk.replace_layers(model)
        return model.train()

    def trainer(self, model: nn.Module, steps: int, learning_rate: float) -> Trainer:
        """The model with its optimiser."""
        if self.ratio is None:
            return Trainer(model, steps, learning_rate)
        decay = 0.01  # the default of AdamW, which the others train with
        groups = pk.optim.loraplus_param_groups(model, learning_rate, self.ratio, weight_decay=decay)
        return Trainer(model, steps, learning_rate, groups)


def frozen_probe(encoder: Encoder, _: int) -> nn.Module:
    """Nothing but the head."""
    encoder.requires_grad_(False)
    encoder.get_submodule("classifier").requires_grad_(True)
    return encoder


def add_ia3(encoder: Encoder, seed: int) -> nn.Module:
    """The paper's three vectors per block: on keys, on values, and on the input of the block's last layer."""
    torch.manual_seed(seed)
    feedforward = r".*layer\.\d+\.output\.dense"
    config = peft.IA3Config(
        task_type=peft.TaskType.SEQ_CLS,
        target_modules=rf".*\.(key|value)|{feedforward}",
        feedforward_modules=feedforward,
    )
    model: nn.Module = peft.get_peft_model(encoder, config)
    return model


def add_rslora(encoder: Encoder, seed: int) -> nn.Module:
    """LoRA with the update scaled by alpha / sqrt(r)."""
    model: nn.Module = add_lora(encoder, seed, use_rslora=True)
    return model


def add_dora(encoder: Encoder, seed: int) -> nn.Module:
    """LoRA with a magnitude per output."""
    model: nn.Module = add_lora(encoder, seed, use_dora=True)
    return model


def add_bottleneck(encoder: Encoder, seed: int) -> nn.Module:
    """Houlsby's two small networks per block, after attention and after feed-forward, d / 16 wide."""
    torch.manual_seed(seed)
    adapters.init(encoder)
    model: Any = encoder  # which now has the methods of adapters, by the same names as those of transformers
    model.add_adapter("words", config=adapters.DoubleSeqBnConfig(reduction_factor=16))
    model.train_adapter("words")
    return encoder


PROBE = Method("frozen probe", frozen_probe, 1e-1)
METHODS = (
    PROBE,
    Method("IA3", add_ia3, 3e-2),
    Method("LoRA", add_lora, 1e-3),
    Method("rsLoRA", add_rslora, 1e-3),
    Method("LoRA+", add_lora, 3e-4, ratio=16.0),
    Method("DoRA", add_dora, 1e-3),
    Method("bottleneck", add_bottleneck, 3e-3),
)
