"""torch.func transforms and forward-mode differentiation are refused, not ignored, compiled or not."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch.autograd import forward_ad

import peft_kernels as pk

Function = Callable[[torch.Tensor], torch.Tensor]


def linear(x: torch.Tensor) -> torch.Tensor:
    return pk.functional.adapted_linear(x, torch.ones(8, 64))


def dropout(x: torch.Tensor) -> torch.Tensor:
    return pk.functional.philox_dropout(x, 0.5, 1)


def jvp(function: Function, x: torch.Tensor) -> Any:
    return torch.func.jvp(function, (x,), (x,))


def grad(function: Function, x: torch.Tensor) -> Any:
    return torch.func.grad(lambda x: function(x).sum())(x)


def vmap(function: Function, x: torch.Tensor) -> Any:
    return torch.vmap(function)(x)


def dual(function: Function, x: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


def refusal(function: Function, transform: Any) -> str:
    name, remedy = {
        linear: ("adapted_linear", "torch.nn.functional.linear on w.dequantize()"),
        dropout: ("philox_dropout", "x * philox_dropout_mask(x.shape, p, seed) / (1 - p)"),
    }[function]
    reason = "under forward-mode differentiation" if transform is dual else "inside a torch.func transform"
    return f"^{re.escape(name)} is not available {reason}: .*, or use {re.escape(remedy)}$"


EACH_FUNCTION = pytest.mark.parametrize("function", [linear, dropout])
EACH_TRANSFORM = pytest.mark.parametrize("transform", [jvp, grad, vmap, dual])


@EACH_FUNCTION
@EACH_TRANSFORM
def test_refused(backend: str, function: Function, transform: Any) -> None:
    with pytest.raises(NotImplementedError, match=refusal(function, transform)):
        transform(function, torch.randn(3, 64))


@EACH_FUNCTION
@EACH_TRANSFORM
def test_refused_by_a_compiled_transform(fresh_compiler: None, function: Function, transform: Any) -> None:
    compiled = torch.compile(transform, backend="aot_eager")  # breaks the graph, and so gets to the message
    with pytest.raises(NotImplementedError, match=refusal(function, transform)):
        compiled(function, torch.randn(3, 64))
    torch.compiler.reset()
    with pytest.raises(Unsupported, match="NotImplementedError"):
        torch.compile(transform, backend="aot_eager", fullgraph=True)(function, torch.randn(3, 64))


@EACH_FUNCTION
def test_a_compiled_function_is_not_reused_under_forward_mode(
    fresh_compiler: None, function: Function
) -> None:
    compiled, x = torch.compile(function, backend="aot_eager"), torch.randn(3, 64)
    assert torch.equal(compiled(x), function(x))
    with pytest.raises(NotImplementedError, match=refusal(function, dual)):
        dual(compiled, x)


def test_the_mask_is_the_remedy_for_dropout() -> None:
    x = torch.randn(3, 64)
    mask = pk.functional.philox_dropout_mask
    _, tangent = jvp(lambda x: x * mask(x.shape, 0.5, 1) / 0.5, x)
    assert torch.equal(tangent, dropout(x))


@EACH_FUNCTION
def test_afterwards_all_is_well(function: Function) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    with pytest.raises(NotImplementedError):
        jvp(function, x)
    assert torch.autograd.grad(function(x).sum(), x)[0].any()
