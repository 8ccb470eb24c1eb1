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
    """Of the stock baselines that have a ratio, the one with the lowest lower end; None without one."""
    gates = [
        Gate(each.name, each.measurement.ratio.median, each.measurement.ratio.low)
        for each in contestants
        if each.name in GATE_BASELINES and each.measurement and each.measurement.ratio
    ]
    return min(gates, key=lambda gate: gate.low, default=None)


def judge(result: CaseResult, fail_below: float | None) -> Verdict:
    """Verdict on one case; without `fail_below` only a wrong result counts."""
    if result.status == "failed":
        return Verdict("wrong", f"FAILED: {result.contestants[0].reason}")
    if fail_below is None:
        return Verdict("passed")
    gate = result.gate
    if gate and gate.low < fail_below:  # whatever those that are too noisy would have said
        return Verdict("slow", f"{gate.low:.3f} < {fail_below:g} against {gate.baseline}")
    stock = (OURS, *GATE_BASELINES)
    if noisy := [each.name for each in result.contestants if each.status == "noisy" and each.name in stock]:
        return Verdict("unjudged", f"too noisy to judge: {', '.join(noisy)}")
    return Verdict("passed") if gate else Verdict("unjudged", "no stock baseline to judge against")


def exit_status(verdicts: Sequence[Verdict], interrupted: bool) -> int:
    """Status of a run: a wrong or slow case outweighs an interruption, which outweighs noise."""
    kinds = {verdict.kind for verdict in verdicts}
    if kinds & {"wrong", "slow"}:
        return EXIT_FAILED
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_UNJUDGED if "unjudged" in kinds else 0
