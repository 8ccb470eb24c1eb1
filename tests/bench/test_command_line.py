import sys

import pytest
from peft_kernels.bench import __main__ as command_line
from peft_kernels.bench import memory
from peft_kernels.bench.__main__ import main
from peft_kernels.bench.gate import EXIT_FAILED, EXIT_INTERRUPTED
from peft_kernels.bench.registry import select
from peft_kernels.bench.results import read_json
from peft_kernels.bench.roofline import Roofline
from peft_kernels.bench.run import CaseRunner

from peft_kernels import functional

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries compared with
TINY = ["--suite", "smoke", "--filter", "nf4_linear/*", "--seconds", "0.02"]


@pytest.fixture
def alone(monkeypatch):
    """No child processes: they take seconds to start."""
    monkeypatch.setattr(memory, "can_measure_scratch", lambda: False)


@pytest.mark.slow
def test_a_run_end_to_end_with_its_child_processes(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main([*TINY, "--baseline", "eager,bitsandbytes,bitsandbytes-tuned", "--json", str(path)]) == 0
    report = read_json(path)
    (result,) = report.cases
    assert result.name == "nf4_linear/forward/M3-K128-N64/nf4/float32"
    assert not report.interrupted
    contestants = {contestant.name: contestant for contestant in result.contestants}
    assert list(contestants) == ["peft_kernels", "eager", "bitsandbytes", "bitsandbytes-tuned"]
    if memory.can_measure_scratch():
        assert 128 * 64 * 4 <= contestants["eager"].scratch_bytes < 2**20  # a dense weight and its index
    assert contestants["peft_kernels"].error < 1e-5
    out = capsys.readouterr().out
    assert "read " in out
    assert result.name in out


@pytest.mark.parametrize(
    ("fail_below", "status", "words"),
    [
        ("1.7", 0, "all 1 at or above 1.7"),
        (
            "1.9",
            EXIT_FAILED,
            "nf4_linear/forward/M3-K128-N64/nf4/float32, 1 thread: 1.800 < 1.9 against eager",
        ),
    ],
)
def test_exit_status_of_the_gate(monkeypatch, capsys, report, fail_below, status, words):
    monkeypatch.setattr(CaseRunner, "run", lambda self, case, threads, earlier: report.cases[0])
    assert main([*TINY, "--fail-below", fail_below]) == status
    assert words in capsys.readouterr().out


def test_a_wrong_result_fails_the_run(alone, monkeypatch, capsys):
    right = functional.nf4_linear
    monkeypatch.setattr(functional, "nf4_linear", lambda x, w: -right(x, w))
    assert main([*TINY, "--baseline", "eager"]) == EXIT_FAILED
    assert "FAILED: y is off by" in capsys.readouterr().out


def test_interrupting_keeps_what_is_done(alone, monkeypatch, tmp_path, capsys):
    run, path = CaseRunner.run, tmp_path / "report.json"

    def run_once(self, case, threads, earlier):
        if case.op != "nf4_quantize":
            raise KeyboardInterrupt
        return run(self, case, threads, earlier)

    monkeypatch.setattr(CaseRunner, "run", run_once)
    arguments = ["--suite", "smoke", "--baseline", "eager", "--seconds", "0.02", "--json", str(path)]
    assert main(arguments) == EXIT_INTERRUPTED
    report = read_json(path)
    assert report.interrupted
    assert [result.case.op for result in report.cases] == ["nf4_quantize"]
    assert f"interrupted: 1 of {len(select('smoke'))} cases" in capsys.readouterr().out


def test_interrupting_before_the_first_result_keeps_the_files_of_an_earlier_run(
    monkeypatch, tmp_path, capsys
):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "measure_roofline", interrupted)
    files = [tmp_path / "results.json", tmp_path / "report.html"]
    for path in files:
        path.write_text("earlier")
    assert main([*TINY, "--json", str(files[0]), "--html", str(files[1])]) == EXIT_INTERRUPTED
    assert [path.read_text() for path in files] == ["earlier"] * 2
    assert "no case has a result: nothing is written" in capsys.readouterr().out


@pytest.fixture
def pretended(monkeypatch, result_of):
    """Runs without measuring; returns the cases, thread counts and runners of them."""
    ran = []

    def run(self, case, threads, earlier=None):
        ran.append((case, threads, self))
        slow = case.m == 2  # takes 1.5 times as long as M = 3
        return result_of(case, threads, ms=6.0 if slow else 1.0 + case.m, dense=2.0)

    monkeypatch.setattr(CaseRunner, "run", run)
    monkeypatch.setattr(command_line, "measure_roofline", lambda threads, dtypes: Roofline(threads, 1, 1, {}))
    return ran


SWEEP = ["--suite", "sweep", "--filter", "*/forward/M[1-4]-*/float32"]


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--fail-sweep"], EXIT_FAILED)])
def test_a_sweep_has_a_verdict_and_a_plot(pretended, tmp_path, capsys, options, status):
    plot, path = tmp_path / "plot.png", tmp_path / "report.json"
    assert main([*SWEEP, "--plot", str(plot), "--json", str(path), *options]) == status
    out = capsys.readouterr().out
    assert "nf4/float32, 1 thread: M=2 takes 50.0% more time than M=3" in out
    assert plot.stat().st_size > 5000
    assert read_json(path).settings.fail_sweep == bool(options)
    assert [(case.m, threads) for case, threads, _ in pretended] == [(1, 1), (2, 1), (3, 1), (4, 1)]


