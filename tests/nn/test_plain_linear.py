"""What `from_linear` and `from_bitsandbytes` refuse: layers of which a part would be lost silently."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from peft_kernels.nn import LoRALinear, NF4Linear


class Doubling(nn.Linear):
    """A user's class that does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class DoublingNF4(NF4Linear):
    """Likewise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A user's class that computes what `nn.Linear` does."""


def linear4bit() -> Any:
    return bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")


def peft_layer(base: nn.Module) -> Any:
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)
    return get_peft_model(model, LoraConfig(target_modules=["0"])).base_model.model[0]


def hooked(linear: nn.Module) -> nn.Module:
    linear.register_forward_hook(lambda *args: args[2] * 2)
    return linear


def pre_hooked(linear: nn.Module) -> nn.Module:
    linear.register_forward_pre_hook(lambda _, x: (x[0] * 2,))
    return linear


def patched(linear: nn.Module) -> nn.Module:
    linear.forward = MethodType(lambda self, x: x, linear)
    return linear


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "PEFT": (
        lambda: peft_layer(nn.Linear(64, 32)),
        r"got a peft\.tuners.*Linear; merge or unload an adapter",
    ),
    "PEFT 4-bit": (lambda: peft_layer(linear4bit()), r"got a peft\.tuners.*Linear4bit; merge or unload"),
    "own forward": (lambda: Doubling(64, 32), "got a .*Doubling; "),
    "Conv1D": (lambda: Conv1D(32, 64), "got a .*Conv1D; "),
    "LoRALinear": (lambda: LoRALinear(64, 32), "got a .*LoRALinear; merge or unload"),
    "weight": (lambda: nn.Linear(64, 32).weight, "got a .*Parameter; pass the layer, not its weight"),
    "8 bits": (lambda: bnb.nn.Linear8bitLt(64, 32), "got a .*Linear8bitLt; "),
    "hook": (lambda: hooked(nn.Linear(64, 32)), "Linear, and it has hooks, which would be lost"),
    "pre-hook": (lambda: pre_hooked(nn.Linear(64, 32)), "Linear, and it has hooks"),
    "parametrized": (lambda: weight_norm(nn.Linear(64, 32)), "Linear, and its parameters are computed"),
    "patched": (lambda: patched(nn.Linear(64, 32)), "Linear, and it has a forward of its own"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("layer_class", [LoRALinear, NF4Linear])
def test_from_linear_refuses(layer_class: Any, odd: str) -> None:
    make, message = ODD[odd]
    with pytest.raises(TypeError, match=f"linear must be a plain nn.Linear.*{message}"):
        layer_class.from_linear(make())


def test_quantised_layers() -> None:
    """Each to the function that takes it, and not with a part of its own."""
    with pytest.raises(TypeError, match=r"Linear4bit; use NF4Linear\.from_bitsandbytes"):
        NF4Linear.from_linear(linear4bit())
    with pytest.raises(TypeError, match=r"got a .*NF4Linear"):
        NF4Linear.from_linear(NF4Linear(64, 32))
    with pytest.raises(TypeError, match="pass the layer, not its weight"):
        NF4Linear.from_bitsandbytes(linear4bit().weight)
    with pytest.raises(TypeError, match=r"must be a bitsandbytes Linear4bit.* use NF4Linear\.from_linear"):
        NF4Linear.from_bitsandbytes(nn.Linear(64, 32))
    with pytest.raises(TypeError, match="merge or unload an adapter"):
        NF4Linear.from_bitsandbytes(peft_layer(linear4bit()))
    for odd in (hooked(linear4bit()), patched(linear4bit())):
        with pytest.raises(TypeError, match="which would be lost"):
            NF4Linear.from_bitsandbytes(odd)
    for odd in (hooked(linear4bit()), hooked(NF4Linear(64, 32)), DoublingNF4(64, 32)):
        with pytest.raises(TypeError, match=r"linear must be a plain nn\.Linear, an NF4Linear or"):
            LoRALinear.from_linear(odd)


@pytest.mark.parametrize("make", [nn.Linear, Renamed])
def test_plain_layers_are_taken(make: Any) -> None:
    linear = make(64, 32)
    assert LoRALinear.from_linear(linear).base_layer is linear
    assert NF4Linear.from_linear(linear).bias is linear.bias
