"""Under torch.func and forward-mode differentiation, which the kernels have no formula for, stock runs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_models import layer, linear4bit, make_mlp, pair
from torch import nn
from torch.autograd import forward_ad

from peft_kernels.surgery import explain, replace_layers

X, TANGENT = torch.linspace(-1, 1, 192).reshape(3, 64), torch.linspace(1, 2, 192).reshape(3, 64)


def dual(call: Any) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(X, TANGENT))).tangent


TRANSFORMS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "jvp": (lambda call: torch.func.jvp(call, (X,), (TANGENT,))[1], "inside a torch.func transform"),
    "grad": (
        lambda call: torch.func.grad(lambda x: call(x).square().sum())(X),
        "inside a torch.func transform",
    ),
    "vmap": (lambda call: torch.func.vmap(call)(X[:, None]), "inside a torch.func transform"),
    "dual": (dual, "under forward-mode differentiation"),
}


def outcome(transform: Callable[[Any], Any], call: Any) -> torch.Tensor | str:
    try:
        result: torch.Tensor = transform(call)
    except RuntimeError as error:
        return str(error)
    return result.detach()


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("base", ["dense", "nf4", "bare nf4"])
def test_transforms(base: str, name: str) -> None:
    """The stock result, bit for bit, or the stock error: bitsandbytes cannot do all of it."""
    if base == "bare nf4":
        stock = linear4bit(nn.Linear(64, 128))
        fused = copy.deepcopy(stock)
    else:
        stock, fused = (layer(m) for m in pair(make_mlp(base)))
    replace_layers(fused, strict=True)
    transform, reason = TRANSFORMS[name]
    expected, got = outcome(transform, stock), outcome(transform, fused)
    assert type(expected) is type(got)
    assert expected == got if isinstance(expected, str) else torch.equal(expected, got)
    assert isinstance(got, torch.Tensor) or base != "dense"
    assert explain(fused).rows[0].reason.endswith(reason)
    fused(X)
    assert explain(fused).rows[0].reason == ""
