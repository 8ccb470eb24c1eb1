"""Meaning of the adapted linear in plain PyTorch: specification, fallback and benchmark baseline in one."""

from typing import Any

import torch

from peft_kernels.core.backend import reference_kernel
from peft_kernels.ops.dropout.reference import dropped
from peft_kernels.ops.linear.schema import (
    BackwardArgs,
    ForwardArgs,
    accumulate_dtype,
    base_weight,
    check_adapted_linear,
    check_adapted_linear_backward,
)
from peft_kernels.ops.nf4.reference import nf4_dequantize


@reference_kernel("adapted_linear")
def adapted_linear(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = c * z + bias, z = (x * l_in) W^T + scaling * u B^T, u = D(x) A^T, in fp32 (fp64 for fp64).

    Args:
        *args: `ForwardArgs`, then save_preactivation (bool).

    Returns:
        y [M, N] rounded once to the dtype of x; u [M, r] unrounded, or [0]; z [M, N] rounded, or [0].
    """
    a, save_preactivation = ForwardArgs(*args[:-1]), args[-1]
    check_adapted_linear(a)
    dtype = accumulate_dtype(a.x.dtype)
    x = a.x.to(dtype)
    z = (x if a.input_scale is None else x * a.input_scale) @ _dense(a).t()  # [M, N]
    u = x.new_empty(0)
    if a.lora_a is not None and a.lora_b is not None:
        u = _drop(x, a) @ a.lora_a.to(dtype).t()  # [M, r]
        z = z + a.scaling * (u @ a.lora_b.to(dtype).t())
    y = z if a.column_scale is None else z * a.column_scale
    if a.bias is not None:
        y = y + a.bias
    # copy: .to() returns its argument when there is nothing to convert, and outputs must not share memory.
    saved = z.to(a.x.dtype, copy=True) if save_preactivation else a.x.new_empty(0)
    return y.to(a.x.dtype), u, saved


@reference_kernel("adapted_linear_backward")
def adapted_linear_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    """Gradients of `adapted_linear` in fp32 (fp64 for fp64), each rounded once.

    dz = c * g, du = scaling * dz B, dB = scaling * dz^T u, dA = du^T D(x), dx = l_in * (dz W) + D'(du A),
    dc = sum_t g * z, dl_in = sum_t x * (dz W), dbias = sum_t g.

    Args:
        *args: `BackwardArgs`.

    Returns:
        dx [M, K], dlora_a [r, K], dlora_b [N, r], dcolumn_scale [N], dinput_scale [K] in the dtypes of their
        tensors, dbias [N] in the dtype of grad; [0] for those not needed.
    """
    a = BackwardArgs(*args)
    check_adapted_linear_backward(a)
    dtype = accumulate_dtype(a.x.dtype)
    g = a.grad.to(dtype)  # [M, N]
    dz = g if a.column_scale is None else g * a.column_scale
    dx = dlora_a = dlora_b = dcolumn_scale = dinput_scale = None
    if a.need_x or a.need_input_scale:
        dx = dz @ _dense(a.forward)  # [M, K]
        if a.need_input_scale:
            dinput_scale = (a.x.to(dtype) * dx).sum(0)
        if a.input_scale is not None:
            dx = dx * a.input_scale
    if a.lora_a is not None and a.lora_b is not None:
        du = a.scaling * (dz @ a.lora_b.to(dtype))  # [M, r]
        if a.need_lora_a:
            dlora_a = du.t() @ _drop(a.x.to(dtype), a.forward)
        if a.need_lora_b and a.u is not None:
            dlora_b = a.scaling * (dz.t() @ a.u)
        if a.need_x and dx is not None:
            dx = dx + _drop(du @ a.lora_a.to(dtype), a.forward)
    if a.need_column_scale and a.z is not None:
        dcolumn_scale = (g * a.z).sum(0)

    def gradient(value: torch.Tensor | None, of: torch.Tensor | None) -> torch.Tensor:
        of = a.x if of is None else of
        return of.new_empty(0) if value is None else value.to(of.dtype)

    return (
        gradient(dx if a.need_x else None, a.x),
        gradient(dlora_a, a.lora_a),
        gradient(dlora_b, a.lora_b),
        gradient(dcolumn_scale, a.column_scale),
        gradient(dinput_scale, a.input_scale),
        g.sum(0).to(a.grad.dtype) if a.need_bias else a.grad.new_empty(0),
    )


def _dense(a: ForwardArgs) -> torch.Tensor:
    """The weight [N, K] in the accumulate dtype; NF4 unrounded."""
    if a.absmax is not None:
        shape = (a.out_features, a.x.shape[1])
        w: torch.Tensor = nf4_dequantize(*base_weight(a), shape, torch.float32)
    else:
        w = a.weight
    return w.to(accumulate_dtype(a.x.dtype))


def _drop(x: torch.Tensor, a: ForwardArgs) -> torch.Tensor:
    """D(x), and equally D' applied to a gradient [M, K]."""
    return x if a.seed is None or a.dropout_p == 0.0 else dropped(x, a.dropout_p, a.seed)
