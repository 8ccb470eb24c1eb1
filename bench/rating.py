"""From recorded rounds to a measurement: one pass at a time, and all passes over a case together.

A case is visited in several passes, minutes apart and on newly made tensors. What a median does from pass to
pass (where the pages of a weight lie, how busy the machine's other tenants are) is what a second run would
see, and what rounds that follow one another cannot know.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .case import OURS, Prepared
from .measure import Rounds
from .results import ContestantResult, Measurement, Pass
from .stats import MIN_CLEAN_ROUNDS, Band, clean_seconds, median_band, paired_ratios


@dataclass(frozen=True)
class Work:
    """What a case asks of the machine: bytes, FLOPs, and the shortest time in which it could do that."""

    moved_bytes: int
    flops: int
    roofline_ms: float

    @classmethod
    def of(cls, prepared: Prepared, roofline_ms: float) -> Work:
        """The work of a case."""
        return cls(prepared.read_bytes + prepared.write_bytes, prepared.flops, roofline_ms)


def passes_of(rounds: Rounds, threads: int) -> dict[str, Pass]:
    """The undisturbed rounds of one pass, by contestant."""
    return {
        name: Pass(
            samples_ms=[1e3 * seconds for seconds in clean_seconds(samples, threads)],
            ratios=[] if name == OURS else paired_ratios(samples, rounds[OURS], threads),
            rounds=len(taken),
            calls=taken[0].calls,
            page_faults=statistics.median(sample.faults / sample.calls for sample in taken),
        )
        for name, samples in rounds.items()
        if (taken := [sample for sample in samples if sample])
    }


def rate(result: ContestantResult, passes: Sequence[Pass], work: Work) -> ContestantResult:
    """The result with its speed, or `noisy` where there are not enough undisturbed rounds.

    They are enough in one pass, or in all together.
    """
    ours = result.name == OURS
    together = _together(passes)
    usable = [each for each in passes if _clean(each, ours) >= MIN_CLEAN_ROUNDS] or [together]
    if _clean(usable[0], ours) < MIN_CLEAN_ROUNDS:
        clean = f"{_clean(together, ours)} of {together.rounds}"
        reason = f"{clean} rounds undisturbed, {MIN_CLEAN_ROUNDS} needed"
        return replace(result, status="noisy", reason=reason, measurement=None)
    ms = over_passes([median_band(each.samples_ms) for each in usable])
    measurement = Measurement(
        ms=ms,
        ratio=None if ours else over_passes([median_band(each.ratios) for each in usable]),
        gb_s=work.moved_bytes / (ms.median * 1e6),
        gflop_s=work.flops / (ms.median * 1e6) if work.flops else None,
        roofline_percent=100 * work.roofline_ms / ms.median,
        page_faults=statistics.median(each.page_faults for each in usable),
        passes=list(passes),
    )
    return replace(result, status="measured", reason=None, measurement=measurement)


def _clean(rounds: Pass, ours: bool) -> int:
    """Rounds that count."""
    return len(rounds.samples_ms if ours else rounds.ratios)


def _together(passes: Sequence[Pass]) -> Pass:
    """All passes as one."""
    return Pass(
        samples_ms=[sample for each in passes for sample in each.samples_ms],
        ratios=[ratio for each in passes for ratio in each.ratios],
        rounds=sum(each.rounds for each in passes),
        calls=passes[0].calls,
        page_faults=statistics.median(each.page_faults for each in passes),
    )


def over_passes(bands: Sequence[Band]) -> Band:
    """The median of the passes' medians; its band spans the bands of all of them.

    That is wider than rounds alone would have it, and meant to be: it is to hold the result of another run.
    """
    return Band(
        statistics.median(band.median for band in bands),
        min(band.low for band in bands),
        max(band.high for band in bands),
    )
