"""Public calls of DoRA."""

import torch

from peft_kernels.core.backend import resolve
from peft_kernels.core.checks import check_dtype, check_memory, check_probability, check_tensor
from peft_kernels.core.transforms import refuse_transforms
from peft_kernels.ops.dora.schema import NormArgs, check_dora_norm
from peft_kernels.ops.dropout.functional import philox_dropout
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES
from peft_kernels.ops.linear.functional import (
    adapted_linear,
    check_weight,
    fold_scaling,
    split_weight,
    under_autocast,
)
from peft_kernels.ops.linear.schema import check_vector
from peft_kernels.ops.nf4.weight import NF4Weight


def dora_norm(
    weight: torch.Tensor | NF4Weight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float | torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """norm_n = ||W_n + scaling * (B A)_n||, the length over the K inputs of the weights of each output n.

    W + scaling * B A is formed a few numbers at a time and never in memory; an NF4 weight is decoded on the
    way. The relative error is below 1e-6, and typically 1e-7: rows for which fp32 sums are not sure to keep
    that (they nearly cancel, or their squares overflow) are computed in float64. Not differentiable: DoRA
    takes the norm as a constant.

    Args:
        weight: frozen; `NF4Weight` of shape [N, K], or dense [N, K]: float32, bfloat16, float16 or float64.
        lora_a: [r, K]; float32, bfloat16 or float16 (float64 over a float64 `weight`).
        lora_b: [N, r], dtype of `lora_a`.
        scaling: alpha/r, or alpha/sqrt(r) for rsLoRA; a float, or a tensor with one element.
        dtype: of the result. PEFT rounds the norm to the dtype of x: torch.bfloat16 for a bf16 model.

    Returns:
        [N]; float32 by default, float64 for a float64 adapter. 0 for a row of zeros.

    Raises:
        TypeError: an argument is not a tensor where it must be one.
        ValueError: a shape, dtype, device or value does not fit; the message says which.
        NotImplementedError: called inside a torch.func transform or under forward-mode differentiation.

    Source: DoRA, arXiv 2402.09353, equation 5; the norm as a constant: section 4.3.
    """
    refuse_transforms("dora_norm", "torch.linalg.vector_norm on w.dequantize() + scaling * lora_b @ lora_a")
    check_tensor("lora_a", lora_a)
    check_tensor("lora_b", lora_b)
    base, out_features = split_weight(weight, None)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES):
        raise ValueError(f"dtype must be a float dtype of 16 to 64 bits or None, got {dtype}")
    lora_a, lora_b = lora_a.detach(), lora_b.detach()
    if isinstance(scaling, torch.Tensor) or torch.compiler.is_compiling():
        lora_b, scaling = fold_scaling(lora_b, scaling).detach(), 1.0
    args = NormArgs(*base, out_features, lora_a, lora_b, scaling)
    check_dora_norm(args)
    norm: torch.Tensor = resolve("dora_norm", lora_a)(*args)
    return norm if dtype is None else norm.to(dtype)


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """DoRA over a frozen weight: the rows of W + scaling * B A, made unit vectors, times `magnitude`.

        y = g * (x W^T + scaling * (x A^T) B^T) + bias        g = magnitude / norm, norm = `dora_norm`

    With dropout, as in PEFT, it acts on the whole update, which is then a second product with W:

        y = x W^T + (g - 1) * (D(x) W^T) + g * scaling * (D(x) A^T) B^T + bias

    computed as the layer of D(x) plus (x - D(x)) W^T. In 16 bits these two and D(x) are rounded on the way
    (in bf16 1.2 times the error of the form above for p = 0.05, 1.7 times for 0.5); fp16 must hold D(x).

    Differentiable in x, lora_a, lora_b, magnitude and bias, once, with the norm as a constant. A row of
    W + scaling * B A that is zero has no direction and gives y = bias there (PEFT: NaN). The backward pass
    keeps x (with dropout D(x)), u = x A^T [M, r] and, if magnitude is trained, y before g [M, N].

    Args:
        x: [..., K]; float32, bfloat16, float16, or float64 (on the reference backend).
        weight: frozen; `NF4Weight` of shape [N, K], or dense [N, K] of the dtype of `x`.
        lora_a: [r, K]; float32 or the dtype of `x`.
        lora_b: [N, r], dtype of `lora_a`.
        magnitude: [N]; float32 or the dtype of `x`. g is computed in the wider dtype of it and the norm.
        scaling: alpha/r, or alpha/sqrt(r) for rsLoRA; a float, or a tensor with one element.
        bias: [N]; float32 or the dtype of `x`. Not multiplied by g.
        dropout_p: in [0, 1); pass 0 when not training.
        seed: fixes the dropout mask; see `adapted_linear`.
        norm: [N], float32 or the dtype of `x`: what `dora_norm` gives for this weight and adapter, if known
            already; computed when None.

    Returns:
        [..., N], dtype of `x`.

    Raises:
        TypeError: an argument is not a tensor where it must be one.
        ValueError: a shape, dtype, device or value does not fit (the message says which), or `weight`
            requires a gradient.
        NotImplementedError: see `adapted_linear`.

    Source: DoRA, arXiv 2402.09353, equation 5 and section 4.3.
    """
    refuse_transforms("dora_linear", "torch.nn.functional.linear on w.dequantize() and the adapter")
    check_tensor("x", x)
    check_dtype("x", x, FLOAT_DTYPES)
    check_tensor("lora_b", lora_b)
    check_probability("dropout_p", dropout_p)
    x, _ = under_autocast(x, weight)  # the norm is that of the weight as it is
    check_weight(weight, x)
    if isinstance(scaling, torch.Tensor):
        lora_b, scaling = fold_scaling(lora_b, scaling), 1.0
    if norm is None:
        norm = dora_norm(weight, lora_a, lora_b, scaling)
    for name, vector in (("magnitude", magnitude), ("norm", norm)):
        check_tensor(name, vector)
        check_vector(name, vector, "[N]", weight.shape[0], x)
        check_memory(name, vector)
    dropped, scale = philox_dropout(x, dropout_p, seed), row_scale(magnitude, norm)
    y = adapted_linear(
        dropped, weight, lora_a=lora_a, lora_b=lora_b, scaling=scaling, column_scale=scale, bias=bias
    )
    # x W^T + (g - 1) * (D(x) W^T) = g * (D(x) W^T) + (x - D(x)) W^T
    return y + adapted_linear(x - dropped, weight) if dropout_p > 0.0 else y


def row_scale(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """g = magnitude / norm [N], with the norm as a constant; 0 for a row of zeros, which has no direction."""
    return magnitude / norm.detach().masked_fill(norm == 0, torch.inf)
