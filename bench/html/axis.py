"""Axes of charts: from a value to a place on the page, and where to put ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Values `low` to `high` drawn from `start` to `end`; logarithmic with a `base`, linear with none."""

    low: float
    high: float
    start: float
    end: float
    base: int | None = 10

    def at(self, value: float) -> float:
        """Place of a value; one beyond an end of the axis is drawn at that end."""
        value = min(max(value, self.low), self.high)
        if self.base is None:
            share = (value - self.low) / (self.high - self.low)
        else:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """About `most` round values on the axis, evenly spread; `most` is 3 or more."""
        if self.base is None:
            return _linear_ticks(self.low, self.high, most)
        ticks = _powers(self.low, self.high, self.base, most)
        long = len(ticks) > 2 or self.high / self.low > 1000
        return ticks if long else _steps(self.low, self.high, most)


def log_axis(
    values: Iterable[float], start: float, end: float, base: int = 10, room: float = 1.25, least: float = 4.0
) -> Axis:
    """A logarithmic axis with all `values` on it and a factor `room` to spare, `least` times long or more."""
    found = [value for value in values if value > 0] or [1.0]
    low, high = min(found) / room, max(found) * room
    widen = max(1.0, math.sqrt(least * low / high))
    return Axis(low / widen, high * widen, start, end, base)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved until neighbours are `gap` apart, and all between `low` and `high` if they fit."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    floor = low
    for i in order:
        moved[i] = floor = max(moved[i], floor)
        floor += gap
    ceiling = high
    for i in reversed(order):
        moved[i] = ceiling = min(moved[i], ceiling)
        ceiling -= gap
    return moved


def _powers(low: float, high: float, base: int, most: int) -> list[float]:
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / most))
    return [float(base) ** exponent for exponent in range(first, last + 1) if exponent % step == 0]


def _steps(low: float, high: float, most: int) -> list[float]:
    """A few digits of every decade of a short logarithmic axis; of a very short one, as on a linear axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if 3 <= len(ticks) <= most:
            return ticks
    return _linear_ticks(low, high, most)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * magnitude for digit in (1, 2, 5, 10) if digit * magnitude >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
