"""The ops of the adapted linear on a GPU: Triton kernels and vendor GEMMs, chosen by `triton_plan`."""

from typing import Any

import torch

from peft_kernels.core.gpu import check_kernel_dtype, with_plain_rows
from peft_kernels.ops.linear.schema import (
    BackwardArgs,
    ForwardArgs,
    check_adapted_linear,
    check_adapted_linear_backward,
)
from peft_kernels.ops.linear.triton_backward import lora_a_gradient, sums_over_grad
from peft_kernels.ops.linear.triton_forward import Forward
from peft_kernels.ops.linear.triton_input_gradient import input_gradient
from peft_kernels.ops.linear.triton_launch import with_plain_strides


def adapted_linear(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward; see `reference.adapted_linear`.

    Raises:
        ValueError: besides what the contract says, x in float64.
    """
    a, save_preactivation = ForwardArgs(*args[:-1]), args[-1]
    check_adapted_linear(a)
    check_kernel_dtype("x", a.x)
    forward = Forward(a, save_preactivation)
    z = a.x.new_empty(0) if forward.z is None else forward.z
    return forward.y, forward.u, z


def adapted_linear_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    """Launch the backward; see `reference.adapted_linear_backward`.

    Raises:
        ValueError: besides what the contract says, x in float64.
    """
    a = BackwardArgs(*args)
    check_adapted_linear_backward(a)
    check_kernel_dtype("x", a.x)
    f = with_plain_strides(a.forward, read_x=a.need_lora_a or a.need_input_scale)
    grad = with_plain_rows(a.grad)
    sums = sums_over_grad(a, f, grad)
    dlora_a = lora_a_gradient(f, sums.du) if a.need_lora_a and sums.du is not None else None
    dx, dinput_scale = input_gradient(f, grad, sums.du, a.need_x, a.need_input_scale)
    results = (
        (dx, a.x),
        (dlora_a, a.lora_a),
        (sums.dlora_b, a.lora_b),
        (sums.dcolumn_scale, a.column_scale),
        (dinput_scale, a.input_scale),
        (sums.dbias, a.grad),
    )
    return tuple(
        (a.x if of is None else of).new_empty(0) if value is None else value for value, of in results
    )
