"""Faster, slower, level or not judged."""

import dataclasses

import pytest
from peft_kernels.bench.case import EXACT, NO_DROPOUT, OURS, Case
from peft_kernels.bench.results import ContestantResult
from peft_kernels.bench.standing import Standing, is_rival, scores, standings, stock_outcome

CASE = Case("linear", "nf4_linear", 3, 128, 64, weight="nf4")


@pytest.mark.parametrize(
    ("ratio", "outcome"),
    [(2.0, "faster"), (1.05, "level"), (0.95, "level"), (0.5, "slower"), (None, "unjudged")],
)
def test_a_band_with_1_in_it_is_level(result_of, ratio, outcome):
    result = result_of(CASE, eager=ratio)  # bands of 10 % to both sides
    assert Standing(result, result.contestants[1]).outcome == outcome


@pytest.mark.parametrize(
    ("ratios", "outcome"),
    [
        ({"eager": 2.0, "bitsandbytes": 3.0, "dense": 0.1}, "faster"),
        ({"eager": 2.0, "bitsandbytes": 0.5}, "slower"),
        ({"eager": 0.5, "bitsandbytes": None}, "slower"),
        ({"eager": 2.0, "bitsandbytes": None}, "unjudged"),
        ({"eager": 1.0, "bitsandbytes": None}, "unjudged"),
        ({"eager": 1.0, "bitsandbytes": 2.0}, "level"),
        ({"dense": 2.0}, "unjudged"),
        ({}, "unjudged"),
    ],
)
def test_the_stock_baselines_count_together(result_of, ratios, outcome):
    assert stock_outcome(result_of(CASE, **ratios)) == outcome


def test_a_stock_baseline_that_cannot_run_here_is_left_out(result_of):
    result = result_of(CASE, eager=2.0)
    missing = ContestantResult("bitsandbytes", "missing", "bitsandbytes is not installed")
    result = dataclasses.replace(result, contestants=[*result.contestants, missing])
    assert stock_outcome(result) == "faster"


def test_scores_are_by_baseline_those_that_gate_first(result_of, report_of):
    results = [
        result_of(CASE, dense=0.5, bitsandbytes=4.0, eager=1.0, ours_no_dropout=0.5),
        result_of(CASE, 2, dense=2.0, bitsandbytes=1.0, eager=None),
    ]
    found = scores(standings(report_of("full", results)))
    assert [score.baseline for score in found] == ["eager", "bitsandbytes", "dense"]
    eager, bitsandbytes, dense = found
    assert eager.counts == {"faster": 0, "slower": 0, "level": 1, "unjudged": 1}
    assert bitsandbytes.counts == {"faster": 1, "slower": 0, "level": 1, "unjudged": 0}
    assert dense.counts == {"faster": 1, "slower": 1, "level": 0, "unjudged": 0}
    assert bitsandbytes.mean == pytest.approx(2.0)  # the geometric one
    assert dense.worst == 0.5
    assert not any(map(is_rival, (OURS, EXACT, NO_DROPOUT)))
