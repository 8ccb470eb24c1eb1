"""Statistics of interleaved rounds. Pure functions of recorded times: no clock in here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
MIN_CLEAN_ROUNDS = 6  # the fewest whose extremes bound the median with 95 % confidence: 1 - 2 / 2^6 = 0.969
ONE_THREAD_DISAGREEMENT = 0.05
THREADS_DISAGREEMENT = 0.10


@dataclass(frozen=True)
class Sample:
    """One contestant in one round of `calls` calls: seconds of wall clock and of CPU time, page faults."""

    wall: float
    cpu: float
    calls: int
    faults: int = 0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds per call."""
        return self.wall / self.calls


@dataclass(frozen=True)
class Band:
    """A median and the confidence band around it."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the band relative to the median."""
        return (self.high - self.low) / (2 * self.median)


def median_band(values: Sequence[float], confidence: float = CONFIDENCE) -> Band:
    """Median with a distribution-free confidence band from order statistics.

    [x_(l), x_(n+1-l)] covers the true median with probability 1 - 2 P(Bin(n, 1/2) < l); l is the largest with
    at least `confidence`, or 1 (smallest to largest) where n is too small for it.

    Source: David and Nagaraja, Order Statistics, 3rd ed., section 7.1.
    """
    ordered = sorted(values)
    n = len(ordered)
    rank, tail = 0, 0.0
    while rank < (n - 1) // 2:
        tail += math.comb(n, rank) / 2**n
        if 1 - 2 * tail < confidence:
            break
        rank += 1
    rank = max(rank, 1)
    return Band(statistics.median(ordered), ordered[rank - 1], ordered[n - rank])


def clean_rounds(samples: Sequence[Sample | None], threads: int) -> list[bool]:
    """Which rounds this contestant was measured in undisturbed (False also where it was not measured).

    One thread: CPU time must equal wall time; less means that the process was kept off the processor, more
    that another of its threads was busy. Several threads: how much of threads x wall a contestant uses is
    its own affair (serial stretches), so a sample is compared with the upper quartile of the same
    contestant's samples.
    """
    shares = [sample.cpu / sample.wall if sample else math.nan for sample in samples]
    taken = sorted(share for share in shares if not math.isnan(share))
    if not taken:
        return [False] * len(samples)
    if threads == 1:
        low, high = 1 - ONE_THREAD_DISAGREEMENT, 1 + ONE_THREAD_DISAGREEMENT
    else:
        upper_quartile = taken[(3 * (len(taken) - 1)) // 4]
        low, high = upper_quartile * (1 - THREADS_DISAGREEMENT), math.inf
    return [low <= share <= high for share in shares]


def clean_seconds(samples: Sequence[Sample | None], threads: int) -> list[float]:
    """Seconds per call of the undisturbed samples."""
    clean = clean_rounds(samples, threads)
    return [sample.seconds for sample, ok in zip(samples, clean, strict=True) if sample and ok]


def paired_ratios(
    baseline: Sequence[Sample | None], ours: Sequence[Sample | None], threads: int
) -> list[float]:
    """Baseline time / our time of every round in which both were measured and neither was disturbed."""
    clean = zip(clean_rounds(baseline, threads), clean_rounds(ours, threads), strict=True)
    return [
        b.seconds / o.seconds
        for b, o, both in zip(baseline, ours, (x and y for x, y in clean), strict=True)
        if both and b and o
    ]
