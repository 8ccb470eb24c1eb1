"""Results over M or r: curves for a plot, and the verdict of the suite `sweep`, that cost grows with M."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .case import OURS, Case
from .gate import Verdict
from .results import Report, case_title
from .stats import Band

# Two M are not measured in the same rounds, and a shared machine changes its speed meanwhile, of which noise
# bands know nothing. Time per token is flat at large M, where that alone would make it rise.
JUMP = 0.05

Over = Literal["m", "r"]


@dataclass(frozen=True)
class Point:
    """Time of a call for `size` tokens, or of that rank, and roofline time as a share of it."""

    size: int
    ms: Band
    roofline_percent: float


@dataclass(frozen=True)
class Curve:
    """One contestant on one problem (a case with m = 0, or with r = 0); points in order of M, or r."""

    problem: Case
    threads: int
    contestant: str
    points: tuple[Point, ...]


def problem_of(case: Case, over: Over = "m") -> Case:
    """What cases that differ in M alone, or in r alone, have in common."""
    shared = replace(case, suites=(), against=())
    return replace(shared, m=0) if over == "m" else replace(shared, r=0)


def has_curves(cases: Iterable[Case]) -> bool:
    """Whether some problem is there for two M."""
    problems = [problem_of(case) for case in set(cases)]
    return len(set(problems)) < len(problems)


def curves(report: Report, over: Over = "m") -> list[Curve]:
    """Every contestant of every problem, where it was measured for two M (or r) or more."""
    points: dict[tuple[Case, int, str], list[Point]] = {}
    for result in report.cases:
        for contestant in result.contestants:
            size = result.case.m if over == "m" else result.case.r
            if size and (speed := contestant.measurement):
                key = (problem_of(result.case, over), result.threads, contestant.name)
                points.setdefault(key, []).append(Point(size, speed.ms, speed.roofline_percent))
    return [
        Curve(*key, tuple(sorted(found, key=lambda point: point.size)))
        for key, found in points.items()
        if len(found) > 1
    ]


def breaks(points: Sequence[Point]) -> list[str]:
    """Where cost does not grow with M as it should, a sentence each; `points` in order of M.

    A call must not take longer than one for more tokens, and time per token must not rise by more than `JUMP`
    from one M to the next; both beyond what the noise bands explain.
    """
    sentences = []
    for i, point in enumerate(points):
        larger = min(points[i + 1 :], key=lambda other: other.ms.high, default=None)
        if larger and point.ms.low > larger.ms.high:
            more = point.ms.median / larger.ms.median - 1
            sentences.append(f"M={point.size} takes {more:.1%} more time than M={larger.size}")
    for before, point in itertools.pairwise(points):
        tokens = point.size / before.size
        if point.ms.low > (1 + JUMP) * tokens * before.ms.high:
            more = point.ms.median / (tokens * before.ms.median) - 1
            sentences.append(f"M={point.size} takes {more:.1%} more time per token than M={before.size}")
    return sentences


def judge_sweep(report: Report) -> list[Verdict]:
    """Verdicts on ours: every break of the rule, and every M that has no time to judge by."""
    slow = [
        Verdict("slow", f"{case_title(curve.problem.name, curve.threads)}: {sentence}")
        for curve in curves(report)
        if curve.contestant == OURS
        for sentence in breaks(curve.points)
    ]
    without_time = [
        Verdict("unjudged", f"{result.title}: {result.status}")
        for result in report.cases
        if result.contestants[0].measurement is None
    ]
    return slow + without_time
