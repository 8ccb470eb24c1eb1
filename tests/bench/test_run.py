import dataclasses
import io

import pytest
import torch
from peft_kernels.bench import baselines, cases_linear, memory
from peft_kernels.bench import run as runner
from peft_kernels.bench.case import (
    BASELINES,
    GATE_BASELINES,
    GPU_BASELINES,
    NO_DROPOUT,
    OURS,
    OURS_LORA,
    OWN_VARIANTS,
    PLAIN_SCALES,
    TUNED_SUFFIX,
    Case,
)
from peft_kernels.bench.gate import gate_of, judge
from peft_kernels.bench.measure import Budget
from peft_kernels.bench.oracle import compare
from peft_kernels.bench.rating import Work, over_passes, passes_of, rate
from peft_kernels.bench.registry import FAMILIES, SUITES, default_baselines, prepare, select
from peft_kernels.bench.report import case_view
from peft_kernels.bench.results import ContestantResult
from peft_kernels.bench.roofline import Roofline
from peft_kernels.bench.run import CaseRunner
from peft_kernels.bench.stats import Band, Sample
from peft_kernels.bench.suites import LIMITS, LIMITS_SHAPES
from peft_kernels.bench.worker import Workers
from rich.console import Console

from peft_kernels import functional

CASE = Case("linear", "nf4_linear", 3, 128, 64, weight="nf4")
QLORA = Case(
    "linear", "nf4_lora_linear", 3, 128, 64, r=4, weight="nf4_double", direction="both", dropout=0.25
)
DORA = Case("dora", "dora_linear", 3, 128, 64, r=4, weight="nf4_double", direction="both")
LOCAL = ("eager", "bitsandbytes", "peft", "dense", *OWN_VARIANTS)


@pytest.fixture
def run_passes(monkeypatch):
    """Run a case in this process alone, for as short a time as it goes; the result after every pass."""
    monkeypatch.setattr(memory, "can_measure_scratch", lambda: False)

    def run_passes(case, names, passes):
        with Workers() as workers:
            roofline = Roofline(1, 10.0, 10.0, {"float32": 100.0})
            case_runner = CaseRunner(names, Budget(0.0, 0.0), 0, workers, {1: roofline})
            results = [None]
            for _ in range(passes):
                results.append(case_runner.run(case, 1, results[-1]))
            return results[1:]

    return run_passes


@pytest.fixture
def run(run_passes):
    return lambda case, names=LOCAL: run_passes(case, names, passes=1)[0]


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


def test_dropout_saves_its_seed_and_double_quantisation_nothing(run):
    ours, without, plain = run(QLORA, names=(NO_DROPOUT, PLAIN_SCALES)).contestants
    assert (without.name, plain.name) == (NO_DROPOUT, PLAIN_SCALES)
    assert ours.saved_bytes - without.saved_bytes == 8
    assert plain.saved_bytes == ours.saved_bytes


@pytest.mark.parametrize(
    ("case", "variant"), [(QLORA, NO_DROPOUT), (QLORA, PLAIN_SCALES), (DORA, OURS_LORA)], ids=str
)
def test_variants_of_ours_share_no_memory_with_it(case, variant):
    """Or one would find in cache what the other has just read."""
    prepared = prepare(case)
    ours, other = (
        {
            tensor.data_ptr()
            for tensor in prepared.contestants[name]()[0].frozen
            if tensor.dtype == torch.uint8
        }
        for name in (OURS, variant)
    )
    assert ours
    assert other
    assert not ours & other


def test_plain_scales_are_plain():
    programs = prepare(QLORA).contestants[PLAIN_SCALES]()
    packed, _, *absmax = programs[0].frozen[:-2]  # and A and B
    assert packed.dtype == torch.uint8
    assert [scale.dtype for scale in absmax] == [torch.float32]


