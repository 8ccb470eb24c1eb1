"""`python -m peft_kernels.bench`: run the micro-benchmarks, print them, keep them, gate on them."""

from __future__ import annotations

import datetime
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .case import Case
from .device import GPU, describe_gpu, why_no_cuda
from .gate import EXIT_NO_DEVICE
from .machine import machine_facts
from .measure import Budget
from .options import cases_of, parser, settings_of
from .outputs import conclude, old_run
from .report import case_view, make_console, print_header
from .results import SCHEMA_VERSION, CaseResult, Report, Settings, write_json
from .roofline import Roofline, measure_gpu_roofline, measure_roofline
from .run import CaseRunner
from .suites import ROWS
from .worker import Workers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    command_line = parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = command_line.parse_args(arguments)
    try:
        settings = settings_of(options, arguments)
        cases = cases_of(options, settings)
        old = old_run(options)
    except (OSError, ValueError) as error:
        command_line.error(str(error))
    console = make_console()
    if options.list:
        console.print("\n".join(case.name for case in cases), markup=False, highlight=False, soft_wrap=True)
        return 0
    if settings.device == "cuda" and (reason := why_no_cuda()):
        print(f"no CUDA GPU to measure on: {reason}", file=sys.stderr)
        return EXIT_NO_DEVICE
    gpu = GPU() if settings.device == "cuda" else None
    options.table = options.table or (gpu and Path("bench-cuda.md"))
    report = run(cases, settings, console, options.json, gpu)
    return conclude(report, old, console, options)


def run(
    cases: Sequence[Case],
    settings: Settings,
    console: Console,
    json_path: Path | None,
    gpu: GPU | None = None,
) -> Report:
    """Run cases at every thread count, in passes; the JSON file is brought up to date after each of them.

    Args:
        cases: what to run.
        settings: as asked for.
        console: for tables and progress.
        json_path: where results go.
        gpu: measure there; None: on the CPU.
    """
    dtypes = {case.dtype for case in cases}
    machine = machine_facts(describe_gpu() if gpu else None)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    problems = list(itertools.product(cases, settings.threads))
    interrupted, total = False, len(problems) * settings.passes
    results: dict[tuple[Case, int], CaseResult] = {}
    rooflines: dict[int, Roofline] = {}

    def report() -> Report:
        facts = (SCHEMA_VERSION, created, machine, settings, list(rooflines.values()))
        return Report(*facts, cases=list(results.values()), interrupted=interrupted)

    # auto_refresh is a thread that would show in the measurements; the runner refreshes between rounds.
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
    shown = 0
    try:
        with Workers() as workers, bar as progress:
            task = progress.add_task("measuring the limits of this machine", total=total)
            progress.refresh()
            if gpu:
                rooflines |= {1: measure_gpu_roofline(dtypes, gpu)}
            else:
                rooflines |= {count: measure_roofline(count, dtypes) for count in sorted({*settings.threads})}
            print_header(console, report())
            runner = CaseRunner(
                settings.baselines,
                Budget(max_seconds=settings.max_seconds / settings.passes),
                settings.seed,
                workers,
                rooflines,
                progress.refresh,
                scratch_of_all=settings.suite not in ("sweep", *ROWS),  # which ask about ours alone
                device=gpu,
            )
            for number in range(settings.passes):
                for case, count in problems:
                    progress.update(task, description=case.name)
                    earlier = results.get((case, count))
                    if earlier is None or earlier.status != "failed":
                        results[case, count] = runner.run(case, count, earlier)
                    if number == settings.passes - 1:
                        console.print(case_view(results[case, count]))
                        shown += 1
                    progress.advance(task)
                    if json_path:
                        json_path.parent.mkdir(exist_ok=True)
                        write_json(report(), json_path)
    except KeyboardInterrupt:
        interrupted = True
        for result in list(results.values())[shown:]:
            console.print(case_view(result))
        console.print(f"[yellow]interrupted: {len(results)} of {len(problems)} cases have results[/yellow]")
        if json_path and results:
            write_json(report(), json_path)
    return report()


if __name__ == "__main__":
    sys.exit(main())
