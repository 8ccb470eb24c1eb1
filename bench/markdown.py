"""A run as a table in Markdown: what it was measured on and with, then a line a case."""

from __future__ import annotations

from .case import BASELINES
from .report import size_text
from .results import CaseResult, ContestantResult, Report


def markdown(report: Report) -> str:
    """The table; a baseline's column has its time over ours with the noise band, or why there is none.

    A case whose check against float64 failed has no speed.
    """
    machine, found = report.machine, {each.name for result in report.cases for each in result.contestants}
    baselines = [name for name in BASELINES if name in found]
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items() if version)
    head = ["case", "clock", "ms", "% roof", "scratch", "error", *baselines]
    lines = [
        f"- device: {machine.gpu or machine.cpu}",
        f"- host: {machine.cpu}, {machine.system}",
        f"- versions: {versions}",
        f"- date: {report.created}{', interrupted' if report.interrupted else ''}",
        f"- suite {report.settings.suite}, at most {report.settings.max_seconds:g} s a case",
        *(
            f"- limits: read {roof.read_gb_s:.0f} GB/s, write {roof.write_gb_s:.0f} GB/s, "
            + ", ".join(f"{dtype} {peak:.0f} GFLOP/s" for dtype, peak in sorted(roof.gflop_s.items()))
            for roof in report.rooflines
        ),
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(_row(result, baselines)) + " |" for result in report.cases),
    ]
    return "\n".join(lines) + "\n"


def _row(result: CaseResult, baselines: list[str]) -> list[str]:
    ours, *others = result.contestants
    if ours.measurement is None:
        return [
            f"`{result.name}`",
            result.clock,
            f"{ours.status}: {ours.reason}",
            *[""] * (3 + len(baselines)),
        ]
    of = {each.name: each for each in others}
    return [
        f"`{result.name}`",
        result.clock,
        f"{ours.measurement.ms.median:.4g} ± {100 * ours.measurement.ms.half_width:.1f} %",
        f"{ours.measurement.roofline_percent:.0f}",
        size_text(ours.scratch_bytes),
        "–" if ours.error is None else f"{ours.error:.1e}",
        *(_ratio(of[name]) if name in of else "" for name in baselines),
    ]


def _ratio(contestant: ContestantResult) -> str:
    if contestant.measurement is None or contestant.measurement.ratio is None:
        return f"{contestant.status}: {contestant.reason}"
    ratio = contestant.measurement.ratio
    scratch = "" if contestant.scratch_bytes is None else f", {size_text(contestant.scratch_bytes)}"
    return f"{ratio.median:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]{scratch}"
