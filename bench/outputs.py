"""What is made of results, fresh or stored: files, a comparison with an older run, verdicts, exit status."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .case import Case
from .compare import Comparison, compare_runs, judge_regressions
from .csv_table import csv_text
from .gate import exit_status, judge
from .html import html_report
from .limits import judge_limits
from .markdown import markdown
from .plot import FORMATS, check_matplotlib, check_plot, save_plot
from .plots import save_plots
from .report import limits_table, print_comparison, print_sweep, print_verdicts, summary_table
from .results import Report, read_json, write_json
from .suites import ROWS
from .sweep import curves, has_curves, judge_sweep

FOLDER = Path("bench-output")  # where files go that are asked for without a name


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what to make of results."""
    files = parser.add_argument_group(
        "files", f"without a FILE, in {FOLDER}/; kept up to date while measuring (JSON) or written at the end"
    ).add_argument
    for option, name, what in (
        ("--json", "results.json", "everything; schema in docs/benchmarks.md"),
        ("--csv", "results.csv", "a line for every contestant of every case"),
        ("--html", "report.html", "report for a browser, in one file"),
        ("--table", "table.md", "table in Markdown (with --device cuda: always, by default bench-cuda.md)"),
    ):
        files(option, type=Path, nargs="?", const=FOLDER / name, metavar="FILE", help=what)
    files(
        "--plots", type=Path, nargs="?", const=FOLDER, metavar="FOLDER", help="plots (png; needs matplotlib)"
    )
    files("--plot", type=Path, metavar="FILE", help=f"time and %% of roofline over M: {', '.join(FORMATS)}")
    verdict = parser.add_argument_group("verdicts").add_argument
    verdict("--compare", type=Path, metavar="OLD.json", help="say what has changed since that run")
    verdict(
        "--fail-regression",
        type=_share,
        metavar="P%",
        help="with --compare: fail if a case is slower by more than that, and more than noise explains",
    )
    verdict(
        "--fail-below",
        type=_ratio,
        metavar="R",
        help="fail if a ratio's lower end against a stock baseline is below R",
    )
    verdict("--fail-sweep", action="store_true", help="fail where cost does not grow with M")


def check_output_options(options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Refuse, before anything is measured, what could not be done after.

    Raises:
        ValueError: what is wrong with the options.
    """
    if options.plot:
        check_plot(options.plot)
    if (options.plot or options.fail_sweep) and not has_curves(cases):
        raise ValueError("--plot and --fail-sweep need a problem at two M or more, as --suite sweep has")
    if options.fail_regression is not None and not options.compare:
        raise ValueError("--fail-regression must come with --compare OLD.json, a run to compare with")
    if options.plots:
        check_matplotlib("--plots")
    for path in (*_files(options), *_folders(options)):
        if path.parent != FOLDER and not path.parent.is_dir():
            raise ValueError(f"files must be in a folder that exists, got {path}")
    if folders := [path for path in _files(options) if path.is_dir()]:
        raise ValueError(f"a file must be named, not a folder, got {folders[0]}")
    if files := [path for path in _folders(options) if path.is_file()]:
        raise ValueError(f"--plots must name a folder, not a file, got {files[0]}")


def old_run(options: argparse.Namespace) -> Report | None:
    """The run to compare with, read before this one may overwrite it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no report.
    """
    return read_json(options.compare) if options.compare else None


def conclude(report: Report, old: Report | None, console: Console, options: argparse.Namespace) -> int:
    """Print tables and verdicts, write files; returns the exit status.

    Without any result no file is touched: there may be one of an earlier run.
    """
    settings = report.settings
    if not report.cases:
        console.print("no case has a result: nothing is written")
        return exit_status([], report.interrupted)
    comparison = compare_runs(report, old) if old else None
    console.print(summary_table(report))
    if settings.suite in ROWS:
        console.print(limits_table(judge_limits(report)))
    verdicts = [judge(result, settings.fail_below) for result in report.cases]
    if settings.suite == "sweep" or settings.fail_sweep:
        of_sweep = judge_sweep(report)
        print_sweep(console, of_sweep)
        verdicts += of_sweep if settings.fail_sweep else []
    if comparison:
        print_comparison(console, comparison, settings.fail_regression)
        if settings.fail_regression is not None:
            verdicts += judge_regressions(comparison, settings.fail_regression)
    print_verdicts(console, report)
    _write(report, comparison, console, options)
    return exit_status(verdicts, report.interrupted)


def _write(
    report: Report, comparison: Comparison | None, console: Console, options: argparse.Namespace
) -> None:
    """Write the files that are asked for."""
    folders = [path.parent for path in _files(options)] + _folders(options)
    for folder in folders:
        folder.mkdir(exist_ok=True)
    written = _files(options)
    if options.json:
        write_json(report, options.json)
    if options.csv:
        options.csv.write_text(csv_text(report), "utf-8")
    if options.html:
        options.html.write_text(html_report(report, comparison), "utf-8")
    if options.table:
        options.table.write_text(markdown(report), "utf-8")
    if options.plots:
        written += save_plots(report, options.plots)
    if options.plot:
        if found := curves(report):
            save_plot(found, report.heading, options.plot)
            written.append(options.plot)
        else:
            console.print("[yellow]nothing to draw: no problem has a time at two M[/yellow]")
    for path in written:
        console.print(f"written: {path}", markup=False, highlight=False)


def _files(options: argparse.Namespace) -> list[Path]:
    """The single files that are asked for."""
    return [path for path in (options.json, options.csv, options.html, options.table) if path]


def _folders(options: argparse.Namespace) -> list[Path]:
    """The folder that is asked for, if one is."""
    return [options.plots] if options.plots else []


def _share(text: str) -> float:
    """0.1 of "10%" and of "0.1"; a number without % is below 1, for 5 might be meant as 5 %."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < (10 if text.endswith("%") else 1):
        raise argparse.ArgumentTypeError(f"must be a share such as 10% or 0.1, got {text}")
    return share


def _ratio(text: str) -> float:
    """A ratio to stay above."""
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < math.inf:
        raise argparse.ArgumentTypeError(f"must be a ratio such as 0.95, got {text}")
    return ratio
