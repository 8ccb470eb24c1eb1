"""Which layers have a handler, and what the report says about the others."""

import copy

import bitsandbytes as bnb
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from peft_models import assert_close, layer, linear4bit, make_mlp, pair, quantise
from torch import nn

from peft_kernels.surgery import explain, replace_layers


class Doubling(bnb.nn.Linear4bit):
    """A user's class that does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_layers_that_nothing_handles_are_listed() -> None:
    model = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model = get_peft_model(model, LoraConfig(target_modules=["0", "1"], r=2))
    model.base_model.model[2] = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    rows = replace_layers(model).rows
    assert [(row.layer, row.fused) for row in rows] == [
        ("lora.Embedding", False),
        ("lora.Linear", True),
        ("bitsandbytes.Linear8bitLt", False),
    ]
    assert rows[0].reason == "no fused kernel for this type of layer"
    assert rows[2].reason == "its weight is in 8 bits; fused are NF4 and dense ones"


def test_other_peft_methods_over_4_bits_get_the_fused_base() -> None:
    model = nn.Sequential(nn.Linear(64, 128))
    quantise(model, "nf4")
    model = get_peft_model(model, VeraConfig(target_modules=["0"], r=2))
    stock, fused = pair(model)
    assert [(row.layer, row.fused) for row in replace_layers(fused)] == [
        ("vera.Linear", False),
        ("bitsandbytes.Linear4bit", True),
    ]
    x = torch.randn(3, 64)
    assert_close(fused(x), stock(x))


def test_subclasses_of_a_handled_layer() -> None:
    """One that only adds methods is fused as itself; one with its own forward keeps it."""

    class Renamed(bnb.nn.Linear4bit):
        pass

    renamed, doubling = linear4bit(nn.Linear(64, 64)), linear4bit(nn.Linear(64, 64))
    renamed.__class__, doubling.__class__ = Renamed, Doubling
    x = torch.randn(3, 64)
    expected = doubling(x)
    rows = replace_layers(nn.ModuleList([renamed, doubling])).rows
    assert [row.fused for row in rows] == [True, False]
    assert rows[1].reason == "its class overrides Linear4bit.forward"
    assert isinstance(renamed, Renamed)
    assert type(renamed) is not Renamed
    assert type(renamed).__qualname__ == Renamed.__qualname__
    assert type(doubling) is Doubling
    assert torch.equal(doubling(x), expected)


def test_4bit_base_with_its_own_forward_is_called() -> None:
    stock, fused = pair(make_mlp("nf4"))
    for model in (stock, fused):
        layer(model).base_layer.__class__ = Doubling
    row = replace_layers(fused).rows[0]
    assert (row.fused, row.reason) == (False, "base layer: its class overrides Linear4bit.forward")
    x = torch.randn(3, 64)
    assert torch.equal(layer(fused)(x), layer(stock)(x))


def test_nothing_is_recorded_by_looking() -> None:
    """`explain` on a stock model leaves no trace in it."""
    model = make_mlp("nf4")
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    rows = explain(copy.deepcopy(model)).rows
    assert explain(model).rows == rows
    assert {row.reason for row in rows} == {"a stock layer; replace_layers fuses it"}
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == {
        name: set(kept) for name, kept in attributes.items()
    }
