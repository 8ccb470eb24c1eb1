"""NF4 linear layers on activations rounded to int8: forward only, beside ours without that rounding."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import NF4Weight, functional
from peft_kernels.ops.nf4.reference import NF4_CODE

from . import baselines
from .case import EXACT, OURS, Case, Family, Oracle, Prepared, Program, differentiated
from .cases_linear import weight_roundoffs
from .cases_nf4 import BLOCKSIZE, quantized_bytes, quantized_weight
from .machine import weight_copies
from .oracle import LinearTerms, linear_oracle

_GROUP, _MOST_VALUE, _LEVEL_SCALE = (
    64,
    127,
    124,
)  # inputs that share a scale; the largest value; that of levels
_DEVIATIONS = 7  # by more, an element is off with probability 2 exp(-7^2 / 2) = 5e-11
_INT8 = partial(Case, "int8", "nf4_linear_int8", weight="nf4")

CASES = (
    _INT8(3, 128, 64, suites=("smoke",)),
    _INT8(64, 4096, 4096, suites=("quick", "full")),
    *(_INT8(m, 4096, 4096) for m in (1, 4, 16, 256)),
    *(_INT8(m, 4096, 4096, dtype="bfloat16") for m in (1, 16, 64, 256)),
    _INT8(64, 4096, 11008),
    _INT8(64, 11008, 4096),
)


def prepare(case: Case) -> Prepared:
    """Prepare any `nf4_linear_int8` case."""
    torch.manual_seed(0)
    first = quantized_weight(case)
    weights = [copy.deepcopy(first) for _ in range(weight_copies(quantized_bytes(case)))]
    x = torch.randn(case.m, case.k).to(case.torch_dtype)
    operands = baselines.eager_operands(first)
    dense = baselines.eager_dequantize((case.n, case.k), *operands)
    terms = LinearTerms(x, dense, None, None, 1.0, x.new_empty(0))

    def programs(function: Callable[..., Tensor], weights: list[NF4Weight] | list[Tensor]) -> list[Program]:
        return [differentiated("forward", partial(function, x, weight), {}, x) for weight in weights]

    def dense_programs() -> list[Program]:
        copies = weight_copies(dense.nbytes * case.element_size // 4)
        return programs(F.linear, [dense.to(case.torch_dtype, copy=True) for _ in range(copies)])

    @functools.cache
    def exact() -> Oracle:
        return linear_oracle(case, terms, None, weight_roundoffs(case))

    def oracle(contestant: str) -> Oracle | None:
        if contestant != OURS:
            return exact()
        expected = linear_oracle(case, terms, None)
        checked = x[expected.rows["y"]] if expected.rows else x
        rounding = _rounding(checked, dense, baselines.eager_absmax(*operands[2:]))
        return Oracle(expected.values, {"y": expected.tolerances["y"] + rounding}, expected.rows)

    return Prepared(
        contestants={
            OURS: lambda: programs(partial(functional.nf4_linear, activation="int8"), weights),
            # On weights of its own: it must not find them in cache after ours.
            EXACT: lambda: programs(functional.nf4_linear, copy.deepcopy(weights)),
            "bitsandbytes": lambda: [
                differentiated("forward", partial(baselines.bitsandbytes_linear(weight), x), {}, x)
                for weight in weights
            ],
            "dense": dense_programs,
        },
        oracle=oracle,
        flops=0,  # integer operations: the roofline's floating-point peak does not bound them
        read_bytes=quantized_bytes(case) + case.element_size * case.m * case.k,
        write_bytes=case.element_size * case.m * case.n,
        copies=len(weights),
    )


def _rounding(x: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    """How far rounding x [M, K] and the levels of W [N, K] moves results at most, nearly for certain; [M, N].

    A product x w is moved by at most A / 254 |w| + d absmax (|x| + A / 254), A being the largest magnitude of
    the group and d the largest error of a level. Such errors have random signs, those of x. Their sum exceeds
    lambda times the root of the sum of their squares with probability 2 exp(-lambda^2 / 2) (Hoeffding, J.
    Amer. Statist. Assoc. 58 (1963), theorem 2).
    """
    x = x.double()
    groups = x.view(len(x), -1, _GROUP)
    half_step = (groups.abs().amax(2, keepdim=True) / (2 * _MOST_VALUE)).expand_as(groups).reshape_as(x)
    code = torch.tensor(NF4_CODE, dtype=torch.float64)
    level_error = float(((code * _LEVEL_SCALE).round() / _LEVEL_SCALE - code).abs().max())
    squares = half_step.square() @ weight.double().square().T
    # Per block of the weight, whose size is a group's: all its elements share one absmax.
    of_levels = (x.abs() + half_step).square().view(len(x), -1, BLOCKSIZE).sum(2) * level_error**2
    squares += of_levels @ absmax.double().view(weight.shape[0], -1).square().T
    return _DEVIATIONS * math.sqrt(2) * squares.sqrt()  # (a + b)^2 <= 2 a^2 + 2 b^2


FAMILY = Family("int8", CASES, lambda _: ("bitsandbytes", "bitsandbytes-tuned", "dense", EXACT), prepare)
