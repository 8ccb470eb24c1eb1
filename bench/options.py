"""The options of `python -m peft_kernels.bench`, and what they ask for: settings and cases."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from collections.abc import Sequence
from typing import TypeVar

from . import registry
from .case import BASELINES, TUNED_SUFFIX, Case
from .machine import usable_processors
from .outputs import add_output_options, check_output_options
from .presets import DIRECTIONS, DTYPES, FULL, MODELS, PRESET_SUITES, QUICK, preset_cases
from .results import Settings
from .suites import LIMITS_THREADS, ROWS

DEFAULT_SECONDS = {
    "smoke": 0.2,
    "quick": 2.0,
    "full": 10.0,
    "sweep": 0.5,
    "limits": 1.5,
    "methods": 3.0,
    "gpu": 1.0,
}
QUICK_PASSES = 3  # the suite that CI compares with an older run
T = TypeVar("T")


def default_passes(suite: str) -> int:
    """Visits to every case, unless told otherwise."""
    return QUICK_PASSES if suite == "quick" else 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels.bench",
        description="Micro-benchmarks of peft_kernels; see docs/benchmarks.md.",
    )
    what = parser.add_argument_group("what is measured").add_argument
    what(
        "--suite",
        choices=registry.SUITES,
        help="default: quick, under 5 minutes on 2 cores; with --device cuda: gpu, meant to take 10",
    )
    what("--family", metavar="NAMES", help=f"of {', '.join(registry.FAMILIES)} (default: all)")
    what("--filter", metavar="GLOB", default="*", help="only cases whose name matches")
    what("--preset", metavar="NAMES", help=f"the layers of models instead, of {', '.join(MODELS)}")
    what(
        "--tokens",
        metavar="M[,M]",
        help=f"with --preset (default: quick {_text(QUICK.tokens)}; full {_text(FULL.tokens)})",
    )
    what("--rank", metavar="R[,R]", help=f"with --preset (default: {_text(QUICK.ranks)})")
    what(
        "--tp",
        metavar="D[,D]",
        help="with --preset: tensor-parallel devices, of which one is measured (default: 1)",
    )
    what("--dtype", metavar="NAMES", help=f"of {', '.join(DTYPES)} (default: what the suite has)")
    what("--direction", metavar="NAMES", help=f"of {', '.join(DIRECTIONS)} (default: what the suite has)")
    what("--baseline", metavar="NAMES", help=f"of {', '.join(BASELINES)} (default: what the suite asks for)")
    what("--list", action="store_true", help="print the names of the cases and exit")
    how = parser.add_argument_group("how").add_argument
    how("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    how(
        "--threads",
        metavar="N[,N]",
        help="thread counts (default: 1; full: 1 and all processors; limits and methods: 1,2)",
    )
    seconds = ", ".join(f"{suite} {seconds:g}" for suite, seconds in DEFAULT_SECONDS.items())
    how("--seconds", type=float, metavar="S", help=f"time for measuring a case (default: {seconds})")
    how("--passes", type=int, metavar="N", help=f"over all cases (default: 1; quick: {QUICK_PASSES})")
    how("--seed", type=int, default=0, help="of the order of measurements")
    add_output_options(parser)
    return parser


def settings_of(options: argparse.Namespace, arguments: Sequence[str]) -> Settings:
    """What is asked for by options, parsed from the arguments of the command.

    Raises:
        ValueError: which option is wrong, and what it must be.
    """
    on_gpu = options.device == "cuda"
    suite = options.suite or ("gpu" if on_gpu else "quick")
    if on_gpu and options.threads:
        raise ValueError("threads must be left out with --device cuda, got " + options.threads)
    full_threads = sorted({1, usable_processors()})
    default_threads = {"full": full_threads, **dict.fromkeys(ROWS, LIMITS_THREADS)}.get(suite, (1,))
    passes = options.passes if options.passes is not None else default_passes(suite)
    if passes < 1:
        raise ValueError(f"passes must be 1 or more, got {passes}")
    seconds = DEFAULT_SECONDS[suite] if options.seconds is None else options.seconds
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a positive number, got {seconds:g}")
    return Settings(
        suite=suite,
        families=_names(options.family, tuple(registry.FAMILIES), "family") or list(registry.FAMILIES),
        pattern=options.filter,
        baselines=_baselines(options, suite),
        presets=_names(options.preset, tuple(MODELS), "preset"),
        threads=_numbers(options.threads, "threads") or ([1] if on_gpu else [*default_threads]),
        passes=passes,
        max_seconds=seconds,
        fail_below=options.fail_below,
        fail_regression=options.fail_regression,
        fail_sweep=options.fail_sweep,
        seed=options.seed,
        device=options.device,
        command=shlex.join(["python", "-m", "peft_kernels.bench", *arguments]),
    )


def cases_of(options: argparse.Namespace, settings: Settings) -> list[Case]:
    """The cases that are asked for.

    Raises:
        ValueError: as above, or there is none.
    """
    dtypes = _names(options.dtype, DTYPES, "dtype")
    directions = _names(options.direction, DIRECTIONS, "direction")
    grid_only = {"tokens": options.tokens, "rank": options.rank, "tp": options.tp}
    if settings.presets:
        if settings.suite not in PRESET_SUITES:
            raise ValueError(f"suite must be quick or full with --preset, got {settings.suite}")
        default = PRESET_SUITES[settings.suite]
        grid = dataclasses.replace(
            default,
            tokens=_numbers(options.tokens, "tokens") or default.tokens,
            ranks=_numbers(options.rank, "rank") or default.ranks,
            splits=_numbers(options.tp, "tp") or default.splits,
            dtypes=dtypes or default.dtypes,
            directions=directions or default.directions,
        )
        everything = preset_cases(settings.presets, grid, settings.suite)
    elif given := [name for name, value in grid_only.items() if value]:
        raise ValueError(f"{given[0]} must come with --preset, which has layers of models")
    else:
        everything = registry.select(settings.suite)
    cases = [
        case
        for case in registry.matching(everything, settings.families, settings.pattern)
        if (not dtypes or case.dtype in dtypes) and (not directions or case.direction in directions)
    ]
    if not cases:
        source = f"preset {','.join(settings.presets)}" if settings.presets else f"suite {settings.suite}"
        raise ValueError(
            f"no case of {source} matches --filter {settings.pattern} and the families, dtypes and "
            "directions that are asked for; without them --list shows all names"
        )
    check_output_options(options, cases)
    # Baselines that are named are wanted wherever they apply, not only where the suite has a question.
    return [dataclasses.replace(case, against=()) for case in cases] if options.baseline else cases


def _baselines(options: argparse.Namespace, suite: str) -> list[str]:
    names = _names(options.baseline, BASELINES, "baseline") or registry.default_baselines(suite)
    if options.device != "cuda":
        return names
    tuned = [name for name in names if name.endswith(TUNED_SUFFIX)]  # the allocator is the CPU's
    if options.baseline and tuned:
        raise ValueError(f"baseline must be one that runs on a GPU with --device cuda, got {tuned[0]}")
    return [name for name in names if name not in tuned]


def _names(text: str | None, known: Sequence[T], option: str) -> list[T]:
    """The names in a comma-separated list, each once; none without it."""
    given = dict.fromkeys(text.split(",")) if text else {}
    by_name = {str(each): each for each in known}
    if unknown := sorted(set(given) - set(by_name)):
        raise ValueError(f"{option} must be one of {', '.join(by_name)}, got {', '.join(unknown)}")
    return [by_name[name] for name in given]


def _numbers(text: str | None, option: str) -> list[int]:
    """The numbers in a comma-separated list, each once; none without it."""
    if not text:
        return []
    try:
        numbers = list(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"{option} must be positive numbers such as 1 or 1,2, got {text}")
    return numbers


def _text(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
