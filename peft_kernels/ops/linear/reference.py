"""Meaning of the adapted linear in plain PyTorch: specification, fallback and benchmark baseline in one."""

from typing import Any

import torch

from peft_kernels.core.backend import reference_kernel
from peft_kernels.ops.dropout.reference import dropped
from peft_kernels.ops.linear.schema import (
    BackwardArgs,
    ForwardArgs,
    InputGradientArgs,
    Int8Args,
    accumulate_dtype,
    base_weight,
    check_adapted_linear,
    check_adapted_linear_backward,
    check_nf4_linear_backward_input,
    check_nf4_linear_int8,
)
from peft_kernels.ops.nf4.reference import dequantize_absmax, nf4_code, nf4_dequantize, unpack

INT8_GROUP = 64  # inputs of a token that share a scale
INT8_MOST_VALUE = 127.0
INT8_LEVEL_SCALE = 124.0  # of the integers up to 127, the one whose rounding errs least on normal weights
_INT8_LEAST = 2.0**-120  # a group of smaller magnitudes counts as zeros: 127 / magnitude could overflow


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


@reference_kernel("nf4_linear_backward_input")
def nf4_linear_backward_input(*args: Any) -> torch.Tensor:
    """dx = l_in * ((c * g) W) + D'(du A), in fp32 (fp64 for fp64): `adapted_linear_backward` from du on.

    Args:
        *args: `InputGradientArgs`.

    Returns:
        dx [M, K] rounded once to the dtype of grad.
    """
    a = InputGradientArgs(*args)
    check_nf4_linear_backward_input(a)
    dtype = accumulate_dtype(a.grad.dtype)
    dz = a.grad.to(dtype)
    if a.column_scale is not None:
        dz = dz * a.column_scale
    shape = (a.grad.shape[1], a.in_features)
    dx: torch.Tensor = dz @ nf4_dequantize(*base_weight(a), shape, torch.float32).to(dtype)
    if a.input_scale is not None:
        dx = dx * a.input_scale
    if a.du is not None and a.lora_a is not None:
        low_rank = a.du @ a.lora_a.to(dtype)
        if a.seed is not None and a.dropout_p > 0.0:
            low_rank = dropped(low_rank, a.dropout_p, a.seed)
        dx = dx + low_rank
    return dx.to(a.grad.dtype)


@reference_kernel("nf4_linear_int8")
def nf4_linear_int8(*args: Any) -> torch.Tensor:
    """y = x W^T + bias with x rounded to int8, by groups of 64 inputs of a token, and the NF4 code to levels.

        value = rint(x * 127 / largest magnitude of the group)      level = rint(124 * code)
        y = sum over groups, over blocks of W in a group: (sum of value * level) * scale * absmax
        scale = largest magnitude / (127 * 124)

    The inner sums are integers, exact in fp32 too; the others run in this order, in fp32. So the native
    kernels give the same bits.

    Args:
        *args: `Int8Args`.

    Returns:
        y [M, N] rounded once to the dtype of x; NaN for a token that is not finite.
    """
    a = Int8Args(*args)
    check_nf4_linear_int8(a)
    (m, k), n = a.x.shape, a.out_features
    values, scale = round_activations(a.x)
    base = base_weight(a)
    levels = torch.round(INT8_LEVEL_SCALE * nf4_code(a.x.device))[unpack(a.weight, n * k)].reshape(n, k)
    absmax = dequantize_absmax(base)
    block = (torch.arange(n * k, device=a.x.device) // a.blocksize).reshape(n, k)
    y = scale.new_zeros(m, n)
    for group in range(scale.shape[1]):
        columns = slice(group * INT8_GROUP, (group + 1) * INT8_GROUP)
        first, last = block[:, columns][:, :1], block[:, columns][:, -1:]
        for part in range(int((last - first).max()) + 1):  # not every row need have so many blocks in a group
            inside = block[:, columns] == first + part
            products = values[:, columns] @ (levels[:, columns] * inside).t()
            absmax_of_part = absmax[torch.minimum(first + part, last)].t()  # [1, N]
            term = products * scale[:, group, None] * absmax_of_part
            y = y + term.where(inside.any(dim=1), 0.0)
    y = y if a.bias is None else y + a.bias
    return y.to(a.x.dtype)


def round_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `nf4_linear_int8` makes of x [M, K].

    Returns:
        Integer values from -127 to 127, fp32 [M, K], and the scales, fp32 [M, ceil(K/64)]; NaN where a group
        has an input that is not finite.
    """
    k = x.shape[1]
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, -k % INT8_GROUP))
    groups = padded.view(len(x), padded.shape[1] // INT8_GROUP, INT8_GROUP)
    largest = groups.abs().amax(dim=2)
    factor = (torch.full_like(largest, INT8_MOST_VALUE) / largest).where(largest >= _INT8_LEAST, 0.0)
    values = torch.round(groups * factor[:, :, None]).flatten(1)[:, :k]
    scale = largest / (INT8_MOST_VALUE * INT8_LEVEL_SCALE)
    return values, scale.where(largest.isfinite(), torch.nan)