def test_thread_counts_of_a_case_share_its_tensors(monkeypatch):
    made = []
    monkeypatch.setattr(memory, "can_measure_scratch", lambda: False)
    monkeypatch.setattr(runner, "prepare", lambda case: made.append(case) or prepare(case))
    other = dataclasses.replace(CASE, m=2)
    with Workers() as workers:
        roofline = Roofline(1, 10.0, 10.0, {"float32": 100.0})
        case_runner = CaseRunner((), Budget(0.0, 0.0), 0, workers, {1: roofline, 2: roofline})
        results = [case_runner.run(case, threads) for case in (CASE, other, CASE) for threads in (1, 2)]
    assert made == [CASE, other, CASE]
    assert [(result.case, result.threads) for result in results[:3]] == [(CASE, 1), (CASE, 2), (other, 1)]
    assert all(result.contestants[0].tolerance_used <= 1 for result in results)


@pytest.mark.parametrize(("of_all", "names"), [(True, [OURS, "eager"]), (False, [OURS])])
def test_scratch_of_baselines_is_measured_where_it_is_wanted(monkeypatch, of_all, names):
    asked = []

    class Child:
        def request(self, what, case, names, threads):
            asked.append((what, names))
            return dict.fromkeys(names, 4096)

    workers = Workers()
    monkeypatch.setattr(workers, "memory", lambda: Child())
    roofline = Roofline(1, 10.0, 10.0, {"float32": 100.0})
    case_runner = CaseRunner(("eager",), Budget(0.0, 0.0), 0, workers, {1: roofline}, scratch_of_all=of_all)
    result = case_runner.run(CASE, threads=1)
    assert asked == [("scratch", names)]
    assert [c.name for c in result.contestants if c.scratch_bytes == 4096] == names


@pytest.mark.parametrize(("direction", "result"), [("forward", "y"), ("backward", "dx")])
def test_the_check_knows_where_the_weight_is_rounded(monkeypatch, direction, result):
    case = dataclasses.replace(CASE, dtype="bfloat16", direction=direction)
    tolerances = {}
    for planned in ("fp32 panels", "bf16 panels"):

        def method(product, tokens, *, backward=False, planned=planned):
            assert (product.in_features, product.blocksize, tokens) == (128, 64, 3)
            return planned if backward == (direction == "backward") else "look-up GEMV"

        monkeypatch.setattr(cases_linear, "method", method)
        tolerances[planned] = prepare(case).oracle(OURS).tolerances[result]
    assert (tolerances["bf16 panels"] > tolerances["fp32 panels"]).all()


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


WORK = Work(moved_bytes=10_000_000, flops=2_000_000, roofline_ms=5.0)


def rated(**contestants):
    passes = passes_of(contestants, threads=1)
    return {name: rate(ContestantResult(name, "measured"), [each], WORK) for name, each in passes.items()}


def test_rates_follow_from_the_median():
    ours = rated(**{OURS: rounds([0.01] * 6)})[OURS].measurement
    assert ours.ms.median == pytest.approx(10.0)
    assert ours.gb_s == pytest.approx(1.0)
    assert ours.gflop_s == pytest.approx(0.2)
    assert ours.roofline_percent == pytest.approx(50.0)


def test_page_faults_are_the_median_of_a_call():
    samples = [Sample(0.02, 0.02, 2, faults) for faults in (7, 4, 4, 900, 4, 6)]
    assert rated(**{OURS: samples})[OURS].measurement.page_faults == 2.5


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


def test_a_band_holds_the_bands_of_all_passes():
    bands = [Band(1.0, 0.98, 1.02), Band(1.1, 1.09, 1.11), Band(1.01, 1.0, 1.05)]
    assert over_passes(bands) == Band(1.01, 0.98, 1.11)
    assert over_passes(bands[:1]) == bands[0]


