"""--compare and --fail-regression: which changes are noise, which are not."""

import dataclasses
import json

import pytest
from peft_kernels.bench import __main__ as command_line
from peft_kernels.bench.__main__ import main
from peft_kernels.bench.case import NO_DROPOUT, Case
from peft_kernels.bench.compare import compare_runs, judge_regressions
from peft_kernels.bench.gate import EXIT_FAILED, EXIT_UNJUDGED
from peft_kernels.bench.results import read_json, write_json
from peft_kernels.bench.roofline import Roofline
from peft_kernels.bench.run import CaseRunner
from peft_kernels.bench.stats import Band

CASE = Case("linear", "nf4_linear", 3, 128, 64, weight="nf4", suites=("smoke",))
OTHER = dataclasses.replace(CASE, m=4)


def within(result, **bands):
    """The result with the ratio's bands widened: baseline -> relative half width."""
    contestants = []
    for each in result.contestants:
        if half := bands.get(each.name):
            median = each.measurement.ratio.median
            ratio = Band(median, median * (1 - half), median * (1 + half))
            each = dataclasses.replace(each, measurement=dataclasses.replace(each.measurement, ratio=ratio))
        contestants.append(each)
    return dataclasses.replace(result, contestants=contestants)


@pytest.fixture
def compared(result_of, report_of):
    """Compare two results of one case: the old ratios, the new ones, and the half width of all bands."""

    def compared(old, new, half=0.03, **options):
        runs = [
            report_of("smoke", [within(result_of(CASE, **ratios, **options), **dict.fromkeys(ratios, half))])
            for ratios in (new, old)
        ]
        return compare_runs(*runs)

    return compared


@pytest.mark.parametrize(
    ("ratio", "half", "verdict", "judged"),
    [
        (2.0, 0.03, "same", []),
        (2.0 / 1.2, 0.03, "slower", ["slow"]),  # 20 % more time, bands of +-3 %
        (2.0 / 1.2, 0.08, "slower", ["slow"]),
        (2.0 / 1.2, 0.12, "same", ["unjudged"]),  # noise explains it; so might a slower kernel
        (2.0 / 1.09, 0.03, "slower", []),  # certainly slower, but not by 10 %
        (2.0 / 1.04, 0.03, "same", []),
        (2.0, 0.2, "same", []),
        (2.0 * 1.2, 0.03, "faster", []),
    ],
)
def test_a_change_counts_where_it_is_large_and_certain(compared, ratio, half, verdict, judged):
    comparison = compared({"eager": 2.0}, {"eager": ratio}, half)
    (change,) = comparison.changes
    assert change.verdict == verdict
    assert change.yardstick == "eager"
    assert change.time.median == pytest.approx(2.0 / ratio)
    assert change.time.low == pytest.approx(2.0 / ratio * (1 - half) / (1 + half))
    assert change.time.high == pytest.approx(2.0 / ratio * (1 + half) / (1 - half))
    assert [each.kind for each in judge_regressions(comparison, 0.1)] == judged


def test_a_slow_machine_is_not_a_slow_kernel(result_of, report_of):
    old, new = (report_of("smoke", [result_of(CASE, ms=ms, eager=2.0)]) for ms in (1.0, 1.7))
    (change,) = compare_runs(new, old).changes
    assert change.verdict == "same"
    assert change.time.median == pytest.approx(1.0)


def test_the_middle_yardstick_counts(compared):
    """One library that took its time in one of the runs does not make ours slow."""
    comparison = compared(
        {"eager": 2.0, "bitsandbytes": 3.0, "dense": 1.5}, {"eager": 2.0, "bitsandbytes": 2.0, "dense": 1.6}
    )
    (change,) = comparison.changes
    assert (change.yardstick, change.verdict) == ("eager", "same")


