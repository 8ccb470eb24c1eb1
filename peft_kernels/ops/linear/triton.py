"""The ops of the adapted linear on a GPU: Triton kernels and vendor GEMMs, chosen by `triton_plan`."""

from collections.abc import Callable
from typing import Any

import torch

from peft_kernels.core.gpu import check_kernel_dtype, with_plain_rows
from peft_kernels.ops.linear.schema import (
    BackwardArgs,
    ForwardArgs,
    InputGradientArgs,
    base_weight,
    check_adapted_linear,
    check_adapted_linear_backward,
    check_nf4_linear_backward_input,
)
from peft_kernels.ops.linear.triton_backward import lora_a_gradient, sums_over_grad
from peft_kernels.ops.linear.triton_forward import Forward
from peft_kernels.ops.linear.triton_input_gradient import Gradients, input_gradient
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
    return backward(BackwardArgs(*args), input_gradient)


def backward(a: BackwardArgs, input_gradient: Callable[..., Gradients]) -> tuple[torch.Tensor, ...]:
    """The backward, with a choice of what computes dx and dl_in; see `input_gradient`."""
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


def nf4_linear_backward_input(*args: Any) -> torch.Tensor:
    """Launch dx alone; see `reference.nf4_linear_backward_input`.

    Raises:
        ValueError: besides what the contract says, grad in float64.
    """
    a = InputGradientArgs(*args)
    check_nf4_linear_backward_input(a)
    check_kernel_dtype("grad", a.grad)
    n, x = a.grad.shape[1], a.grad.new_empty(()).expand(a.grad.shape[0], a.in_features)  # never read
    f = ForwardArgs(
        x, *base_weight(a), n, a.lora_a, None, 1.0, a.column_scale, a.input_scale, None, a.dropout_p, a.seed
    )
    du = None if a.du is None else a.du.contiguous()
    dx, _ = input_gradient(with_plain_strides(f, read_x=False), with_plain_rows(a.grad), du, True, False)
    assert dx is not None
    return dx
