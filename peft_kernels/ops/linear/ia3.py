"""IA3: a frozen linear layer whose outputs, or inputs, are scaled by a trained vector."""

import torch

from peft_kernels.core.checks import check_dtype, check_flag, check_memory, check_tensor
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES
from peft_kernels.ops.linear.functional import adapted_linear, check_weight, under_autocast
from peft_kernels.ops.linear.schema import accumulate_dtype, check_vector
from peft_kernels.ops.nf4.weight import NF4Weight


def ia3_linear(
    x: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    ia3_l: torch.Tensor,
    bias: torch.Tensor | None = None,
    feedforward: bool = False,
) -> torch.Tensor:
    """y = (x W^T + bias) * l, or with `feedforward` y = (x * l) W^T + bias: IA3 over a frozen weight.

    Products are summed in fp32, and y is rounded once, to the dtype of `x`. Differentiable in x, ia3_l and
    bias, once. The backward pass keeps x W^T [M, N], with `feedforward` x itself, and only where ia3_l is
    trained. For several adapters pass the product of their vectors. Autocast: as `adapted_linear`.

    Args:
        x: [..., K]; float32, bfloat16, float16, or float64 (on the reference backend).
        weight: frozen; `NF4Weight` of shape [N, K], or dense [N, K] of the dtype of `x`.
        ia3_l: l, [N], or [N, 1] as PEFT has it; with `feedforward` [K] or [1, K]. float32 or the dtype of
            `x`. An fp32 vector over bf16 `x` does not cast `x` up.
        bias: [N]; float32 or the dtype of `x`.
        feedforward: scale the inputs, as IA3 does in the second layer of a feed-forward block, rather than
            the outputs, as it does for keys and values.

    Returns:
        [..., N], dtype of `x`.

    Raises:
        TypeError: an argument is not a tensor where it must be one.
        ValueError: see `adapted_linear`; or the shape of `ia3_l` does not fit.

    Source: IA3, arXiv 2205.05638, section 3.3.
    """
    check_tensor("x", x)
    check_tensor("ia3_l", ia3_l)
    check_flag("feedforward", feedforward)
    x, weight = under_autocast(x, weight)
    check_weight(weight, x)
    check_dtype("x", x, FLOAT_DTYPES)
    scale = _vector(ia3_l, tuple(weight.shape), feedforward)
    check_vector("ia3_l", scale, "[K]" if feedforward else "[N]", scale.shape[0], x)
    check_memory("ia3_l", ia3_l)
    if feedforward:
        return adapted_linear(x, weight, input_scale=scale, bias=bias)
    if bias is not None:
        check_vector("bias", bias, "[N]", weight.shape[0], x)
        check_memory("bias", bias)
        bias = bias * scale.to(accumulate_dtype(scale.dtype))
    return adapted_linear(x, weight, column_scale=scale, bias=bias)


def _vector(ia3_l: torch.Tensor, weight_shape: tuple[int, ...], feedforward: bool) -> torch.Tensor:
    """`ia3_l` as [N] or [K]."""
    letter, size = ("K", weight_shape[1]) if feedforward else ("N", weight_shape[0])
    if ia3_l.shape not in ((size,), (1, size) if feedforward else (size, 1)):
        shapes = f"[{letter}] or {'[1, K]' if feedforward else '[N, 1]'}"
        form = "with" if feedforward else "without"
        raise ValueError(
            f"ia3_l must be {shapes} = [{size}] {form} feedforward, got {list(ia3_l.shape)}; pass the vector "
            "made for this layer"
        )
    return ia3_l.reshape(size)
