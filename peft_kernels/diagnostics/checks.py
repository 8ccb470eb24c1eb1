"""Whether this installation computes correctly: every op, in every dtype, against the mathematics in float64.

Each op is run the way a user's call runs it and compared element by element, allowing the error that rounding
may cause there (`peft_kernels.bench.oracle`, which shares no code with the kernels).
"""

from dataclasses import dataclass, replace

import torch

from peft_kernels.bench import registry
from peft_kernels.bench.case import CHECK_SEED, OURS, Case
from peft_kernels.bench.oracle import compare
from peft_kernels.core.library import native_library

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SelfTestResult:
    """One self-test case.

    Attributes:
        case: op, direction, sizes, weight format and dtype.
        error: largest absolute error over the largest absolute value expected.
        tolerance_used: largest error over what rounding may cause there; at most 1 in a correct kernel.
        passed: whether no element is off by more than that.
    """

    case: str
    error: float
    tolerance_used: float
    passed: bool


def self_test() -> list[SelfTestResult]:
    """Run the benchmarks' smoke suite, which has every op, in each dtype, and check every element.

    Nothing is run, and nothing returned, where every native kernel would refuse to run (see the advice
    "capability-unknown").
    """
    if native_library().loaded and native_library().capability is None:
        return []
    with torch.random.fork_rng(devices=[]):
        return [_check(replace(case, dtype=dtype)) for case in registry.select("smoke") for dtype in DTYPES]


def _check(case: Case) -> SelfTestResult:
    prepared = registry.prepare(case)
    oracle = prepared.oracle(OURS)
    if oracle is None:
        raise RuntimeError(f"case {case.name} has no float64 oracle for {OURS}: it cannot be self-tested")
    torch.manual_seed(CHECK_SEED)  # the oracle's dropout mask is drawn from it
    program = prepared.contestants[OURS]()[0]
    torch.manual_seed(CHECK_SEED)
    check = compare(program.outputs(program.call()), oracle)
    return SelfTestResult(case.name, check.error, check.tolerance_used, check.passed)
