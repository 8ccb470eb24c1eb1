"""Stored results again: tables, files, comparison, verdicts.

    python -m peft_kernels.bench.show FILE... [--html FILE] [--compare OLD.json] [--fail-regression 10%] ...

Several files are parts of one run, which was too long for one go.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from .outputs import add_output_options, check_output_options, conclude, old_run
from .report import case_view, make_console, print_header
from .results import Report, read_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Show stored results; returns the exit status that the run would have."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels.bench.show", description="Show results that were stored with --json."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="parts of one run")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    try:
        report = merge([read_json(path) for path in options.files])
        check_output_options(options, [result.case for result in report.cases])
        old = old_run(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    settings = replace(
        report.settings,
        fail_below=options.fail_below,
        fail_regression=options.fail_regression,
        fail_sweep=options.fail_sweep,
    )
    report = replace(report, settings=settings)
    console = make_console()
    print_header(console, report)
    for result in report.cases:
        console.print(case_view(result))
    return conclude(report, old, console, options)


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


if __name__ == "__main__":
    sys.exit(main())
