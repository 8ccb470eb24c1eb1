"""`python -m peft_kernels.bench`: run the micro-benchmarks, print them, keep them as JSON, gate on them."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import registry
from .case import BASELINES, TUNED_SUFFIX, Case
from .device import GPU, describe_gpu, why_no_cuda
from .gate import EXIT_NO_DEVICE
from .machine import machine_facts, usable_processors
from .markdown import markdown
from .measure import Budget
from .report import case_view, print_header
from .results import SCHEMA_VERSION, CaseResult, Report, Settings, write_json
from .roofline import Roofline, measure_gpu_roofline, measure_roofline
from .run import CaseRunner
from .show import add_verdict_options, check_verdict_options, conclude, make_console
from .suites import LIMITS_THREADS, ROWS
from .worker import Workers

_DEFAULT_SECONDS = {
    "smoke": 0.2,
    "quick": 2.0,
    "full": 10.0,
    "sweep": 0.5,
    "limits": 1.5,
    "methods": 3.0,
    "gpu": 1.0,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.suite = options.suite or ("gpu" if options.device == "cuda" else "quick")
    try:
        settings = _settings(options, usable_processors())
        cases = _cases(options, settings)
    except ValueError as error:
        parser.error(str(error))
    console = make_console()
    if options.list:
        console.print("\n".join(case.name for case in cases), markup=False, highlight=False)
        return 0
    if settings.device == "cuda" and (reason := why_no_cuda()):
        print(f"no CUDA GPU to measure on: {reason}", file=sys.stderr)
        return EXIT_NO_DEVICE
    gpu = GPU() if settings.device == "cuda" else None
    report = run(cases, settings, console, options.json, gpu)
    if path := options.table or (gpu and Path("bench-cuda.md")):
        path.write_text(markdown(report))
        console.print(f"written: {path}", markup=False, highlight=False)
    return conclude(report, console, options.plot)


def run(
    cases: Sequence[Case],
    settings: Settings,
    console: Console,
    json_path: Path | None,
    gpu: GPU | None = None,
) -> Report:
    """Run cases at every thread count; the JSON file is brought up to date after each of them.

    Args:
        cases: what to run.
        settings: as asked for.
        console: for tables and progress.
        json_path: where results go.
        gpu: measure there; None: on the CPU.
    """
    threads = settings.threads
    dtypes = {case.dtype for case in cases}
    machine = machine_facts(describe_gpu() if gpu else None)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    interrupted, total = False, len(cases) * len(threads)
    results: list[CaseResult] = []
    rooflines: dict[int, Roofline] = {}

    def report() -> Report:
        facts = (SCHEMA_VERSION, created, machine, settings, list(rooflines.values()))
        return Report(*facts, cases=list(results), interrupted=interrupted)

    # auto_refresh is a thread that would show in the measurements; the runner refreshes between rounds.
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
    try:
        with Workers() as workers, bar as progress:
            task = progress.add_task("measuring the limits of this machine", total=total)
            progress.refresh()
            if gpu:
                rooflines |= {1: measure_gpu_roofline(dtypes, gpu)}
            else:
                rooflines |= {count: measure_roofline(count, dtypes) for count in sorted({*threads})}
            print_header(console, report())
            budget = Budget(max_seconds=settings.max_seconds)
            runner = CaseRunner(
                settings.baselines,
                budget,
                settings.seed,
                workers,
                rooflines,
                progress.refresh,
                scratch_of_all=settings.suite not in ("sweep", *ROWS),  # which ask about ours alone
                device=gpu,
            )
            for case, count in itertools.product(cases, threads):
                progress.update(task, description=case.name)
                results.append(runner.run(case, count))
                console.print(case_view(results[-1]))
                progress.advance(task)
                if json_path:
                    write_json(report(), json_path)
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"[yellow]interrupted after {len(results)} of {total} cases[/yellow]")
        if json_path:
            write_json(report(), json_path)
    return report()


def _settings(options: argparse.Namespace, processors: int) -> Settings:
    baselines = options.baseline.split(",") if options.baseline else registry.default_baselines(options.suite)
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {', '.join(unknown)}")
    if options.device == "cuda":
        tuned = [name for name in baselines if name.endswith(TUNED_SUFFIX)]  # the allocator is the CPU's
        if options.baseline and tuned:
            raise ValueError(f"baseline must be one that runs on a GPU with --device cuda, got {tuned[0]}")
        baselines = [name for name in baselines if name not in tuned]
    if options.device == "cuda" and options.threads:
        raise ValueError("threads must be left out with --device cuda, got " + options.threads)
    default_threads = {"full": sorted({1, processors}), **dict.fromkeys(ROWS, LIMITS_THREADS)}.get(
        options.suite, (1,)
    )
    if options.device == "cuda":
        default_threads = (1,)
    try:
        threads = (
            [int(count) for count in options.threads.split(",")] if options.threads else [*default_threads]
        )
    except ValueError:
        threads = [0]
    if min(threads) < 1:
        raise ValueError(f"threads must be positive numbers such as 1 or 1,2, got {options.threads}")
    return Settings(
        suite=options.suite,
        families=options.family.split(",") if options.family else list(registry.FAMILIES),
        pattern=options.filter,
        baselines=baselines,
        threads=threads,
        max_seconds=options.seconds or _DEFAULT_SECONDS[options.suite],
        fail_below=options.fail_below,
        fail_sweep=options.fail_sweep,
        seed=options.seed,
        device=options.device,
    )


def _cases(options: argparse.Namespace, settings: Settings) -> list[Case]:
    cases = registry.select(settings.suite, settings.families, settings.pattern)
    if not cases:
        raise ValueError(
            f"no case of suite {settings.suite} matches {settings.pattern}; --list shows their names"
        )
    check_verdict_options(options, cases)
    # Baselines that are named are wanted wherever they apply, not only where the suite has a question.
    return [dataclasses.replace(case, against=()) for case in cases] if options.baseline else cases


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels.bench",
        description="Micro-benchmarks of peft_kernels; see docs/benchmarks.md.",
    )
    add = parser.add_argument
    add(
        "--family", metavar="NAMES", help=f"comma-separated, of {', '.join(registry.FAMILIES)} (default: all)"
    )
    add(
        "--suite",
        choices=registry.SUITES,
        help="default: quick, under 90 s on 2 cores; with --device cuda: gpu, meant to take 10 minutes",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--filter", metavar="GLOB", default="*", help="only cases whose name matches")
    add(
        "--baseline",
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(BASELINES)} (default: what the suite asks for)",
    )
    add(
        "--threads",
        metavar="N[,N]",
        help="thread counts (default: 1; full: 1 and all processors; limits and methods: 1,2)",
    )
    seconds = ", ".join(f"{suite} {seconds:g}" for suite, seconds in _DEFAULT_SECONDS.items())
    add("--seconds", type=float, metavar="S", help=f"time for measuring a case (default: {seconds})")
    add(
        "--table",
        type=Path,
        metavar="FILE",
        help="write a table in Markdown there (default: none; with --device cuda: bench-cuda.md)",
    )
    add("--json", type=Path, metavar="FILE", help="write results there, after every case")
    add("--seed", type=int, default=0, help="of the order of measurements")
    add("--list", action="store_true", help="print the names of the cases and exit")
    add_verdict_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
