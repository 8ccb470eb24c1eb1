"""Many names as one: the layers of a model, whose dotted names differ in numbers."""

import itertools
import math
from collections.abc import Iterable, Sequence


def patterns(names: Iterable[str]) -> dict[str, int]:
    """Names that differ in numbers only as one, with the numbers that there are: {"layers.0-31.q_proj": 32}.

    The values are how many they are. Where several numbers vary, and not in every combination, a star stands
    for each.
    """
    alike: dict[tuple[str | None, ...], list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        alike.setdefault(tuple(None if part.isdecimal() else part for part in parts), []).append(parts)
    return {_pattern(group): len(group) for group in alike.values()}


def _pattern(names: Sequence[Sequence[str]]) -> str:
    columns = [
        sorted({int(p) if p.isdecimal() else p for p in column}) for column in zip(*names, strict=True)
    ]
    grid = math.prod(map(len, columns)) == len(names)
    return ".".join(_one(column, grid) for column in columns)


def _one(values: Sequence[int | str], grid: bool) -> str:
    if len(values) == 1:
        return str(values[0])
    return _ranges(int(value) for value in values) if grid else "*"


def _ranges(numbers: Iterable[int]) -> str:
    """Rising numbers in short: "0-3,5"."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)
