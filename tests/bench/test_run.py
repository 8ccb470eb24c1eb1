import dataclasses
import io

import pytest
import torch
from peft_kernels.bench import baselines, memory
from peft_kernels.bench.case import BASELINES, GATE_BASELINES, OURS, Case
from peft_kernels.bench.gate import gate_of, judge
from peft_kernels.bench.measure import Budget
from peft_kernels.bench.registry import FAMILIES, SUITES, select
from peft_kernels.bench.report import case_view
from peft_kernels.bench.results import ContestantResult
from peft_kernels.bench.roofline import Roofline
from peft_kernels.bench.run import CaseRunner, _rate
from peft_kernels.bench.stats import Band, Sample
from peft_kernels.bench.worker import Workers
from rich.console import Console

from peft_kernels import functional

CASE = Case("linear", "nf4_linear", 3, 128, 64, weight="nf4")
QLORA = Case(
    "linear", "nf4_lora_linear", 3, 128, 64, r=4, weight="nf4_double", direction="both", dropout=0.25
)
LOCAL = ("eager", "bitsandbytes", "peft", "dense")


@pytest.fixture
def run(monkeypatch):
    """Run a case in this process alone, for as short a time as it goes."""
    monkeypatch.setattr(memory, "can_measure_scratch", lambda: False)

    def run(case, names=LOCAL):
        with Workers() as workers:
            roofline = Roofline(1, 10.0, 10.0, {"float32": 100.0})
            return CaseRunner(names, Budget(0.0, 0.0), 0, workers, {1: roofline}).run(case, threads=1)

    return run


def printed(result):
    console = Console(width=200, file=io.StringIO())
    console.print(case_view(result))
    return console.file.getvalue()


@pytest.mark.filterwarnings("default")  # of the libraries compared with
@pytest.mark.parametrize(
    "case", [*select("smoke"), dataclasses.replace(QLORA, direction="backward")], ids=lambda case: case.name
)
def test_every_contestant_computes_the_same(run, case):
    result = run(case)
    assert result.status != "failed", result.contestants[0].reason
    for contestant in result.contestants:
        assert contestant.status in ("measured", "noisy", "missing")
        assert contestant.status == "missing" or contestant.tolerance_used <= 1


def test_saved_for_backward_is_x_and_u_and_the_seed(run):
    ours = run(QLORA, names=()).contestants[0]
    assert ours.saved_bytes == 4 * (3 * 128 + 3 * 4) + 8


def test_red_check_hides_speed(run, monkeypatch):
    right = functional.nf4_linear
    monkeypatch.setattr(functional, "nf4_linear", lambda x, w: right(x, w) * 1.001)
    result = run(CASE)
    assert result.status == "failed"
    assert result.gate is None
    assert all(contestant.measurement is None for contestant in result.contestants)
    text = printed(result)
    assert "peft_kernels: FAILED: y is off by" in text
    assert "rounds" not in text.split("FAILED")[1]
    assert judge(result, None).kind == "wrong"  # with or without --fail-below


def test_a_result_of_nan_is_red(run, monkeypatch):
    monkeypatch.setattr(functional, "nf4_linear", lambda x, w: torch.full((3, 64), torch.nan))
    result = run(CASE)
    assert result.status == "failed"
    assert result.contestants[0].error is None  # JSON has no NaN


def test_a_missing_library_is_reported(run, monkeypatch):
    def require(module):
        raise baselines.Unavailable(f"{module} is not installed")

    monkeypatch.setattr(baselines, "require", require)
    result = run(CASE, names=("eager", "bitsandbytes"))
    missing = result.contestants[2]
    assert (missing.name, missing.status) == ("bitsandbytes", "missing")
    assert "bitsandbytes*: missing: bitsandbytes is not installed" in printed(result)


def rounds(seconds, share=1.0):
    return [Sample(s, s * share, 1) for s in seconds]


def rated(**contestants):
    results = {name: ContestantResult(name, "measured") for name in contestants}
    prepared = type("Prepared", (), {"read_bytes": 6_000_000, "write_bytes": 4_000_000, "flops": 2_000_000})
    return _rate(results, contestants, 1, prepared, roofline_ms=5.0)


def test_rates_follow_from_the_median():
    ours = rated(**{OURS: rounds([0.01] * 6)})[OURS].measurement
    assert ours.ms.median == pytest.approx(10.0)
    assert ours.gb_s == pytest.approx(1.0)
    assert ours.gflop_s == pytest.approx(0.2)
    assert ours.roofline_percent == pytest.approx(50.0)


def test_disturbed_rounds_are_dropped_and_counted():
    disturbed = rounds([0.5] * 2, share=0.3)
    results = rated(**{OURS: rounds([0.01] * 8), "eager": rounds([0.02] * 6) + disturbed})
    eager = results["eager"].measurement
    assert (eager.rounds, eager.dropped) == (6, 2)
    assert eager.ratio == Band(*[pytest.approx(2.0)] * 3)


def test_too_few_undisturbed_rounds_give_no_speed():
    results = rated(**{OURS: rounds([0.01] * 8), "eager": rounds([0.02] * 5) + rounds([0.02] * 3, share=0.3)})
    assert results["eager"].status == "noisy"
    assert results["eager"].measurement is None
    assert gate_of(results.values()) is None  # eager may have been the one to lose against


@pytest.mark.parametrize("suite", SUITES)
def test_suites_have_unique_names_and_something_to_gate_on(suite):
    cases = select(suite)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = FAMILIES[case.family].baselines(case)
        assert set(names) <= set(BASELINES)
        assert set(names) & set(GATE_BASELINES)


def test_selection():
    assert {case.family for case in select("full", ["dropout"])} == {"dropout"}
    assert all("M64-" in case.name for case in select("full", pattern="*M64-*"))
    with pytest.raises(ValueError, match="family must be one of nf4, linear, int8, dropout, got dora"):
        select("full", ["dora"])
    with pytest.raises(ValueError, match="suite must be one of smoke, quick, full, got all"):
        select("all")