def test_another_pass_is_added_and_checks_nothing_again(run_passes, monkeypatch):
    times = iter([[0.010] * 6, [0.012] * 6])
    checked = []
    monkeypatch.setattr(
        runner, "interleave", lambda _, *rest: {OURS: rounds(next(times)), "eager": rounds([0.02] * 6)}
    )
    monkeypatch.setattr(runner, "compare", lambda *pair: checked.append(pair) or compare(*pair))
    first, second = run_passes(CASE, ("eager",), passes=2)
    assert len(checked) == 2  # ours and eager, once
    ours, eager = (each.measurement for each in second.contestants)
    assert (len(ours.passes), len(eager.passes), ours.rounds) == (2, 2, 12)
    assert ours.ms == Band(*map(pytest.approx, (11.0, 10.0, 12.0)))
    assert eager.ratio == Band(*map(pytest.approx, ((2.0 + 5 / 3) / 2, 5 / 3, 2.0)))
    assert [each.error for each in second.contestants] == [each.error for each in first.contestants]
    assert second.seconds > first.seconds


def test_a_pass_without_enough_rounds_spoils_no_other():
    good, bad = (passes_of({OURS: rounds([0.01] * 8, share)}, threads=1)[OURS] for share in (1.0, 0.3))
    result = rate(ContestantResult(OURS, "measured"), [bad, good], WORK)
    assert result.status == "measured"
    assert result.measurement.ms.median == pytest.approx(10.0)
    assert (result.measurement.rounds, result.measurement.dropped) == (8, 8)
    assert rate(result, [bad, bad], WORK).reason == "0 of 16 rounds undisturbed, 6 needed"
    few = passes_of({OURS: rounds([0.01] * 4)}, threads=1)[OURS]
    assert rate(result, [few], WORK).status == "noisy"
    assert rate(result, [few, few], WORK).measurement.rounds == 8  # enough together


@pytest.mark.parametrize("suite", SUITES)
def test_suites_have_unique_names_and_something_to_gate_on(suite):
    cases = select(suite)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = FAMILIES[case.family].baselines(case)
        assert set(names) <= set(BASELINES)
        assert set(names) & set(GATE_BASELINES)


def test_sweep_has_every_m_in_both_directions_and_dtypes():
    cases = select("sweep")
    tokens = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096]
    curves = {(case.direction, case.dtype) for case in cases}
    assert curves == {(d, t) for d in ("forward", "backward") for t in ("float32", "bfloat16")}
    for curve in curves:
        assert [case.m for case in cases if (case.direction, case.dtype) == curve] == tokens
    assert {(case.k, case.n, case.weight, case.r) for case in cases} == {(4096, 4096, "nf4", 0)}
    assert default_baselines("sweep") == ["dense"]


def test_limits_measures_what_has_a_figure_and_no_more():
    cases = select("limits")
    assert len(cases) == len(LIMITS) * len(LIMITS_SHAPES)
    for case in cases:
        names = FAMILIES[case.family].baselines(case)
        assert set(case.against) <= set(names), f"{case.name} has figures against what cannot be measured"
        assert set(case.against) <= set(default_baselines("limits"))
        assert runner.baselines(case) == tuple(name for name in names if name in case.against)
    assert not {"eager", "compile", "peft" + TUNED_SUFFIX} & set(default_baselines("limits"))


def test_only_the_full_suite_compiles_and_takes_ours_apart():
    everywhere = set(BASELINES) - set(GPU_BASELINES)
    assert set(default_baselines("full")) == everywhere
    costly = {"compile", "bitsandbytes" + TUNED_SUFFIX, "peft" + TUNED_SUFFIX}
    assert everywhere - set(default_baselines("quick")) == costly | set(OWN_VARIANTS)


def test_selection():
    assert {case.family for case in select("full", ["dropout"])} == {"dropout"}
    assert all("M64-" in case.name for case in select("full", pattern="*M64-*"))
    families = "nf4, linear, int8, dora, ia3, adapter, dropout, model"
    with pytest.raises(ValueError, match=f"family must be one of {families}, got fusion"):
        select("full", ["fusion"])
    with pytest.raises(
        ValueError, match="suite must be one of smoke, quick, full, sweep, limits, methods, gpu, got all"
    ):
        select("all")
