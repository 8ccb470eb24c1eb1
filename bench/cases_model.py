"""Whole models: a training step, the prompt of a text and every token after it; tokens per second and memory.

M tokens a call, K = hidden size, N = inner size of the feed-forward networks, r of LoRA; `label` names the
model (models.py). There is one copy of the weights: those of Llama's blocks exceed the caches by themselves.
MiniLM's do not, nor do they where people use it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .baselines import require
from .case import OURS, Case, Family, Oracle, Prepared, Program
from .cases_nf4 import quantized_bytes
from .models import ARCHITECTURES, CLASSES, Architecture, Model, trained

CACHED_TOKENS = 512  # that a token is decoded after
TRAIN, PREFILL, DECODE = "train_step", "prefill", "decode"
_LARGER = 8  # than the error of the same model in plain PyTorch: see `_oracle`. Seen: up to 2.6


def model_case(op: str, label: str, m: int = 1, dtype: str = "float32", **options: Any) -> Case:
    """A case of M tokens on a model of `ARCHITECTURES`."""
    sizes = ARCHITECTURES[label]
    return Case(
        "model",
        op,
        m,
        sizes.hidden,
        sizes.ffn,
        r=sizes.rank,
        dtype=dtype,
        direction="both" if op == TRAIN else "forward",
        weight="nf4_double",
        label=label,
        **options,
    )


CASES = (
    # Decoding is not in the quick suite, which gates: stock is about as fast where the CPU has AVX512_BF16.
    model_case(TRAIN, "llama-3.2-1b:1-layer", 64, suites=("quick",), against=("peft",)),
    model_case(TRAIN, "minilm", 128, suites=("quick", "full")),
    model_case(TRAIN, "llama-3.2-1b:2-layers", 128),
    model_case(TRAIN, "llama-3.2-1b:2-layers", 512, "bfloat16"),
    model_case(PREFILL, "llama-3.2-1b:2-layers", 128),
    model_case(PREFILL, "llama-3.2-1b:2-layers", 512, "bfloat16"),
    model_case(DECODE, "llama-3.2-1b:4-layers"),
    model_case(DECODE, "llama-3.2-1b:4-layers", dtype="bfloat16"),
    model_case(TRAIN, "minilm", 512),
)


def _inputs(case: Case) -> dict[str, Tensor]:
    """Random tokens, as `input_ids` and as what is to be predicted (a decoder: the next token)."""
    sizes = ARCHITECTURES[case.label]
    torch.manual_seed(2)
    tokens = torch.randint(sizes.vocabulary, sizes.sequences(case.m))
    labels = tokens if sizes.causal else torch.randint(CLASSES, tokens.shape[:1])
    return {"input_ids": tokens, "labels": labels}


def _training_step(case: Case, model: Any, weights: tuple[Tensor, ...] = ()) -> Program:
    """Forward, backward and AdamW's update, at a learning rate of 0.

    AdamW does all of its work then, and every call finds the parameters that were checked.
    """
    inputs, parameters = _inputs(case), trained(model)
    on_gpu = torch.get_default_device().type == "cuda"
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, capturable=on_gpu)  # by a CUDA graph

    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        optimizer.step()
        return output.loss.detach(), output.logits.detach()

    def outputs(results: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        gradients = {f"d{name}": p.grad for name, p in parameters.items() if p.grad is not None}
        return {"loss": results[0], "logits": results[1], **gradients}

    there_anyway = (*model.parameters(), *model.buffers(), *weights)
    return Program(step, outputs, lambda: model(**inputs).loss, there_anyway)


def _generation(case: Case, model: Any, _: tuple[Tensor, ...] = ()) -> Program:
    """The logits that follow a prompt of M tokens, or follow one token behind `CACHED_TOKENS` others."""
    model.eval()
    tokens, past = _inputs(case)["input_ids"], _past(case, model.dtype)
    cache: Any = require("transformers").DynamicCache() if past else None
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)

    def next_logits() -> Tensor:
        with torch.no_grad():
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer, (keys, values) in enumerate(past):  # without the token: calls are equal
            cache.layers[layer].keys, cache.layers[layer].values = keys, values
        logits: Tensor = output.logits[:, -1]
        return logits

    return Program(next_logits, lambda logits: {"logits": logits})


def _past(case: Case, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the cached tokens, of every layer: random, with the same values in every dtype."""
    if case.op != DECODE:
        return []
    sizes = ARCHITECTURES[case.label]
    shape = (1, sizes.key_value_heads, CACHED_TOKENS, sizes.hidden // sizes.heads)
    torch.manual_seed(3)

    def drawn() -> Tensor:
        return torch.randn(shape).to(case.torch_dtype).to(dtype)

    return [(drawn(), drawn()) for _ in range(sizes.layers)]


def evaluate(case: Case, model: Any) -> dict[str, Tensor]:
    """The results of a case, all computed in the dtype of `model` (transformers has the loss in float32)."""
    if case.op != TRAIN:
        program = _generation(case, model)
        return program.outputs(program.call())
    inputs, parameters = _inputs(case), trained(model)
    logits, labels = model(input_ids=inputs["input_ids"]).logits, inputs["labels"]
    if ARCHITECTURES[case.label].causal:
        loss = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    else:
        loss = F.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, tuple(parameters.values()))
    named = {f"d{name}": gradient for name, gradient in zip(parameters, gradients, strict=True)}
    return {"loss": loss.detach(), "logits": logits.detach(), **named}


