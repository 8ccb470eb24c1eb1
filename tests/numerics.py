"""Error bounds for comparing a kernel with float64: functions of dtype, reduction length and magnitudes.

A sum of n products, accumulated in any order in a type of unit roundoff u, obeys

    |computed - exact| <= gamma_n * sum_i |a_i| |b_i|,    gamma_n = n u / (1 - n u)

(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). Every value the adapted
linear computes is a sum of products of inputs; a term passes through at most n roundings on its way from the
inputs to the result, and one more rounding takes the result to its dtype:

    |computed - exact| <= gamma_n(accumulate dtype) * magnitude + u(dtype) * |exact| + smallest(dtype)

where magnitude is the same formula evaluated on the absolute values of all inputs. It is an upper bound, so
a correct kernel cannot fail whatever its order of summation, and it is tight enough that one missing,
doubled or misplaced term of a sum breaks it: in fp32 gamma_n is 1e-5 for n = 170.
"""

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """Largest absolute error of a subnormal result (float16), or one flushed to zero (the others)."""
    info = torch.finfo(dtype)
    return max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)


def gamma(n: int, dtype: torch.dtype) -> float:
    """Bound on the relative error that n successive roundings cause."""
    nu = n * unit_roundoff(dtype)
    assert nu < 0.5, f"the bound means nothing for n = {n} in {dtype}"
    return nu / (1 - nu)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the kernels sum."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bound(exact: torch.Tensor, magnitude: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Largest error of a result in `dtype` whose terms passed `n` roundings in the accumulate dtype."""
    # u applies to the computed value, which differs from the exact one by the first term.
    accumulated = gamma(n, accumulate_dtype(dtype)) * magnitude
    return accumulated + unit_roundoff(dtype) * (exact.abs() + accumulated) + smallest(dtype)


def nf4_bound(exact: torch.Tensor, magnitude: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
    """`bound` for a product with an NF4 weight, which for bf16 may be rounded to bf16 first."""
    weight = unit_roundoff(dtype) if dtype == torch.bfloat16 else 0.0
    return bound(exact, magnitude, n, dtype) + weight * magnitude


def assert_within(name: str, actual: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor) -> None:
    """Every element of `actual` is within `allowed` of `exact` (both float64)."""
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    if actual.numel() == 0:
        return
    assert actual.isfinite().all(), (
        f"{name}: {int((~actual.isfinite()).sum())} of {actual.numel()} not finite"
    )
    ratio = (actual.double() - exact).abs() / allowed
    worst = int(ratio.argmax())
    assert ratio.flatten()[worst] <= 1, (
        f"{name}: error is {float(ratio.max()):.3g} times what rounding can cause, at flat index {worst} of "
        f"{list(actual.shape)}: got {float(actual.flatten()[worst])!r}, "
        f"exact {float(exact.flatten()[worst])!r}; {int((ratio > 1).sum())} of {ratio.numel()} are off"
    )


def gradients(formula: Callable[[Tensors], torch.Tensor], inputs: Tensors, grad: torch.Tensor) -> Tensors:
    """float64 gradients of `formula` at `inputs`, for the upstream gradient `grad`, by torch's autograd."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    result = formula(leaves)
    found = torch.autograd.grad(result, list(leaves.values()), grad.double(), allow_unused=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
