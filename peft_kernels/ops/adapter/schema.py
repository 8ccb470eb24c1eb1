"""Contract of the bottleneck adapter: schemas, argument checks (of the eager and the fake path), fakes."""

from typing import Any, NamedTuple

import torch

from peft_kernels.core.backend import define_op, fake_kernel
from peft_kernels.core.checks import (
    check_device,
    check_dtype,
    check_finite,
    check_probability,
    check_shape,
    check_tensor,
)
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES, check_seed

# What the kernels compute, in the order of Activation in csrc/cpu/api.h.
ACTIVATIONS = ("identity", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh")
LEAKY_SLOPE = 0.01

_OPERANDS = (
    "Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, int activation, "
    "float scaling, Tensor? scale, Tensor? gate, float dropout_p, Tensor? seed"
)

define_op(
    "bottleneck_adapter",
    f"(Tensor hidden, Tensor? residual, {_OPERANDS}, bool need_down, bool need_up) "
    "-> (Tensor out, Tensor down, Tensor up)",
    triton="peft_kernels.ops.adapter.triton",
)
define_op(
    "bottleneck_adapter_backward",
    f"(Tensor grad, Tensor? grad_down, Tensor hidden, {_OPERANDS}, bool residual_is_hidden, "
    "bool need_hidden, bool need_down_weight, bool need_down_bias, bool need_up_weight, bool need_up_bias, "
    "bool need_scale, bool need_gate) -> (Tensor dhidden, Tensor ddown_weight, Tensor ddown_bias, "
    "Tensor dup_weight, Tensor dup_bias, Tensor dscale, Tensor dgate)",
    triton="peft_kernels.ops.adapter.triton",
)


class Operands(NamedTuple):
    """What both ops take besides hidden [M, d]; floats are float32 or have the dtype of hidden."""

    down_weight: torch.Tensor  # [r, d]
    down_bias: torch.Tensor | None  # [r]
    up_weight: torch.Tensor  # [N, r]
    up_bias: torch.Tensor | None  # [N]
    activation: int  # index in ACTIVATIONS
    scaling: float  # 1 where scale is given
    scale: torch.Tensor | None  # [N] or [1]
    gate: torch.Tensor | None  # [M]
    dropout_p: float
    seed: torch.Tensor | None  # int64 0-dim


class BackwardArgs(NamedTuple):
    """Arguments of `bottleneck_adapter_backward` in the order of its schema."""

    grad: torch.Tensor  # [M, N], dtype of hidden, or float32 where the residual is
    grad_down: torch.Tensor | None  # [M, r], dtype of hidden
    hidden: torch.Tensor  # [M, d]
    down_weight: torch.Tensor
    down_bias: torch.Tensor | None
    up_weight: torch.Tensor
    up_bias: torch.Tensor | None
    activation: int
    scaling: float
    scale: torch.Tensor | None
    gate: torch.Tensor | None
    dropout_p: float
    seed: torch.Tensor | None
    residual_is_hidden: bool  # dhidden then has the residual's gradient, grad, in it
    need_hidden: bool
    need_down_weight: bool
    need_down_bias: bool
    need_up_weight: bool
    need_up_bias: bool
    need_scale: bool
    need_gate: bool

    @property
    def operands(self) -> Operands:
        """What the forward op was called with."""
        return Operands(*self[3:13])


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` are summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def check_bottleneck_adapter(hidden: torch.Tensor, residual: torch.Tensor | None, a: Operands) -> None:
    """Argument contract of `bottleneck_adapter`."""
    check_dtype("hidden", hidden, FLOAT_DTYPES)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [M, d], got {list(hidden.shape)}; flatten the leading dimensions")
    m, d = hidden.shape
    remedy = "pass the adapter made for this layer"
    _check_float("down_weight", a.down_weight, "[r, d]", (None, d), hidden, remedy)
    r = a.down_weight.shape[0]
    _check_float("up_weight", a.up_weight, "[N, r]", (None, r), hidden, remedy)
    n = a.up_weight.shape[0]
    if d < 1 or r < 1 or n < 1:
        raise ValueError(
            f"down_weight [r, d] and up_weight [N, r] must have elements, got [{r}, {d}] and [{n}, {r}]"
        )
    _check_float("down_bias", a.down_bias, "[r]", (r,), hidden, remedy)
    _check_float("up_bias", a.up_bias, "[N]", (n,), hidden, remedy)
    check_finite("scaling", a.scaling)
    if a.scale is not None and a.scale.shape != (1,):
        _check_float("scale", a.scale, "[N]", (n,), hidden, "or pass one element")
    else:
        _check_float("scale", a.scale, "[1]", (1,), hidden)
    _check_float("gate", a.gate, "[M]", (m,), hidden)
    _check_float("residual", residual, "[M, N]", (m, n), hidden)
    if not 0 <= a.activation < len(ACTIVATIONS):
        raise ValueError(f"activation must be from 0 to {len(ACTIVATIONS) - 1}, got {a.activation}")
    check_probability("dropout_p", a.dropout_p)
    if a.seed is not None:
        check_seed(a.seed, "hidden", hidden)
    elif a.dropout_p > 0.0:
        raise ValueError("seed must be given when dropout_p > 0, got None; pass an int64 0-dim tensor")


def check_bottleneck_adapter_backward(args: BackwardArgs) -> None:
    """Argument contract of `bottleneck_adapter_backward`."""
    a, hidden = args.operands, args.hidden
    check_bottleneck_adapter(hidden, None, a)
    m, (n, r) = hidden.shape[0], a.up_weight.shape
    _check_float("grad", args.grad, "[M, N]", (m, n), hidden)
    if args.grad_down is not None:
        _check_float("grad_down", args.grad_down, "[M, r]", (m, r), hidden)
        check_dtype("grad_down", args.grad_down, (hidden.dtype,))
    if args.residual_is_hidden and n != hidden.shape[1]:
        raise ValueError(f"residual_is_hidden must be False where N = {n} is not d = {hidden.shape[1]}")
    for name in ("down_bias", "up_bias", "scale", "gate"):
        if getattr(args, f"need_{name}") and getattr(args, name) is None:
            raise ValueError(f"{name} must be given when need_{name} is True, got None")


def _check_float(
    name: str,
    tensor: torch.Tensor | None,
    letters: str,
    shape: tuple[int | None, ...],
    hidden: torch.Tensor,
    remedy: str = "",
) -> None:
    if tensor is not None:
        check_tensor(name, tensor)
        check_shape(name, tensor, letters, shape, remedy)
        check_dtype(name, tensor, (hidden.dtype, accumulate_dtype(hidden.dtype)), "convert it or hidden")
        check_device(name, tensor, "hidden", hidden)


@fake_kernel("bottleneck_adapter")
def _(hidden: torch.Tensor, residual: torch.Tensor | None, *rest: Any) -> tuple[torch.Tensor, ...]:
    a, need_down, need_up = Operands(*rest[:-2]), rest[-2], rest[-1]
    check_bottleneck_adapter(hidden, residual, a)
    m, (n, r) = hidden.shape[0], a.up_weight.shape
    return (
        hidden.new_empty([m, n], dtype=hidden.dtype if residual is None else residual.dtype),
        hidden.new_empty([m, r] if need_down else [0]),
        hidden.new_empty([m, n] if need_up else [0]),
    )


@fake_kernel("bottleneck_adapter_backward")
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    a = BackwardArgs(*args)
    check_bottleneck_adapter_backward(a)
    return tuple(
        (a.hidden if of is None else of).new_empty(of.shape if needed and of is not None else [0])
        for of, needed in differentiated(a)
    )


def differentiated(a: BackwardArgs) -> tuple[tuple[torch.Tensor | None, bool], ...]:
    """Each tensor that may have a gradient, and whether it is wanted, in the order of the op's outputs."""
    return (
        (a.hidden, a.need_hidden),
        (a.down_weight, a.need_down_weight),
        (a.down_bias, a.need_down_bias),
        (a.up_weight, a.need_up_weight),
        (a.up_bias, a.need_up_bias),
        (a.scale, a.need_scale),
        (a.gate, a.need_gate),
    )
