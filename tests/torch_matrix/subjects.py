"""What every feature of torch is tried on: functional calls, modules, and models after replace_layers.

Each subject is a module in training mode that maps x [rows, 64] to a tensor; no part of it is without effect.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import peft_kernels as pk
from surgery.adapters_models import adapters, make_model
from surgery.peft_models import linear4bit, make_mlp, philox

FEATURES, OUT, RANK = 64, 32, 4
DROPOUT = 0.25


class Call(nn.Module):
    """A functional call, its tensors as parameters."""

    def __init__(self, function: Callable[..., torch.Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.shapes = function, tuple(shapes)
        for name, shape in shapes.items():
            mean = 1.0 if len(shape) == 1 else 0.0  # scales, magnitudes and biases
            self.register_parameter(name, nn.Parameter(mean + 0.2 * torch.randn(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *(getattr(self, name) for name in self.shapes))


LORA = {"a": (RANK, FEATURES), "b": (OUT, RANK)}
BOTTLENECK = {"down": (RANK, FEATURES), "down_bias": (RANK,), "up": (FEATURES, RANK), "up_bias": (FEATURES,)}


def functions() -> dict[str, Callable[[], nn.Module]]:
    """One call per function of pk.functional that computes a layer."""
    f = pk.functional
    dense = 0.1 * torch.randn(OUT, FEATURES)
    nf4, double = (f.nf4_quantize(dense, double_quant=double) for double in (False, True))
    return {
        "nf4_linear": lambda: Call(lambda x, bias: f.nf4_linear(x, double, bias), bias=(OUT,)),
        "lora_linear": lambda: Call(
            lambda x, a, b: f.lora_linear(x, dense, a, b, 1.5, dropout_p=DROPOUT), **LORA
        ),
        "nf4_lora_linear": lambda: Call(
            lambda x, a, b: f.nf4_lora_linear(x, nf4, a, b, 1.5, dropout_p=DROPOUT), **LORA
        ),
        "dora_linear": lambda: Call(
            lambda x, a, b, m: f.dora_linear(x, double, a, b, m, 1.5), **LORA, magnitude=(OUT,)
        ),
        "ia3_linear": lambda: Call(lambda x, vector: f.ia3_linear(x, nf4, vector), vector=(OUT,)),
        "bottleneck_adapter": lambda: Call(
            lambda h, *w: f.bottleneck_adapter(h, *w, activation="gelu", residual=h, dropout_p=DROPOUT),
            **BOTTLENECK,
        ),
        "philox_dropout": lambda: Call(
            lambda x, scale: f.philox_dropout(x * scale, DROPOUT), scale=(FEATURES,)
        ),
    }


def modules() -> dict[str, Callable[[], nn.Module]]:
    """Every module of pk.nn."""
    m = pk.nn
    return {
        "NF4Linear": lambda: m.NF4Linear(FEATURES, OUT, double_quant=True),
        "LoRALinear": lambda: filled(m.LoRALinear(FEATURES, OUT, r=RANK, lora_dropout=DROPOUT)),
        "LoRALinear over NF4": lambda: filled(
            m.LoRALinear.from_linear(m.NF4Linear(FEATURES, OUT, double_quant=True), r=RANK)
        ),
        "DoRALinear": lambda: filled(m.DoRALinear(FEATURES, OUT, r=RANK)),
        "DoRALinear over NF4": lambda: filled(m.DoRALinear.from_linear(m.NF4Linear(FEATURES, OUT), r=RANK)),
        "IA3Linear over NF4": lambda: filled(m.IA3Linear.from_linear(m.NF4Linear(FEATURES, OUT))),
        "BottleneckAdapter": lambda: m.BottleneckAdapter.houlsby(FEATURES, dropout=DROPOUT),
        "PhiloxDropout": lambda: m.PhiloxDropout(DROPOUT),
    }


def models() -> dict[str, Callable[[], nn.Module]]:
    """Stock models, to be given to replace_layers; PEFT's without the wrappers, which take *args."""

    def inner(model: PeftModel) -> nn.Module:
        return model.base_model.model

    return {
        "LoRA": lambda: inner(make_mlp("dense", lora_dropout=DROPOUT)),
        "LoRA over NF4": lambda: inner(make_mlp("nf4_double", lora_dropout=DROPOUT)),
        "DoRA": lambda: inner(make_mlp("dense", use_dora=True)),
        "DoRA over NF4": lambda: inner(make_mlp("nf4_double", use_dora=True)),
        "IA3": lambda: inner(make_mlp("ia3 dense")),
        "IA3 over NF4": lambda: inner(make_mlp("ia3 nf4")),
        "Linear4bit": lambda: nn.Sequential(linear4bit(nn.Linear(FEATURES, OUT))),
        "bottleneck adapter": Bottleneck,
    }


class Bottleneck(nn.Module):
    """A sequential adapter of the adapters library behind a linear layer that makes its 32 features."""

    def __init__(self) -> None:
        super().__init__()
        bert = make_model(adapters.SeqBnConfig(reduction_factor=4, non_linearity="gelu", dropout=DROPOUT))
        self.linear = nn.Linear(FEATURES, 32)
        self.adapter = bert.encoder.layer[0].output.adapters["a0"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        output: torch.Tensor = self.adapter(h, h)[0]
        return output


def fused_models() -> dict[str, Callable[[], nn.Module]]:
    """`models` after replace_layers."""
    return {name: lambda name=name: stock_and_fused(name)[1] for name in models()}


def stock_and_fused(name: str) -> tuple[nn.Module, nn.Module]:
    """A stock model, and a copy of it after replace_layers, with the same dropout masks."""
    torch.manual_seed(0)
    stock = models()[name]()
    fused = copy.deepcopy(stock)
    pk.replace_layers(fused, strict=True)
    philox(stock)
    return stock, fused


def filled(module: nn.Module) -> nn.Module:
    """With an adapter that does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


def without_dropout(model: nn.Module) -> nn.Module:
    """For what one seed cannot repeat: processes have masks of their own, and another model draws others."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "lora_dropout") and isinstance(module.lora_dropout, float):
            module.lora_dropout = 0.0
    return model


LEVELS: dict[str, Callable[[], dict[str, Callable[[], nn.Module]]]] = {
    "functions": functions,
    "modules": modules,
    "models": fused_models,
}
SUBJECTS = [(level, name) for level, make in LEVELS.items() for name in make()]
EACH_SUBJECT = pytest.mark.parametrize(("level", "name"), SUBJECTS, ids=[": ".join(s) for s in SUBJECTS])


def make(level: str, name: str) -> nn.Module:
    """One subject."""
    torch.manual_seed(0)
    return LEVELS[level]()[name]()


def inputs(rows: int = 5, seed: int = 7) -> torch.Tensor:
    """x [rows, 64]."""
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed))


def run(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> torch.Tensor:
    """The output; dropout's seed is drawn afresh."""
    torch.manual_seed(3)
    y: torch.Tensor = call(x)
    return y


def outcome(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> torch.Tensor | str:
    """What a call returns, or its error: bitsandbytes cannot do all that torch can."""
    try:
        return run(call, x)
    except RuntimeError as error:
        return str(error)


def results(
    call: Callable[[Any], torch.Tensor], module: nn.Module, x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Output, and gradient of x and of every parameter that is trained; dropout's seed is drawn afresh."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = run(call, x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype))
    assert x.grad is not None
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}
