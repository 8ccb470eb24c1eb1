"""accelerate's hooks, which wrap a layer's forward on the instance, before fusing and after."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft_models import assert_close, layer, make_mlp, pair
from torch import nn

from peft_kernels.surgery import explain, replace_layers, restore_layers

X = torch.linspace(-1, 1, 192).reshape(3, 64)


class Doubling(ModelHook):
    """Shows that it ran."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return 2 * output


@pytest.mark.parametrize("removed_first", [False, True])
@pytest.mark.parametrize("part", ["layer", "base layer"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_hooks_after_fusing(base: str, part: str, removed_first: bool) -> None:
    """They wrap the fused forward, and the stock one once restored."""
    stock, fused = (layer(m) for m in pair(make_mlp(base)))
    replace_layers(fused, strict=True)
    for model in (stock, fused):
        add_hook_to_module(model if part == "layer" else model.base_layer, Doubling())
    assert_close(fused(X), stock(X))
    row = explain(fused).rows[0]
    if part == "layer":
        assert (row.fused, row.reason) == (True, "")
    else:  # which only runs its hook when called
        reason = "base layer: it has a forward of its own, set on the instance"
        assert (row.fused, row.reason) == (False, reason)
    if removed_first:
        for model in (stock, fused):
            remove_hook_from_module(model, recurse=True)
        assert explain(fused).rows[0].fused == (part == "layer")
        assert_close(fused(X), stock(X))
    restore_layers(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    assert torch.equal(fused(X), stock(X))
    for model in (stock, fused):
        remove_hook_from_module(model, recurse=True)
    assert torch.equal(fused(X), stock(X))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_hooks_before_fusing(base: str) -> None:
    """They wrap the stock forward, which goes on running."""
    stock, fused = (layer(m) for m in pair(make_mlp(base)))
    for model in (stock, fused):
        add_hook_to_module(model, Doubling())
    row = replace_layers(fused).rows[0]
    assert (row.fused, row.reason) == (False, "it has a forward of its own, set on the instance")
    assert_close(fused(X), stock(X))
    restore_layers(fused)
    assert torch.equal(fused(X), stock(X))
    for model in (stock, fused):
        remove_hook_from_module(model)
    assert torch.equal(fused(X), stock(X))
