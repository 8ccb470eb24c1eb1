"""What a run comes to: tables, verdicts, plot, exit status; of stored results too.

    python -m peft_kernels.bench.show FILE... [--plot FILE] [--fail-below R] [--fail-sweep]

Several files are parts of one run, which was too long for one go.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from .case import Case
from .gate import exit_status, judge
from .limits import judge_limits
from .plot import FORMATS, check_plot, save_plot
from .report import case_view, limits_table, print_header, print_sweep, print_verdicts, summary_table
from .results import Report, read_json
from .suites import ROWS
from .sweep import curves, has_curves, judge_sweep

_TABLE_WIDTH = 132  # a narrower terminal wraps lines, which loses nothing


def main(arguments: Sequence[str] | None = None) -> int:
    """Show stored results; returns the exit status that the run would have."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels.bench.show", description="Show results that were stored with --json."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="parts of one run")
    add_verdict_options(parser)
    options = parser.parse_args(arguments)
    try:
        report = merge([read_json(path) for path in options.files])
        check_verdict_options(options, [result.case for result in report.cases])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    settings = replace(report.settings, fail_below=options.fail_below, fail_sweep=options.fail_sweep)
    report = replace(report, settings=settings)
    console = make_console()
    print_header(console, report)
    for result in report.cases:
        console.print(case_view(result))
    return conclude(report, console, options.plot)


def merge(reports: Sequence[Report]) -> Report:
    """The parts of a run as one; its settings are those of the first, with the thread counts of all.

    Raises:
        ValueError: the parts are of different machines, software or suites, or two have the same case.
    """
    first = reports[0]
    for other in reports[1:]:
        facts = asdict(other.machine)
        for fact, value in asdict(first.machine).items():
            if facts[fact] != value:
                raise ValueError(f"{fact} must be the same in all files, got {value} and {facts[fact]}")
        if other.settings.suite != first.settings.suite:
            suites = f"{first.settings.suite} and {other.settings.suite}"
            raise ValueError(f"suite must be the same in all files, got {suites}")
    cases = [result for report in reports for result in report.cases]
    keys = [(result.name, result.threads) for result in cases]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"a case must be in one file only, got {repeated[0][0]} in two")
    threads = sorted({count for report in reports for count in report.settings.threads})
    return replace(
        first,
        settings=replace(first.settings, threads=threads),
        rooflines=[roofline for report in reports for roofline in report.rooflines],
        cases=cases,
        interrupted=any(report.interrupted for report in reports),
    )


def conclude(report: Report, console: Console, plot: Path | None) -> int:
    """Print tables and verdicts, draw the plot; returns the exit status."""
    settings = report.settings
    console.print(summary_table(report))
    if settings.suite in ROWS:
        console.print(limits_table(judge_limits(report)))
    verdicts = [judge(result, settings.fail_below) for result in report.cases]
    if settings.suite == "sweep" or settings.fail_sweep:
        of_sweep = judge_sweep(report)
        print_sweep(console, of_sweep)
        verdicts += of_sweep if settings.fail_sweep else []
    print_verdicts(console, report)
    if plot:
        _plot(report, console, plot)
    return exit_status(verdicts, report.interrupted)


def add_verdict_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what to make of results."""
    add = parser.add_argument
    add(
        "--fail-below",
        type=float,
        metavar="R",
        help="fail if a ratio's lower end against a stock baseline is below R",
    )
    add("--fail-sweep", action="store_true", help="fail where cost does not grow with M")
    add(
        "--plot", type=Path, metavar="FILE", help=f"draw time and %% of roofline over M: {', '.join(FORMATS)}"
    )


def check_verdict_options(options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Refuse, before anything is measured, what could not be done after.

    Raises:
        ValueError: what is wrong with the options.
    """
    if options.plot:
        check_plot(options.plot)
    if (options.plot or options.fail_sweep) and not has_curves(cases):
        raise ValueError("--plot and --fail-sweep need a problem at two M or more, as --suite sweep has")


def make_console() -> Console:
    """A console that is wide enough for the tables."""
    return Console(width=max(Console().width, _TABLE_WIDTH))


def _plot(report: Report, console: Console, path: Path) -> None:
    found = curves(report)
    if not found:
        console.print("[yellow]nothing to draw: no problem has a time at two M[/yellow]")
        return
    save_plot(found, f"{report.machine.gpu or report.machine.cpu}, {report.created[:10]}", path)
    console.print(f"drawn: {path}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
