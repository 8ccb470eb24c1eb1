"""How the report puts things: problems and numbers in words."""

from __future__ import annotations

from ..case import Case
from ..report import size_text
from ..stats import Band

DASH = "–"
MODEL = "model"  # the family that is counted in tokens a second and in peak memory
_DIRECTIONS = {"both": "forward + backward"}
_WEIGHTS = {
    "none": "",
    "dense": "dense",
    "nf4": "NF4",
    "nf4_double": "NF4 double-quantised",
}


def problem_words(case: Case, without: str = "") -> str:
    """Label, direction, sizes, weight and dtype of a case; `without` "m" or "r" where that varies."""
    rank = f"r {case.r}" if case.r and without != "r" else ""
    tokens = f"{case.m} token{'s' if case.m != 1 else ''}" if case.m and without != "m" else ""
    sizes = f"{case.k}→{case.n}" if case.n else f"width {case.k}"
    if case.family == MODEL:
        sizes = f"width {case.k}, {case.n} in feed-forward"
    parts = (
        case.label,
        _DIRECTIONS.get(case.direction, case.direction),
        tokens,
        sizes,
        rank,
        _WEIGHTS.get(case.weight, case.weight),
        case.dtype,
        f"dropout {case.dropout:g}" if case.dropout else "",
    )
    return " · ".join(part for part in parts if part)


def milliseconds(value: float) -> str:
    """Milliseconds with three digits."""
    return digits(value) + " ms"


def digits(value: float | None) -> str:
    """Three significant digits, all of the digits before the point."""
    if value is None:
        return DASH
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:#.3g}".rstrip(".")


def times(ratio: float | None) -> str:
    """A ratio such as 2.45×."""
    return DASH if ratio is None else f"{ratio:.1f}×" if ratio >= 100 else f"{ratio:.2f}×"


def factor(value: float) -> str:
    """A tick label of ratios."""
    return f"{value:g}×"


def power(value: float) -> str:
    """A tick label of errors."""
    return f"{value:.0e}"


def band(ratio: Band) -> str:
    """Both ends of the noise band of a ratio."""
    return f"{ratio.low:.2f}{DASH}{ratio.high:.2f}"


def error(value: float | None) -> str:
    """An error with two digits."""
    return DASH if value is None else f"{value:.1e}"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    return DASH if value is None else size_text(round(value))


def short(value: float) -> str:
    """A tick label: at most four digits, then thousands."""
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:.4g}"