def test_a_sweep_without_a_break_passes(pretended, capsys):
    assert main(["--suite", "sweep", "--filter", "*/M[134]-*/bfloat16", "--fail-sweep"]) == 0
    assert "cost grows with M, without a jump" in capsys.readouterr().out


def test_limits_runs_one_and_two_threads_and_ends_with_its_table(pretended, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["--suite", "limits", "--filter", "*M16-*", "--json", str(path)]) == 0
    assert [(case.n, threads) for case, threads, _ in pretended] == [
        (n, threads) for n in (4096, 11008, 4096) for threads in (1, 2)
    ]
    (line,) = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith(" forward float32 M=16 ")
    )
    assert line.split()[3:] == ["dense", "2.00x", "2.00x", "2.30x", "3.00x", "6", "of", "6", "no"]
    settings = read_json(path).settings
    assert settings.threads == [1, 2]
    assert settings.command.startswith("python -m peft_kernels.bench --suite limits --filter '*M16-*' --json")


def test_suites_that_ask_about_ours_measure_only_our_scratch(pretended):
    for suite, of_all in (("sweep", False), ("limits", False), ("quick", True)):
        pretended.clear()
        main(["--suite", suite, "--filter", "*forward/M16-K4096-N4096*"])
        assert {each.scratch_of_all for *_, each in pretended} == {of_all}


def test_baselines_that_are_named_are_measured_wherever_they_apply(pretended):
    arguments = ["--suite", "limits", "--filter", "*backward/M1-*", "--threads", "1"]
    main(arguments)
    assert {case.against for case, *_ in pretended} == {("bitsandbytes",)}
    pretended.clear()
    main([*arguments, "--baseline", "eager,dense"])
    assert {(case.against, tuple(each.baselines)) for case, _, each in pretended} == {
        ((), ("eager", "dense"))
    }


def test_without_matplotlib_nothing_is_measured(monkeypatch, capsys, pretended):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as status:
        main([*SWEEP, "--plot", "plot.png"])
    assert status.value.code == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err
    assert pretended == []


def test_list_prints_names_and_measures_nothing(monkeypatch, capsys):
    monkeypatch.delattr(command_line, "run")
    assert main(["--list", "--family", "dropout", "--suite", "full"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "philox_dropout/both/M512-K4096/float32/p0.05"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--family", "fusion"],
            "family must be one of nf4, linear, int8, dora, ia3, adapter, dropout, model, got fusion",
        ),
        (["--baseline", "tensorflow"], "baseline must be one of eager"),
        (["--threads", "1,x"], "threads must be positive numbers such as 1 or 1,2, got 1,x"),
        (["--filter", "nothing*"], "no case of suite quick matches --filter nothing* and the families"),
        (["--preset", "minilm", "--family", "model"], "no case of preset minilm matches --filter *"),
        (["--seconds", "0"], "seconds must be a positive number, got 0"),
        (["--seconds", "nan"], "seconds must be a positive number, got nan"),
        (["--passes", "0"], "passes must be 1 or more, got 0"),
        (["--fail-below", "nan"], "must be a ratio such as 0.95, got nan"),
        (["--fail-below", "95%"], "must be a ratio such as 0.95, got 95%"),
        (["--json", "."], "a file must be named, not a folder, got ."),
        (["--plots", "nowhere/plots"], "files must be in a folder that exists, got nowhere/plots"),
        (["--plots", __file__], "--plots must name a folder, not a file, got "),
        (["--plot", "plot.txt"], "--plot must end in one of .png, .svg, .pdf, got plot.txt"),
        (
            ["--family", "nf4", "--plot", "plot.png"],
            "--plot and --fail-sweep need a problem at two M or more",
        ),
        (["--family", "nf4", "--fail-sweep"], "--plot and --fail-sweep need a problem at two M or more"),
    ],
)
def test_bad_options_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as status:
        main(arguments)
    assert status.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_named_twice_is_measured_once(pretended):
    main(
        [
            "--preset",
            "minilm,minilm",
            "--tokens",
            "3,3",
            "--threads",
            "1,1",
            "--filter",
            "nf4_linear/forward/*",
        ]
    )
    problems = [(case.name, threads) for case, threads, _ in pretended]
    assert len(problems) == 3 * 3  # shapes, passes
    assert len(set(problems)) == 3


def test_files_without_a_name_go_to_one_folder(pretended, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    files = ["--json", "--csv", "--html", "--table", "--plots"]
    assert main(["--suite", "sweep", "--filter", "*/forward/M[134]-*/float32", *files]) == 0
    written = sorted(path.name for path in (tmp_path / "bench-output").iterdir())
    assert written == [
        *("ratios.png", "report.html", "results.csv", "results.json", "scaling-m.png", "table.md")
    ]
    out = capsys.readouterr().out
    assert all(f"written: bench-output/{name}" in out for name in written)
    assert "nf4_linear/forward/M4" in (tmp_path / "bench-output" / "results.csv").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["bench-output"]