def test_variants_of_ours_and_baselines_of_one_pass_are_no_yardsticks(compared, result_of, report_of):
    comparison = compared({NO_DROPOUT.replace("-", "_"): 0.95}, {NO_DROPOUT.replace("-", "_"): 0.95})
    assert comparison.changes == []
    assert comparison.unjudged == [f"{CASE.name}, 1 thread"]
    result = result_of(CASE, eager=2.0, dense=2.0)
    twice = [
        dataclasses.replace(
            each, measurement=dataclasses.replace(each.measurement, passes=each.measurement.passes * count)
        )
        for each, count in zip(result.contestants, (2, 1, 2), strict=True)
    ]
    report = report_of("smoke", [dataclasses.replace(result, contestants=twice)])
    (change,) = compare_runs(report, report).changes
    assert change.yardstick == "dense"


@pytest.mark.parametrize(
    ("rounds", "counts"),
    [((9, 9, 9), True), ((9, 2, 9), True), ((9, 2, 0), False), ((5, 5, 5), True)],  # the last: pooled
)
def test_the_band_of_a_single_pass_is_too_narrow_to_compare_with(result_of, report_of, rounds, counts):
    result = result_of(CASE, eager=2.0)
    ours, eager = result.contestants
    one = eager.measurement.passes[0]
    passes = [dataclasses.replace(one, samples_ms=[2.0] * n, ratios=[2.0] * n, rounds=9) for n in rounds]
    contestants = [
        dataclasses.replace(each, measurement=dataclasses.replace(each.measurement, passes=passes))
        for each in (ours, eager)
    ]
    report = report_of("smoke", [dataclasses.replace(result, contestants=contestants)])
    assert len(compare_runs(report, report).changes) == counts


def test_two_clocks_are_not_compared(result_of, report_of):
    launches, graphs = (
        report_of("smoke", [dataclasses.replace(result_of(CASE, eager=2.0), clock=clock)])
        for clock in ("launches", "CUDA graphs")
    )
    assert compare_runs(launches, graphs).unjudged == [f"{CASE.name}, 1 thread"]
    assert len(compare_runs(graphs, graphs).changes) == 1


@pytest.mark.parametrize("fact", ["cpu", "native_capability"])
def test_runs_of_two_machines_are_not_judged(result_of, report_of, fact):
    old = report_of("smoke", [result_of(CASE, eager=2.0)])
    new = dataclasses.replace(old, machine=dataclasses.replace(old.machine, **{fact: "another"}))
    comparison = compare_runs(new, old)
    assert comparison.changes == []
    assert comparison.differences == [f"{fact} was {getattr(old.machine, fact)}, is another"]
    assert [each.kind for each in judge_regressions(comparison, 0.1)] == ["unjudged"]


def test_runs_with_two_versions_of_a_yardstick_are_not_judged(result_of, report_of):
    old = report_of("smoke", [result_of(CASE, eager=2.0)])
    assert {"torch", "bitsandbytes", "peft", "transformers", "adapters"} <= old.machine.versions.keys()
    for library in ("torch", "transformers"):
        versions = old.machine.versions | {library: "2.99", "python": "3.99"}
        new = dataclasses.replace(old, machine=dataclasses.replace(old.machine, versions=versions))
        was = old.machine.versions[library]
        assert compare_runs(new, old).differences == [f"{library} was {was}, is 2.99"]


def test_a_change_that_noise_may_explain_ends_with_the_status_of_the_unjudged(pretended, tmp_path, capsys):
    old = tmp_path / "old.json"
    assert main([*ARGUMENTS, "--json", str(old)]) == 0
    pretended.update(eager=2.0 / 1.2, half=0.25)
    arguments = [*ARGUMENTS, "--compare", str(old), "--fail-regression"]
    assert main([*arguments, "10%"]) == EXIT_UNJUDGED
    assert f"too noisy to judge: {CASE.name}, 1 thread: +20.0 % time" in capsys.readouterr().out
    assert main([*arguments, "30%"]) == 0


def test_cases_in_one_run_only_are_named(result_of, report_of):
    old, new = (report_of("smoke", [result_of(case, eager=2.0)]) for case in (CASE, OTHER))
    comparison = compare_runs(new, old)
    assert comparison.added == [f"{OTHER.name}, 1 thread"]
    assert comparison.removed == [f"{CASE.name}, 1 thread"]
    assert [each.text for each in judge_regressions(comparison, 0.1)] == ["no case is in both runs"]


