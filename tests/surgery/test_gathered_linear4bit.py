"""A Linear4bit under FSDP2, which gathers its shards into a plain parameter and frees them again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_models import make_linear4bit
from torch import nn

from peft_kernels.surgery import Row, explain, replace_layers


@pytest.mark.parametrize("base", ["nf4", "nf4_double"])
def test_a_quant_state_that_only_the_layer_has(base: str) -> None:
    """FSDP2 gathers shards into a plain parameter: bitsandbytes, too, then takes the layer's quant_state."""
    layer = make_linear4bit(base, quant_storage=torch.float32)
    replace_layers(layer, strict=True)
    x = torch.randn(3, 128)
    expected = layer(x)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(torch.Tensor).clone(), requires_grad=False)
    assert type(layer.weight) is nn.Parameter
    assert not hasattr(layer.weight, "quant_state")
    assert torch.equal(layer(x), expected)
    assert explain(layer).rows[0] == Row("", "bitsandbytes.Linear4bit", True, "")
    assert type(layer.weight) is nn.Parameter, "the stock forward ran, which puts a Params4bit in its place"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda layer: layer.bfloat16(),  # as FSDP's mixed precision casts all that is a float
            "its bytes were cast from torch.float32 to torch.bfloat16",
        ),
        (
            lambda layer: setattr(layer.quant_state, "packing_format_for_cpu", True),
            "bitsandbytes has rearranged its bytes for the CPU",
        ),
    ],
)
def test_gathered_bytes_that_are_not_as_the_state_says(change: Callable[[Any], Any], reason: str) -> None:
    layer = make_linear4bit(quant_storage=torch.float32)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(torch.Tensor), requires_grad=False)
    change(layer)
    assert replace_layers(layer).rows[0].reason == reason


def test_memory_of_a_gathered_weight_that_was_freed() -> None:
    """FSDP2 frees the bytes of a gathered weight in place: a cached view of them must not be read again."""
    layer = make_linear4bit(quant_storage=torch.float32)
    replace_layers(layer, strict=True)
    layer(torch.randn(3, 128))
    kept, bytes_ = layer.__dict__["_nf4_cache"], layer.weight.data.as_subclass(torch.Tensor)
    layer.weight = nn.Parameter(bytes_.clone(), requires_grad=False)
    assert kept.is_of(bytes_, layer.quant_state)
    bytes_.untyped_storage().resize_(0)
    assert not kept.is_of(layer.weight, layer.quant_state)
    assert kept.weight.packed.data_ptr() == 0, "what tells is_of of it"
