"""The clock: samples of rotated calls, in rounds where all contestants take turns in random order."""

from __future__ import annotations

import gc
import itertools
import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .stats import MIN_CLEAN_ROUNDS, Sample, clean_seconds, median_band, paired_ratios

SAMPLE_SECONDS = (
    0.005  # long enough for clock resolution and for one preemption to show in CPU against wall time
)
MAX_CALLS = 1000
_CERTAINLY_ONE_CALL = 50 * SAMPLE_SECONDS

Rounds = dict[str, list[Sample | None]]


class Contestant(Protocol):
    """Something that can be timed, here or in another process."""

    def sample(self, calls: int) -> Sample: ...


class LocalContestant:
    """A contestant in this process; successive calls rotate over its copies of the weight."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self._rotation = itertools.cycle(calls)

    def sample(self, calls: int) -> Sample:
        rotation = self._rotation
        collecting = gc.isenabled()
        gc.disable()
        faults = page_faults()
        try:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(calls):
                next(rotation)()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            return Sample(wall, cpu, calls, page_faults() - faults)
        finally:
            if collecting:
                gc.enable()


def page_faults() -> int:
    """Pages that this process has been given so far, its threads included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@dataclass(frozen=True)
class Budget:
    """When a case has been measured enough.

    A contestant stops once its ratio is known to `precision` (half the noise band, relative). The case
    stops when all have; or after `max_seconds`, given the fewest rounds that allow a band; or, on a
    disturbed machine, after three times the seconds and twice the rounds.
    """

    min_seconds: float = 0.2
    max_seconds: float = 3.0
    precision: float = 0.015


def interleave(
    contestants: Mapping[str, Contestant],
    ours: str,
    threads: int,
    budget: Budget,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> Rounds:
    """Measure all contestants in rounds of random order; `None` marks a round that a contestant sat out.

    Args:
        contestants: name -> contestant; `ours` takes part in every round, as every ratio needs it.
        ours: name of ours.
        threads: threads in use, for telling disturbed samples.
        budget: when to stop.
        seed: of the order.
        tick: called between rounds, outside of any timing.
    """
    order = random.Random(seed)
    calls = {name: _calls_per_sample(contestant) for name, contestant in contestants.items()}
    rounds: Rounds = {name: [] for name in contestants}
    open_names = list(contestants)
    start = time.perf_counter()
    while open_names:
        playing = list(dict.fromkeys([ours, *open_names]))
        order.shuffle(playing)
        taken = {name: contestants[name].sample(calls[name]) for name in playing}
        for name, samples in rounds.items():
            samples.append(taken.get(name))
        tick()
        elapsed = time.perf_counter() - start
        if elapsed > 3 * budget.max_seconds and len(rounds[ours]) >= 2 * MIN_CLEAN_ROUNDS:
            break
        open_names = [
            name for name in open_names if not _enough(rounds, name, ours, threads, budget, elapsed)
        ]
    return rounds


def _calls_per_sample(contestant: Contestant) -> int:
    seconds = contestant.sample(1).seconds
    if seconds < _CERTAINLY_ONE_CALL:  # that was first touch and lazy initialisation as well
        seconds = contestant.sample(1).seconds
    return max(1, min(MAX_CALLS, round(SAMPLE_SECONDS / seconds)))


def _enough(rounds: Rounds, name: str, ours: str, threads: int, budget: Budget, elapsed: float) -> bool:
    if name == ours:
        values = clean_seconds(rounds[ours], threads)
    else:
        values = paired_ratios(rounds[name], rounds[ours], threads)
    if len(values) < MIN_CLEAN_ROUNDS:
        return False
    if elapsed >= budget.max_seconds:
        return True
    return elapsed >= budget.min_seconds and median_band(values).half_width <= budget.precision
