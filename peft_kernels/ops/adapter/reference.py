"""Meaning of the bottleneck adapter in plain PyTorch: specification and fallback in one."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from peft_kernels.core.backend import reference_kernel
from peft_kernels.ops.adapter.schema import (
    ACTIVATIONS,
    LEAKY_SLOPE,
    BackwardArgs,
    Operands,
    accumulate_dtype,
    check_bottleneck_adapter,
    check_bottleneck_adapter_backward,
    differentiated,
)
from peft_kernels.ops.dropout.reference import dropped

Activation = Callable[[torch.Tensor], torch.Tensor]

_VALUES: dict[str, Activation] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, LEAKY_SLOPE),
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def activate(activation: int, z: torch.Tensor) -> torch.Tensor:
    """f(z)."""
    return _VALUES[ACTIVATIONS[activation]](z)


def slope(activation: int, z: torch.Tensor) -> torch.Tensor:
    """f'(z); at the kink of relu and leaky_relu the slope to the left, as torch has it."""
    name = ACTIVATIONS[activation]
    if name == "identity":
        return torch.ones_like(z)
    if name == "relu":
        return torch.where(z <= 0, 0.0, 1.0).to(z.dtype)  # 1 for NaN
    if name == "leaky_relu":
        return torch.where(z > 0, 1.0, LEAKY_SLOPE).to(z.dtype)
    if name == "tanh":
        return 1 - torch.tanh(z).square()
    if name == "silu":
        return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))
    if name == "gelu":
        cdf: torch.Tensor = torch.special.ndtr(z)
        return cdf + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    c, square = 2 * math.sqrt(2 / math.pi), z * z  # gelu_tanh(z) = z sigmoid(c u)
    u, du = z * (1 + 0.044715 * square), 1 + 3 * 0.044715 * square
    return torch.sigmoid(c * u) * (1 + z * c * du * torch.sigmoid(-c * u))


@reference_kernel("bottleneck_adapter")
def bottleneck_adapter(
    hidden: torch.Tensor, residual: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out = D(up) * gate + residual, up = scale * (down W_u^T + b_u), down = f(hidden W_d^T + b_d), in fp32.

    Args:
        hidden: [M, d].
        residual: [M, N] or None.
        *rest: `Operands`, then need_down and need_up (bool).

    Returns:
        out [M, N] rounded once, to the dtype of the residual or, without one, of hidden; down [M, r] and
        up [M, N] rounded to the dtype of hidden, or [0].
    """
    a, need_down, need_up = Operands(*rest[:-2]), rest[-2], rest[-1]
    check_bottleneck_adapter(hidden, residual, a)
    down = activate(a.activation, _preactivation(hidden, a))
    up = _up(down, a) * (a.scaling if a.scale is None else a.scale)
    out = _drop(up, a)
    if a.gate is not None:
        out = out * a.gate[:, None]
    if residual is not None:
        out = out + residual
    empty = hidden.new_empty(0)
    # copy: .to() returns its argument when there is nothing to convert, and outputs must not share memory.
    return (
        out.to(hidden.dtype if residual is None else residual.dtype, copy=True),
        down.to(hidden.dtype, copy=True) if need_down else empty,
        up.to(hidden.dtype, copy=True) if need_up else hidden.new_empty(0),
    )


@reference_kernel("bottleneck_adapter_backward")
def bottleneck_adapter_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    """Gradients of `bottleneck_adapter` in fp32 (fp64 for fp64), each rounded once; formulas: README.md.

    Args:
        *args: `BackwardArgs`.

    Returns:
        Gradients of hidden, down_weight, down_bias, up_weight, up_bias, scale and gate in their shapes and
        dtypes; [0] for those not needed.
    """
    args_ = BackwardArgs(*args)
    check_bottleneck_adapter_backward(args_)
    a, hidden, dtype = args_.operands, args_.hidden, accumulate_dtype(args_.hidden.dtype)
    z = _preactivation(hidden, a)
    down = activate(a.activation, z)
    dgated = _drop(args_.grad.to(dtype), a)  # [M, N], of D(up) * gate but for the gate
    dup = dgated if a.gate is None else dgated * a.gate[:, None].to(dtype)
    scale = a.scaling if a.scale is None else a.scale.to(dtype)
    ddown = (dup * scale) @ a.up_weight.to(dtype)  # [M, r]
    if args_.grad_down is not None:
        ddown = ddown + args_.grad_down
    dz = ddown * slope(a.activation, z)
    dhidden = dz @ a.down_weight.to(dtype)
    if args_.residual_is_hidden:
        dhidden = dhidden + args_.grad
    unscaled = _up(down, a)
    dscale = (dup * unscaled).sum(0)  # [N]
    if a.scale is not None and a.scale.shape[0] == 1:
        dscale = dscale.sum(0, keepdim=True)
    values = (
        dhidden,
        dz.t() @ hidden.to(dtype),
        dz.sum(0),
        (dup * scale).t() @ down,
        (dup * scale).sum(0),
        dscale,
        (dgated * (unscaled * scale)).sum(1),
    )
    return tuple(
        hidden.new_empty(0, dtype=hidden.dtype if of is None else of.dtype)
        if of is None or not needed
        else value.to(of.dtype, copy=True)
        for value, (of, needed) in zip(values, differentiated(args_), strict=True)
    )


def _preactivation(hidden: torch.Tensor, a: Operands) -> torch.Tensor:
    """hidden W_d^T + b_d [M, r]."""
    dtype = accumulate_dtype(hidden.dtype)
    z = hidden.to(dtype) @ a.down_weight.to(dtype).t()
    return z if a.down_bias is None else z + a.down_bias


def _up(down: torch.Tensor, a: Operands) -> torch.Tensor:
    """down W_u^T + b_u [M, N], before its scale."""
    up = down @ a.up_weight.to(down.dtype).t()
    return up if a.up_bias is None else up + a.up_bias


def _drop(x: torch.Tensor, a: Operands) -> torch.Tensor:
    """D(x), and equally D' applied to a gradient [M, N]."""
    return x if a.seed is None or a.dropout_p == 0.0 else dropped(x, a.dropout_p, a.seed)
