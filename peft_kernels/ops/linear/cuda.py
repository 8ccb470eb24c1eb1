"""The backward of the adapted linear on a GPU with CUDA C++ kernels: they compute dx, Triton's the rest.

The forward needs no Python: `python_bindings/cuda/linear.cpp`.
"""

from typing import Any

import torch

from peft_kernels.ops.linear import triton
from peft_kernels.ops.linear.schema import BackwardArgs, ForwardArgs, base_weight
from peft_kernels.ops.linear.triton_input_gradient import Gradients, input_gradient


def adapted_linear_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    """Launch the backward; see `reference.adapted_linear_backward`.

    Raises:
        ValueError: besides what the contract says, x in float64.
    """
    return triton.backward(BackwardArgs(*args), _input_gradient)


def _input_gradient(
    f: ForwardArgs, grad: torch.Tensor, du: torch.Tensor | None, need_x: bool, need_input_scale: bool
) -> Gradients:
    """dx [M, K] by CUDA C++, unless dl_in, which sums the same product, is needed too."""
    if f.absmax is None or need_input_scale or not need_x:
        return input_gradient(f, grad, du, need_x, need_input_scale)
    dx = torch.ops.peft_kernels.nf4_linear_backward_input.cuda(
        grad,
        *base_weight(f),
        f.x.shape[1],
        f.column_scale,
        du,
        None if du is None else f.lora_a,
        f.input_scale,
        f.dropout_p if du is not None else 0.0,
        f.seed,
    )
    return dx, None
