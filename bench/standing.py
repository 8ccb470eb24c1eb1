"""How ours stands against others: faster, slower, level or not judged, by noise bands."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .case import BASELINES, EXACT, GATE_BASELINES, OURS, OWN_VARIANTS
from .results import CaseResult, ContestantResult, Report
from .stats import Band

Outcome = Literal["faster", "slower", "level", "unjudged"]
OUTCOMES: tuple[Outcome, ...] = ("faster", "slower", "level", "unjudged")


@dataclass(frozen=True)
class Standing:
    """Ours against one contestant on one case at one thread count."""

    result: CaseResult
    contestant: ContestantResult

    @property
    def ratio(self) -> Band | None:
        """Its time over ours; None without a speed of either."""
        return self.contestant.measurement.ratio if self.contestant.measurement else None

    @property
    def outcome(self) -> Outcome:
        """What the noise band of the ratio says; "level" where it has 1 in it."""
        if self.ratio is None:
            return "unjudged"
        if self.ratio.low > 1:
            return "faster"
        return "slower" if self.ratio.high < 1 else "level"


@dataclass(frozen=True)
class Score:
    """One baseline over all of its cases: how many of each outcome, and the geometric mean of the ratios."""

    baseline: str
    counts: dict[Outcome, int]
    mean: float | None
    worst: float | None


def count(outcomes: Iterable[Outcome]) -> dict[Outcome, int]:
    """How many there are of each."""
    found = list(outcomes)
    return {outcome: found.count(outcome) for outcome in OUTCOMES}


def is_rival(name: str) -> bool:
    """Whether a contestant is one to win or lose against, not ours or ours on an easier problem."""
    return name not in (OURS, EXACT, *OWN_VARIANTS)


def standings(report: Report) -> list[Standing]:
    """Every rival of every case, in the order of the report."""
    return [
        Standing(result, each)
        for result in report.cases
        for each in result.contestants
        if is_rival(each.name)
    ]


def stock_outcome(result: CaseResult) -> Outcome:
    """How ours stands against the stock baselines (those that gate) together.

    "faster" than all of them, "slower" than at least one; "unjudged" where one is too noisy, or none ran.
    """
    stock = [
        Standing(result, each).outcome
        for each in result.contestants
        if each.name in GATE_BASELINES and each.status != "missing"
    ]
    for outcome in ("slower", "unjudged", "level"):
        if outcome in stock:
            return outcome
    return "faster" if stock else "unjudged"


def scores(found: Sequence[Standing]) -> list[Score]:
    """A score a baseline, those that gate first."""
    known = (*GATE_BASELINES, *BASELINES)
    present = {each.contestant.name for each in found}
    order = [*dict.fromkeys(name for name in known if name in present), *sorted(present - {*known})]
    return [_score(name, [each for each in found if each.contestant.name == name]) for name in order]


def _score(name: str, found: Sequence[Standing]) -> Score:
    ratios = [each.ratio.median for each in found if each.ratio]
    return Score(
        name,
        count(each.outcome for each in found),
        statistics.geometric_mean(ratios) if ratios else None,
        min(ratios, default=None),
    )