def _oracle(case: Case, model: Model) -> Oracle:
    """Logits, loss and the gradient of every adapter in float64, and the errors that are allowed.

    A bound on the rounding errors of a whole model, multiplied from layer to layer, would allow anything. So
    the error of the same model in plain PyTorch is measured: the dequantised weights in `nn.Linear`, the data
    type of the case. Ours rounds as often, at other places, so that its error is another one of that size;
    `_LARGER` times as much is allowed. Sizes are largest error / largest value, for gradients the largest of
    all: some are small differences of large numbers, and how well their errors happen to cancel says nothing.
    The loss is a mean of log softmax, which a change of the logits by at most e changes by at most 2 e.

    In float32 this finds a relative error of 1e-4 in any layer of Llama's and of 4e-4 in any of MiniLM's. In
    bfloat16, where the model itself is off by some percent, it finds an adapter that is not there.
    """
    values = {name: value.double() for name, value in evaluate(case, model.dense(torch.float64)).items()}
    plain = evaluate(case, model.dense(case.torch_dtype))
    largest = {name: float(value.abs().max()) for name, value in values.items()}
    error = {name: float((plain[name] - value).abs().max()) / largest[name] for name, value in values.items()}
    allowed = {"logits": _LARGER * error["logits"] * largest["logits"]}
    if case.op == TRAIN:
        allowed["loss"] = 2 * allowed["logits"]
        gradients = values.keys() - allowed.keys()
        relative = _LARGER * max(error[name] for name in gradients)
        allowed |= {name: relative * largest[name] for name in gradients}
    return Oracle(values, {name: torch.full_like(value, allowed[name]) for name, value in values.items()})


def flops(case: Case) -> int:
    """Of all products but those with one row a sequence: an encoder's pooler and its head of classes.

    Backward is one more product with every frozen weight, and two for each of an adapter's; but for what the
    first layer's queries, keys and values would pass on to the embedding, which is frozen.
    """
    sizes = ARCHITECTURES[case.label]
    frozen = sum(k * n for k, n in sizes.shapes)
    adapters = sizes.rank * sum(k + n for k, n in sizes.shapes)
    blocks, attention = 2 * case.m * sizes.layers * frozen, _attention_flops(case, sizes)
    low_rank = 2 * case.m * sizes.layers * adapters
    head = 2 * sizes.head * (case.m if case.op == TRAIN else 1)
    forward = blocks + low_rank + attention + head
    if case.op != TRAIN:
        return forward
    not_needed = 2 * case.m * sum(k * (n + sizes.rank) for k, n in sizes.shapes[:3])
    return forward + blocks + 2 * low_rank + 2 * attention + head - not_needed


def _attention_flops(case: Case, sizes: Architecture) -> int:
    """Of Q K^T and P V: a token attends to all before it and itself, in an encoder to its whole sequence."""
    sequences, length = sizes.sequences(case.m)
    before = CACHED_TOKENS if case.op == DECODE else 0
    pairs = length * before + length * (length + 1) // 2 if sizes.causal else length**2
    return 4 * sizes.hidden * sizes.layers * sequences * pairs


def _bytes(case: Case) -> int:
    """Read or written: weights once per pass, keys and values, and what AdamW updates in place."""
    sizes, size = ARCHITECTURES[case.label], case.element_size
    weights = sum(quantized_bytes(replace(case, k=k, n=n)) for k, n in sizes.shapes)
    adapters = 4 * sizes.rank * sum(k + n for k, n in sizes.shapes)
    one_pass = sizes.layers * (weights + adapters) + size * sizes.head
    if case.op == TRAIN:
        # AdamW reads a parameter, its gradient and two averages, and writes all but the gradient.
        return 2 * one_pass + 7 * sizes.layers * adapters
    tokens = case.m + (CACHED_TOKENS if case.op == DECODE else 0)
    return one_pass + 2 * tokens * sizes.layers * sizes.shapes[1][1] * size


def prepare(case: Case) -> Prepared:
    """Prepare any case of `model_case`; models are made when they are first needed."""
    model = functools.cache(lambda: Model(ARCHITECTURES[case.label], case.torch_dtype))
    program = _training_step if case.op == TRAIN else _generation
    oracle = functools.cache(lambda: _oracle(case, model()))
    return Prepared(
        contestants={
            OURS: lambda: [program(case, *model().ours())],
            "peft": lambda: [program(case, *model().stock())],
            "dense": lambda: [program(case, model().dense(case.torch_dtype))],
        },
        oracle=lambda _: oracle(),
        flops=flops(case),
        read_bytes=_bytes(case),
        write_bytes=0,  # nothing is taken off the peak memory of a call: gradients and caches belong to it
    )


FAMILY = Family("model", CASES, lambda _: ("peft", "peft-tuned", "dense"), prepare)
