import dataclasses

import pytest
from peft_kernels.bench.case import Case
from peft_kernels.bench.gate import EXIT_FAILED, EXIT_UNJUDGED
from peft_kernels.bench.results import ContestantResult, write_json
from peft_kernels.bench.show import main, merge
from peft_kernels.bench.suites import LIMITS


@pytest.fixture
def case_of():
    return lambda m: Case("linear", "nf4_linear", m, 4096, 4096, weight="nf4", suites=("sweep",))


@pytest.fixture
def stored(tmp_path):
    """Stores reports as JSON; returns the paths, as the command line takes them."""

    def stored(*reports):
        paths = [tmp_path / f"{i}.json" for i in range(len(reports))]
        for path, report in zip(paths, reports, strict=True):
            write_json(report, path)
        return [str(path) for path in paths]

    return stored


def test_parts_of_a_run_are_shown_as_one(stored, result_of, report_of, capsys):
    parts = [
        report_of("limits", [result_of(case, threads, bitsandbytes=60.0) for case in LIMITS[0].cases])
        for threads in (1, 2)
    ]
    assert main(stored(*parts)) == 0
    out = capsys.readouterr().out
    assert "limits, 1 thread" in out
    assert "nf4_linear/forward/M1-K4096-N11008/nf4/float32   2 threads" in out
    (line,) = (line.split() for line in out.splitlines() if line.startswith(" forward float32 M=1 "))
    assert line[-6:] == ["50.00x", "6", "of", "6", "reach", "for"]


@pytest.mark.parametrize(
    ("times", "options", "status", "words"),
    [
        ({1: 1.0, 2: 1.5, 4: 2.5}, ["--fail-sweep"], 0, "cost grows with M, without a jump"),
        ({1: 1.0, 2: 3.0, 4: 2.5}, [], 0, "M=2 takes 20.0% more time than M=4"),
        ({1: 1.0, 2: 3.0, 4: 2.5}, ["--fail-sweep"], EXIT_FAILED, "M=2 takes 20.0% more time than M=4"),
        (
            {1: 1.0, 2: None, 4: 2.5},
            ["--fail-sweep"],
            EXIT_UNJUDGED,
            "M2-K4096-N4096/nf4/float32, 1 thread: noisy",
        ),
        ({1: 1.0, 2: None, 4: 2.5}, [], 0, "M2-K4096-N4096/nf4/float32, 1 thread: noisy"),
    ],
)
def test_verdict_on_a_sweep(stored, case_of, result_of, report_of, capsys, times, options, status, words):
    results = []
    for m, ms in times.items():
        result = result_of(case_of(m), ms=ms or 1.0)
        if ms is None:
            noisy = [ContestantResult("peft_kernels", "noisy", "3 of 9 rounds undisturbed, 6 needed")]
            result = dataclasses.replace(result, status="noisy", contestants=noisy)
        results.append(result)
    assert main([*stored(report_of("sweep", results)), *options]) == status
    out = capsys.readouterr().out
    assert words in out
    assert ("without a jump" in out) == (words == "cost grows with M, without a jump")


def test_fail_sweep_judges_other_suites_too(stored, case_of, result_of, report_of, capsys):
    paths = stored(report_of("full", [result_of(case_of(m), ms=ms) for m, ms in ((1, 2.0), (4, 1.0))]))
    assert main(paths) == 0
    assert "M=1 takes" not in capsys.readouterr().out
    assert main([*paths, "--fail-sweep"]) == EXIT_FAILED
    assert "M=1 takes 100.0% more time than M=4" in capsys.readouterr().out


def test_the_gate_is_that_of_the_options(stored, report, capsys):
    assert main(stored(report)) == 0  # though the run was gated at 0.95
    assert main([*stored(report), "--fail-below", "1.9"]) == EXIT_FAILED
    assert "1.800 < 1.9 against eager" in capsys.readouterr().out


def test_a_plot_of_stored_results(stored, case_of, result_of, report_of, tmp_path, capsys):
    path = tmp_path / "plot.svg"
    paths = stored(report_of("sweep", [result_of(case_of(m), ms=m) for m in (1, 2)]))
    assert main([*paths, "--plot", str(path)]) == 0
    assert path.stat().st_size > 5000
    assert f"written: {path}" in capsys.readouterr().out.replace("\n", "")


def test_nothing_to_draw_is_said(stored, case_of, result_of, report_of, tmp_path, capsys):
    noisy = [ContestantResult("peft_kernels", "noisy")]
    results = [result_of(case_of(1)), dataclasses.replace(result_of(case_of(2)), contestants=noisy)]
    assert main([*stored(report_of("sweep", results)), "--plot", str(tmp_path / "plot.png")]) == 0
    assert not (tmp_path / "plot.png").exists()
    assert "nothing to draw" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: dataclasses.replace(r, cases=[]), None),
        (
            lambda r: r,
            "a case must be in one file only, got nf4_linear/forward/M3-K128-N64/nf4/float32 in two",
        ),
        (
            lambda r: dataclasses.replace(r, machine=dataclasses.replace(r.machine, cpu="another")),
            "cpu must be the same in all files, got .*another",
        ),
        (
            lambda r: dataclasses.replace(r, settings=dataclasses.replace(r.settings, suite="full")),
            "suite must be the same in all files, got smoke and full",
        ),
    ],
)
def test_only_parts_of_one_run_go_together(report, change, message):
    if message is None:
        assert merge([report, change(report)]).cases == report.cases
        return
    with pytest.raises(ValueError, match=message):
        merge([report, change(report)])


def test_what_cannot_be_read_is_explained(tmp_path, capsys):
    (tmp_path / "old.json").write_text('{"schema_version": 1}')
    for name, message in (("old.json", "schema_version must be 4, got 1"), ("none.json", "No such file")):
        with pytest.raises(SystemExit) as status:
            main([str(tmp_path / name)])
        assert status.value.code == 2
        assert message in capsys.readouterr().err