def test_a_case_without_a_time_is_not_judged(result_of, report_of):
    old = report_of("smoke", [result_of(CASE, eager=2.0)])
    (result,) = old.cases
    noisy = dataclasses.replace(result.contestants[0], status="noisy", measurement=None)
    new = report_of("smoke", [dataclasses.replace(result, contestants=[noisy])])
    comparison = compare_runs(new, old)
    assert comparison.unjudged == [f"{CASE.name}, 1 thread"]
    assert [each.kind for each in judge_regressions(comparison, 0.1)] == ["unjudged"]


@pytest.fixture
def pretended(monkeypatch, result_of):
    """Runs whose every ratio is what the test says, without measuring."""
    ratios = {"eager": 2.0, "half": 0.02}

    def run(self, case, threads, earlier=None):
        return within(result_of(case, threads, eager=ratios["eager"]), eager=ratios["half"])

    monkeypatch.setattr(CaseRunner, "run", run)
    monkeypatch.setattr(command_line, "measure_roofline", lambda threads, dtypes: Roofline(threads, 1, 1, {}))
    return ratios


ARGUMENTS = ["--suite", "smoke", "--filter", "nf4_linear/*"]


@pytest.mark.parametrize(
    ("ratio", "status", "words"),
    [
        (2.0, 0, "none slower by more than 10% beyond noise"),
        (2.0 / 1.2, EXIT_FAILED, "+20.0 % time [+15.3 %, +24.9 %] against eager"),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_the_command_line_compares_and_fails(pretended, tmp_path, capsys, ratio, status, words, stored):
    from peft_kernels.bench.show import main as show

    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert main([*ARGUMENTS, "--json", str(old)]) == 0
    pretended["eager"] = ratio
    verdict = ["--compare", str(old), "--fail-regression", "10%"]
    if stored:
        assert main([*ARGUMENTS, "--json", str(new)]) == 0
        capsys.readouterr()
        assert show([str(new), *verdict]) == status
    else:
        capsys.readouterr()
        assert main([*ARGUMENTS, *verdict]) == status
    assert words in capsys.readouterr().out


def test_another_machine_ends_with_the_status_of_the_unjudged(pretended, tmp_path, capsys):
    old = tmp_path / "old.json"
    main([*ARGUMENTS, "--json", str(old)])
    content = json.loads(old.read_text())
    content["machine"]["cpu"] = "abacus"
    old.write_text(json.dumps(content))
    assert main([*ARGUMENTS, "--compare", str(old), "--fail-regression", "0.1"]) == EXIT_UNJUDGED
    assert "not comparable: cpu was abacus, is " in capsys.readouterr().out


def test_the_old_run_is_read_before_it_is_written_over(pretended, tmp_path, capsys):
    path = tmp_path / "results.json"
    main([*ARGUMENTS, "--json", str(path)])
    pretended["eager"] = 1.0
    same_file = ["--json", str(path), "--compare", str(path), "--fail-regression", "10%"]
    assert main([*ARGUMENTS, *same_file]) == EXIT_FAILED
    assert read_json(path).cases[0].contestants[1].measurement.ratio.median == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-regression", "10%"], "--fail-regression must come with --compare OLD.json"),
        (["--compare", "nowhere.json"], "nowhere.json"),
        (
            ["--compare", "{report}", "--fail-regression", "ten"],
            "must be a share such as 10% or 0.1, got ten",
        ),
        (["--compare", "{report}", "--fail-regression", "5"], "must be a share such as 10% or 0.1, got 5"),
        (["--compare", "{report}", "--fail-regression=-5%"], "must be a share such as 10% or 0.1, got -5%"),
        (
            ["--json", "nowhere/results.json"],
            "files must be in a folder that exists, got nowhere/results.json",
        ),
    ],
)
def test_bad_options_are_explained(tmp_path, report, capsys, arguments, message):
    path = tmp_path / "report.json"
    write_json(report, path)
    with pytest.raises(SystemExit) as status:
        main([each.format(report=path) for each in arguments])
    assert status.value.code == 2
    assert message in capsys.readouterr().err
