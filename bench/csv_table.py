"""A run as CSV: a line for every contestant of every case (columns in docs/benchmarks.md)."""

from __future__ import annotations

import csv
import io
from typing import Any

from .case import GATE_BASELINES
from .results import CaseResult, ContestantResult, Report

COLUMNS = (
    *(
        "created",
        "device",
        "name",
        "label",
        "family",
        "op",
        "direction",
        "m",
        "k",
        "n",
        "r",
        "weight",
        "dtype",
    ),
    *("dropout", "threads", "clock", "copies", "flops", "read_bytes", "write_bytes", "roofline_ms", "bound"),
    *(
        "contestant",
        "gates",
        "status",
        "reason",
        "ms",
        "ms_low",
        "ms_high",
        "ratio",
        "ratio_low",
        "ratio_high",
    ),
    *("tokens_per_s", "gb_s", "gflop_s", "roofline_percent", "rounds", "dropped", "page_faults"),
    *("scratch_bytes", "saved_bytes", "error", "tolerance_used"),
)


def csv_text(report: Report) -> str:
    """The table; what is not known is an empty field. Numbers are written in full."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for result in report.cases:
        for contestant in result.contestants:
            table.writerow(_row(report, result, contestant))
    return text.getvalue()


def _row(report: Report, result: CaseResult, contestant: ContestantResult) -> dict[str, Any]:
    case, speed = result.case, contestant.measurement
    row: dict[str, Any] = {
        "created": report.created,
        "device": report.machine.gpu or report.machine.cpu,
        "contestant": contestant.name,
        "gates": int(contestant.name in GATE_BASELINES),
    }
    for source in (
        case,
        result,
        contestant,
        speed,
    ):  # of a name that two have, the later: the contestant's status
        row |= {
            name: getattr(source, name)
            for name in COLUMNS
            if name not in ("ms", "ratio") and hasattr(source, name)
        }
    row["name"] = result.name
    if speed:
        row |= {"ms": speed.ms.median, "ms_low": speed.ms.low, "ms_high": speed.ms.high}
        row["tokens_per_s"] = 1e3 * case.m / speed.ms.median if case.m else None
        if speed.ratio:
            row |= {"ratio": speed.ratio.median, "ratio_low": speed.ratio.low, "ratio_high": speed.ratio.high}
    return row
