"""The answer of the suites `limits` and `methods`: is ours as far ahead as it is to be?

A figure is the geometric mean of ratios over the shapes and thread counts. What a part of ours costs
(dropout, double quantisation) is the time of ours over that of ours without it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from .case import BASELINES, NO_DROPOUT, OWN_VARIANTS, Case
from .results import CaseResult, ContestantResult, Report
from .suites import LIMITS, LIMITS_SHAPES, ROWS, Row

SEED_BYTES = 8  # all that dropout may save for backward
SCRATCH_BYTES = 4 << 20  # a thread
RESULT_PAGES = 4  # a large result (y, dx, dA, dB) may take a page more than its bytes, for malloc's header
_PAGE_BYTES = 4096

Unit = Literal["times as fast", "more time", "bytes", "pages"]
Reached = Literal["reach for", "at least", "no", "incomplete", ""]
_Size = Callable[[CaseResult], float | None]


@dataclass(frozen=True)
class Line:
    """One figure.

    Attributes:
        title: of the row.
        against: what ours is compared with; empty where the figure is about ours alone.
        unit: of the values; more is better of "times as fast", less is better of the others.
        value: geometric mean over all results, or the largest of sizes; None without a result.
        worst: the worst single result.
        at_least: what must be reached; None: the line is for information.
        reach_for: what is hoped for; None: nothing beyond.
        results: how many results there are.
        wanted: how many a whole run has.
    """

    title: str
    against: str
    unit: Unit
    value: float | None
    worst: float | None
    at_least: float | None
    reach_for: float | None
    results: int
    wanted: int

    @property
    def reached(self) -> Reached:
        """The best figure that is reached; "incomplete" while results are missing, "" without figures."""
        if self.at_least is None:
            return ""
        if self.value is None or self.results < self.wanted:
            return "incomplete"
        sign = 1 if self.unit == "times as fast" else -1
        if self.reach_for is not None and sign * self.value >= sign * self.reach_for:
            return "reach for"
        return "at least" if sign * self.value >= sign * self.at_least else "no"


def judge_limits(report: Report) -> list[Line]:
    """Every figure that a report has a result for: speed by row and baseline, in `limits` sizes too."""
    speeds, suite = [], report.settings.suite
    for row in ROWS[suite]:
        results = [result for result in report.cases if _belongs(result.case, row)]
        for baseline in BASELINES:
            found = [each for result in results for each in result.contestants if each.name == baseline]
            if found:
                speeds.append(_speed(row, baseline, found, len(report.settings.threads)))
    return speeds + (_sizes(report) if suite == "limits" else [])


def _belongs(case: Case, row: Row) -> bool:
    problem = replace(case, k=0, n=0, suites=row.problem.suites, against=row.problem.against)
    return (case.k, case.n) in row.shapes and problem == row.problem


def _speed(row: Row, baseline: str, found: list[ContestantResult], thread_counts: int) -> Line:
    ratios = [each.measurement.ratio.median for each in found if each.measurement and each.measurement.ratio]
    value = statistics.geometric_mean(ratios) if ratios else None
    worst = min(ratios, default=None)
    unit: Unit = "more time" if baseline in OWN_VARIANTS else "times as fast"
    if unit == "more time":
        value, worst = (None if ratio is None else 1 / ratio - 1 for ratio in (value, worst))
    at_least, reach_for = row.figures.get(baseline, (None, None))
    wanted = len(row.shapes) * thread_counts
    return Line(row.title, baseline, unit, value, worst, at_least, reach_for, len(ratios), wanted)


def _saved_by_dropout(result: CaseResult) -> float | None:
    saved = {each.name: each.saved_bytes for each in result.contestants}
    ours, without = result.contestants[0].saved_bytes, saved.get(NO_DROPOUT)
    return None if ours is None or without is None else ours - without


def _scratch_of_a_thread(result: CaseResult) -> float | None:
    scratch = result.contestants[0].scratch_bytes
    return None if scratch is None else scratch / result.threads


def _fresh_pages(result: CaseResult) -> float | None:
    speed = result.contestants[0].measurement
    return (
        None if speed is None else max(0.0, speed.page_faults - math.ceil(result.write_bytes / _PAGE_BYTES))
    )


def _sizes(report: Report) -> list[Line]:
    results = [result for result in report.cases if any(_belongs(result.case, row) for row in LIMITS)]
    rows = len(LIMITS)
    with_dropout = sum(bool(row.problem.dropout) for row in LIMITS)
    sizes: tuple[tuple[str, Unit, int, _Size, int], ...] = (
        ("saved for backward by dropout", "bytes", SEED_BYTES, _saved_by_dropout, with_dropout),
        ("scratch of a thread", "bytes", SCRATCH_BYTES, _scratch_of_a_thread, rows),
        ("fresh pages of a call beyond its results", "pages", RESULT_PAGES, _fresh_pages, rows),
    )
    lines = []
    for title, unit, limit, size, rows_with in sizes:
        found = [value for result in results if (value := size(result)) is not None]
        wanted = rows_with * len(LIMITS_SHAPES) * len(report.settings.threads)
        if found:
            lines.append(Line(title, "", unit, max(found), max(found), limit, None, len(found), wanted))
    return lines
