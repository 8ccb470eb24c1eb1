"""Two runs side by side: has a case become slower? The verdicts of `--compare` and `--fail-regression`.

Milliseconds of two runs differ by what the machine's other tenants do, and by its clock. What is compared is
therefore our time relative to that of a baseline measured in the same rounds, the yardstick: libraries of the
same versions do the same work, however long that takes today.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from .case import EXACT, OURS, OWN_VARIANTS
from .gate import Verdict
from .results import CaseResult, Measurement, Report, case_title
from .stats import MIN_CLEAN_ROUNDS, Band

# What must be the same for times to be comparable; other facts of the machine and versions may differ.
_FACTS = ("cpu", "gpu", "torch_capability", "native_capability")
_LIBRARIES = ("torch", "bitsandbytes", "peft", "transformers", "adapters", "triton", "unsloth")
_SAME_CODE = (*OWN_VARIANTS, EXACT)  # no yardsticks: they become slower together with ours


@dataclass(frozen=True)
class Change:
    """What has become of one case.

    Attributes:
        name: of the case.
        threads: that it was measured with.
        time: our time over that of the old run, yardstick by yardstick: 1.2 is 20 % slower. Of all yardsticks
            the middle one; its band holds everything that the bands of the two runs allow.
        yardstick: that baseline.
        verdict: "same" where the band holds 1.
    """

    name: str
    threads: int
    time: Band
    yardstick: str
    verdict: Literal["slower", "same", "faster"]

    @property
    def title(self) -> str:
        """The case and its thread count."""
        return case_title(self.name, self.threads)

    @property
    def sentence(self) -> str:
        """The change in words: `+20.1 % time [+17.0 %, +23.5 %] against eager`."""
        more, low, high = (100 * (value - 1) for value in (self.time.median, self.time.low, self.time.high))
        return f"{more:+.1f} % time [{low:+.1f} %, {high:+.1f} %] against {self.yardstick}"


@dataclass(frozen=True)
class Comparison:
    """This run against an old one.

    Attributes:
        old: when that was made.
        differences: facts of machine and versions that make times incomparable; then there are no changes.
        changes: of the cases in both, in the order of this run.
        unjudged: cases in both, of which one has no time or another clock, or that have no yardstick in
            common.
        added: cases that the old run has not.
        removed: cases that only the old run has.
    """

    old: str
    differences: list[str]
    changes: list[Change]
    unjudged: list[str]
    added: list[str]
    removed: list[str]


def compare_runs(new: Report, old: Report) -> Comparison:
    """Compare a run with an old one, case by case."""
    differences = _differences(new, old)
    before = {(result.name, result.threads): result for result in old.cases}
    now = {(result.name, result.threads): result for result in new.cases}
    both = [] if differences else [(result, before[key]) for key, result in now.items() if key in before]
    changes = {(result.name, result.threads): _change(result, earlier) for result, earlier in both}
    return Comparison(
        old.created,
        differences,
        changes=[change for change in changes.values() if change],
        unjudged=[case_title(*key) for key, change in changes.items() if change is None],
        added=[case_title(*key) for key in now if key not in before],
        removed=[case_title(*key) for key in before if key not in now],
    )


def judge_regressions(comparison: Comparison, threshold: float) -> list[Verdict]:
    """Verdicts of `--fail-regression`: slower by more than `threshold`, and by more than noise explains.

    Slower by more than `threshold`, but not than noise explains, is not judged: it may be either.
    """
    if comparison.differences:
        return [Verdict("unjudged", f"not comparable: {each}") for each in comparison.differences]
    large = [
        Verdict("slow" if change.verdict == "slower" else "unjudged", f"{change.title}: {change.sentence}")
        for change in comparison.changes
        if change.time.median > 1 + threshold
    ]
    unjudged = [Verdict("unjudged", f"{name}: too noisy to compare") for name in comparison.unjudged]
    if not comparison.changes and not unjudged:
        unjudged = [Verdict("unjudged", "no case is in both runs")]
    return large + unjudged


def _change(new: CaseResult, old: CaseResult) -> Change | None:
    ours, before = new.contestants[0].measurement, old.contestants[0].measurement
    if ours is None or before is None or new.clock != old.clock:
        return None  # launching call by call on a GPU is no time to hold against that of a CUDA graph
    earlier = {each.name: each.measurement for each in old.contestants}
    found = [
        (_quotient(past, present), each.name)
        for each in new.contestants
        if each.name not in (OURS, *_SAME_CODE)
        and (present := _ratio(each.measurement, ours))
        and (past := _ratio(earlier.get(each.name), before))
    ]
    if not found:
        return None  # milliseconds of two runs say nothing
    time, yardstick = sorted(found, key=lambda each: each[0].median)[(len(found) - 1) // 2]
    verdict: Literal["slower", "same", "faster"] = (
        "slower" if time.low > 1 else "faster" if time.high < 1 else "same"
    )
    return Change(new.name, new.threads, time, yardstick, verdict)


def _ratio(baseline: Measurement | None, ours: Measurement) -> Band | None:
    """Its ratio, if it took part in every pass, and more than one of them has enough undisturbed rounds.

    Fewer give a band that is too narrow: it knows nothing of what differs from pass to pass.
    """
    if baseline is None or len(baseline.passes) != len(ours.passes):
        return None
    usable = sum(len(each.ratios) >= MIN_CLEAN_ROUNDS for each in baseline.passes)
    return None if usable == 1 < len(baseline.passes) else baseline.ratio


def _quotient(above: Band, below: Band) -> Band:
    """above / below, with all values that the two bands allow."""
    return Band(above.median / below.median, above.low / below.high, above.high / below.low)


def _differences(new: Report, old: Report) -> list[str]:
    pairs = [(name, asdict(new.machine)[name], asdict(old.machine)[name]) for name in _FACTS]
    pairs += [(name, new.machine.versions.get(name), old.machine.versions.get(name)) for name in _LIBRARIES]
    return [f"{name} was {before}, is {now}" for name, now, before in pairs if now != before]
