import dataclasses

import pytest
from peft_kernels.bench.case import OURS, Case
from peft_kernels.bench.gate import Verdict
from peft_kernels.bench.results import ContestantResult
from peft_kernels.bench.stats import Band
from peft_kernels.bench.sweep import Point, breaks, curves, has_curves, judge_sweep


def case(m, **changes):
    return Case("linear", "nf4_linear", m, 128, 64, **{"weight": "nf4", **changes})


def points(times, width=0.02):
    """Points from M -> ms, with noise bands of a relative width."""
    return [Point(m, Band(ms, ms * (1 - width / 2), ms * (1 + width / 2)), 50.0) for m, ms in times.items()]


@pytest.mark.parametrize(
    "times",
    [
        {1: 1.0, 2: 1.0, 4: 1.0, 8: 2.0},  # memory-bound: more tokens for nothing, then proportional
        {1: 1.0, 2: 2.0, 4: 4.0},
        {1: 1.0, 2: 2.08, 4: 4.3},  # per token 4 % and 3 % more: within what a machine's speed wanders
        {1: 1.01, 2: 1.0},  # 1 % slower, within the bands
        {7: 1.0},
        {},
    ],
)
def test_cost_that_grows_is_no_break(times):
    assert breaks(points(times)) == []


def test_a_call_that_takes_longer_than_one_for_more_tokens():
    # M=6 and M=8 are slower than M=12 (the least of all larger ones), M=4 is not.
    found = breaks(points({4: 1.9, 6: 2.5, 8: 3.0, 12: 2.0, 16: 2.2}))
    assert found == ["M=6 takes 25.0% more time than M=12", "M=8 takes 50.0% more time than M=12"]


def test_every_larger_m_counts_not_only_the_next():
    assert breaks(points({1: 1.5, 2: 1.6, 64: 1.0})) == [
        "M=1 takes 50.0% more time than M=64",
        "M=2 takes 60.0% more time than M=64",
    ]


def test_a_jump_of_the_time_per_token():
    found = breaks(points({4: 1.0, 6: 1.5, 8: 3.0, 16: 6.0}))
    assert found == ["M=8 takes 50.0% more time per token than M=6"]


def test_noise_bands_excuse_what_they_explain():
    slower, jump = {6: 2.2, 8: 2.0}, {4: 1.0, 8: 2.3}
    assert len(breaks(points(slower))) == len(breaks(points(jump))) == 1
    assert breaks(points(slower, width=0.2)) == breaks(points(jump, width=0.2)) == []


def test_curves_are_of_one_problem_thread_count_and_contestant(result_of, report_of):
    results = [
        result_of(case(m, direction=direction), threads, ms=m, dense=2.0)
        for m in (8, 2, 4)
        for direction in ("forward", "backward")
        for threads in (1, 2)
    ]
    results.append(result_of(case(2, dtype="bfloat16")))  # one M is no curve
    results.append(result_of(dataclasses.replace(case(16), suites=("sweep",), against=("dense",))))
    found = curves(report_of("full", results))
    keys = {(curve.problem.direction, curve.threads, curve.contestant) for curve in found}
    assert keys == {(d, t, c) for d in ("forward", "backward") for t in (1, 2) for c in (OURS, "dense")}
    assert len(found) == len(keys)
    by_key = {(curve.problem.direction, curve.threads, curve.contestant): curve for curve in found}
    ours = by_key["forward", 1, OURS].points
    assert [(point.size, point.ms.median) for point in ours] == [(2, 2), (4, 4), (8, 8), (16, 1.0)]
    assert [point.ms.median for point in by_key["backward", 2, "dense"].points] == [4, 8, 16]


def test_curves_over_ranks(result_of, report_of):
    results = [result_of(case(m, r=r), ms=m * r, dense=2.0) for m in (1, 2) for r in (64, 4)]
    results.append(result_of(case(1), ms=0.5))  # no rank, no place on a logarithmic axis
    found = curves(report_of("full", results), over="r")
    assert {(curve.problem.m, curve.problem.r, curve.contestant) for curve in found} == {
        (m, 0, contestant) for m in (1, 2) for contestant in (OURS, "dense")
    }
    assert [(point.size, point.ms.median) for point in found[0].points] == [(4, 4.0), (64, 64.0)]


def test_has_curves():
    assert has_curves([case(1), case(1, direction="backward"), case(2)])
    assert not has_curves([case(1), case(1), case(2, direction="backward")])  # the same at two thread counts


def test_only_ours_is_judged(result_of, report_of):
    falling = [result_of(case(m), ms=1.0, dense=ratio) for m, ratio in ((1, 3.0), (2, 2.0))]
    assert judge_sweep(report_of("sweep", falling)) == []
    falling[0] = result_of(case(1), threads=1, ms=1.5)
    assert judge_sweep(report_of("sweep", falling)) == [
        Verdict(
            "slow", "nf4_linear/forward/K128-N64/nf4/float32, 1 thread: M=1 takes 50.0% more time than M=2"
        )
    ]


def test_an_m_without_a_time_is_not_passed_over(result_of, report_of):
    noisy = dataclasses.replace(
        result_of(case(4)), status="noisy", contestants=[ContestantResult(OURS, "noisy", "6 needed")]
    )
    (verdict,) = judge_sweep(report_of("sweep", [result_of(case(1)), noisy, result_of(case(8), ms=2.0)]))
    assert verdict == Verdict("unjudged", "nf4_linear/forward/M4-K128-N64/nf4/float32, 1 thread: noisy")
