"""What a run leaves behind, and its JSON form (schema in docs/benchmarks.md)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .case import Case
from .machine import Machine
from .roofline import Roofline
from .stats import Band

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class Pass:
    """One visit to a case, of one contestant: its undisturbed rounds.

    `ratios`: its time over ours, of the rounds in which neither was disturbed (none for ours). `rounds`: all,
    disturbed ones too. `calls`: of a round. `page_faults`: of a call, the median over rounds.
    """

    samples_ms: list[float]
    ratios: list[float]
    rounds: int
    calls: int
    page_faults: float


@dataclass(frozen=True)
class Measurement:
    """Speed of one contestant; `ratio` is its time over ours (None for ours), paired round by round.

    Bands span all passes. `page_faults` of a call, the median over passes, those of its results included.
    """

    ms: Band
    ratio: Band | None
    gb_s: float
    gflop_s: float | None
    roofline_percent: float
    page_faults: float
    passes: list[Pass]

    @property
    def samples_ms(self) -> list[float]:
        """Undisturbed samples of all passes."""
        return [sample for each in self.passes for sample in each.samples_ms]

    @property
    def rounds(self) -> int:
        """Undisturbed rounds of all passes."""
        return len(self.samples_ms)

    @property
    def dropped(self) -> int:
        """Disturbed rounds of all passes."""
        return sum(each.rounds for each in self.passes) - self.rounds


@dataclass(frozen=True)
class ContestantResult:
    """One contestant of a case.

    `missing`: it cannot run here. `noisy`: too few undisturbed rounds. `failed`: its results are wrong (ours
    only: a baseline may be less precise). `error` and `tolerance_used` are explained at `oracle.Check`; None
    where results cannot be compared.
    """

    name: str
    status: Literal["measured", "noisy", "missing", "failed"]
    reason: str | None = None
    error: float | None = None
    tolerance_used: float | None = None
    scratch_bytes: int | None = None
    saved_bytes: int | None = None
    measurement: Measurement | None = None


@dataclass(frozen=True)
class Gate:
    """The stock baseline that ours beats by least, of those with a ratio: that, and its band's lower end."""

    baseline: str
    ratio: float
    low: float


@dataclass(frozen=True)
class CaseResult:
    """One case at one thread count. `failed`: ours is wrong and nothing was timed.

    `clock` says how times were taken, in words; empty where none were.
    """

    name: str
    case: Case
    threads: int
    copies: int
    flops: int
    read_bytes: int
    write_bytes: int
    roofline_ms: float
    bound: str
    status: Literal["measured", "noisy", "missing", "failed"]
    contestants: list[ContestantResult]
    gate: Gate | None
    clock: str
    seconds: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte that the problem needs; 0 where FLOPs are not counted."""
        return self.flops / (self.read_bytes + self.write_bytes)

    @property
    def gflop_s(self) -> float | None:
        """Speed of ours; None without one, or where FLOPs are not counted."""
        ours = self.contestants[0].measurement
        return ours.gflop_s if ours else None

    @property
    def title(self) -> str:
        """The case and its thread count."""
        return case_title(self.name, self.threads)


@dataclass(frozen=True)
class Settings:
    """What was asked for; `command` is how, and what else was asked for with it."""

    suite: str
    families: list[str]
    pattern: str
    baselines: list[str]
    presets: list[str]
    threads: list[int]
    passes: int
    max_seconds: float
    fail_below: float | None
    fail_regression: float | None
    fail_sweep: bool
    seed: int
    device: str
    command: str


@dataclass(frozen=True)
class Report:
    """A run: complete, or as far as it came before it was interrupted."""

    schema_version: int
    created: str
    machine: Machine
    settings: Settings
    rooflines: list[Roofline]
    cases: list[CaseResult]
    interrupted: bool

    def measured_on(self, threads: int) -> str:
        """What some of the cases ran on, in words: the GPU, or so many threads."""
        return "GPU" if self.machine.gpu else threads_text(threads)

    @property
    def heading(self) -> str:
        """Device and date, for a picture."""
        return f"{self.machine.gpu or self.machine.cpu}, {self.created[:10]}"


def threads_text(threads: int) -> str:
    """So many threads, in words."""
    return f"{threads} thread{'s' if threads != 1 else ''}"


def case_title(name: str, threads: int) -> str:
    """A case and its thread count, in words."""
    return f"{name}, {threads_text(threads)}"


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def write_json(report: Report, path: Path) -> None:
    """Write a report; the file is either the old or the new one, never half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(dataclasses.asdict(report), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Report:
    """Read a report.

    Raises:
        ValueError: another schema version, or a field is missing, unknown or of the wrong type.
    """
    content = json.loads(path.read_text())
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {version} in {path}")
    report: Report = _decode(Report, content, "report")
    return report


def _decode(kind: Any, value: Any, where: str) -> Any:
    """JSON value -> dataclass, list, dict or scalar of type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            raise ValueError(f"{where} must be an object with {', '.join(hints)}, got {value!r:.80}")
        return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _decode(kind, value, where)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _decode(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and origin is None and type(value) is kind:
        return value
    raise ValueError(f"{where} must be {kind}, got {value!r:.80}")
