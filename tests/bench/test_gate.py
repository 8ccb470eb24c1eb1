import dataclasses

import pytest
from peft_kernels.bench.gate import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNJUDGED,
    Verdict,
    exit_status,
    gate_of,
    judge,
)
from peft_kernels.bench.results import ContestantResult, Measurement
from peft_kernels.bench.stats import Band


def with_ratio(name, *band):
    ratio = Band(*band)
    return ContestantResult(name, "measured", measurement=Measurement(ratio, ratio, 1.0, None, 1.0, 0.0, []))


STOCK = [
    with_ratio("eager", 1.3, 0.9, 1.5),
    with_ratio("bitsandbytes", 1.1, 1.0, 1.2),
    with_ratio("dense", 0.5, 0.4, 0.6),  # for information
]


def test_gate_is_the_lowest_lower_end_of_the_stock_baselines():
    gate = gate_of([*STOCK, ContestantResult("peft", "missing")])
    assert (gate.baseline, gate.ratio, gate.low) == ("eager", 1.3, 0.9)


def test_a_baseline_that_is_too_noisy_has_no_part_in_the_gate():
    assert gate_of([*STOCK, ContestantResult("peft", "noisy")]) == gate_of(STOCK)
    assert gate_of(STOCK[2:]) is None


@pytest.mark.parametrize(
    ("fail_below", "verdict"),
    [
        (1.8, Verdict("unjudged", "too noisy to judge: peft")),  # it might be the fastest
        (1.9, Verdict("slow", "1.800 < 1.9 against eager")),
    ],
)
def test_noise_of_one_baseline_hides_no_loss_against_another(report, fail_below, verdict):
    contestants = [*report.cases[0].contestants, ContestantResult("peft", "noisy")]
    assert judge(dataclasses.replace(report.cases[0], contestants=contestants), fail_below) == verdict


@pytest.mark.parametrize(
    ("fail_below", "verdict"),
    [
        (None, Verdict("passed")),
        (1.8, Verdict("passed")),
        (1.9, Verdict("slow", "1.800 < 1.9 against eager")),
    ],
)
def test_the_lower_end_is_held_against_the_limit(report, fail_below, verdict):
    assert judge(report.cases[0], fail_below) == verdict


def test_no_gate_is_no_pass(report):
    result = dataclasses.replace(report.cases[0], gate=None, contestants=report.cases[0].contestants[:1])
    assert judge(result, None) == Verdict("passed")
    assert judge(result, 0.5) == Verdict("unjudged", "no stock baseline to judge against")
    noisy = [*result.contestants, ContestantResult("peft", "noisy"), ContestantResult("dense", "noisy")]
    verdict = judge(dataclasses.replace(result, contestants=noisy), 0.5)
    assert verdict == Verdict("unjudged", "too noisy to judge: peft")


def test_a_wrong_result_needs_no_limit(report):
    ours = ContestantResult("peft_kernels", "failed", "y is off")
    result = dataclasses.replace(report.cases[0], status="failed", contestants=[ours], gate=None)
    assert judge(result, None) == judge(result, 0.5) == Verdict("wrong", "FAILED: y is off")


@pytest.mark.parametrize(
    ("kinds", "interrupted", "status"),
    [
        ([], False, 0),
        (["passed", "passed"], False, 0),
        (["passed", "unjudged"], False, EXIT_UNJUDGED),
        (["unjudged"], True, EXIT_INTERRUPTED),
        (["unjudged", "slow"], False, EXIT_FAILED),
        (["passed", "wrong"], True, EXIT_FAILED),
    ],
)
def test_exit_status(kinds, interrupted, status):
    assert exit_status([Verdict(kind) for kind in kinds], interrupted) == status
