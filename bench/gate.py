"""The gate of `--fail-below`: from noise bands to verdicts to an exit status."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .case import GATE_BASELINES, OURS
from .results import CaseResult, ContestantResult, Gate

EXIT_FAILED, EXIT_UNJUDGED, EXIT_NO_DEVICE, EXIT_INTERRUPTED = (
    1,
    3,
    4,
    130,
)  # 2 is argparse's, for bad options


@dataclass(frozen=True)
class Verdict:
    """What a case comes to. `unjudged`: too noisy, or nothing to gate on."""

    kind: Literal["passed", "wrong", "slow", "unjudged"]
    text: str = ""


def gate_of(contestants: Iterable[ContestantResult]) -> Gate | None:
    """The stock baseline whose ratio has the lowest lower end; None if any of them, or ours, is too noisy."""
    gates = []
    for contestant in contestants:
        if contestant.name in GATE_BASELINES and contestant.status != "missing":
            measurement = contestant.measurement
            if measurement is None or measurement.ratio is None:
                return None
            gates.append(Gate(contestant.name, measurement.ratio.median, measurement.ratio.low))
    return min(gates, key=lambda gate: gate.low, default=None)


def judge(result: CaseResult, fail_below: float | None) -> Verdict:
    """Verdict on one case; without `fail_below` only a wrong result counts."""
    if result.status == "failed":
        return Verdict("wrong", f"FAILED: {result.contestants[0].reason}")
    if fail_below is None:
        return Verdict("passed")
    gate = result.gate
    if gate is None:
        stock = (OURS, *GATE_BASELINES)
        noisy = [each.name for each in result.contestants if each.status == "noisy" and each.name in stock]
        nothing = "no stock baseline to judge against"
        return Verdict("unjudged", f"too noisy to judge: {', '.join(noisy)}" if noisy else nothing)
    if gate.low < fail_below:
        return Verdict("slow", f"{gate.low:.3f} < {fail_below:g} against {gate.baseline}")
    return Verdict("passed")


def exit_status(verdicts: Sequence[Verdict], interrupted: bool) -> int:
    """Status of a run: a wrong or slow case outweighs an interruption, which outweighs noise."""
    kinds = {verdict.kind for verdict in verdicts}
    if kinds & {"wrong", "slow"}:
        return EXIT_FAILED
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_UNJUDGED if "unjudged" in kinds else 0
