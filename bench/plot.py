"""Time per call and share of the roofline over M, drawn with matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from .case import OURS
from .results import threads_text
from .sweep import Curve

FORMATS = (".png", ".svg", ".pdf")
_STYLES = ("--", ":", "-.")


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be drawn once everything is measured.

    Raises:
        ValueError: there is no matplotlib, or no such folder, or the file's name ends in none of `FORMATS`.
    """
    check_matplotlib("--plot")
    if path.suffix not in FORMATS:
        raise ValueError(f"--plot must end in one of {', '.join(FORMATS)}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot must be in a folder that exists, got {path}")


def check_matplotlib(option: str) -> None:
    """Refuse an option that needs it where there is no matplotlib.

    Raises:
        ValueError: how to get it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"{option} needs matplotlib, which is not installed: pip install 'peft_kernels[bench]'"
        )


def save_plot(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Draw every curve twice, as time and as share of the roofline: a colour a problem, ours a solid line."""
    from matplotlib.figure import Figure  # an optional dependency

    figure = Figure(figsize=(14, 6), layout="constrained")
    times, shares = figure.subplots(ncols=2)
    colours: dict[object, str] = {}
    styles = {OURS: "-"}
    for curve, label in zip(curves, _labels(curves), strict=True):
        problem = (curve.problem, curve.threads)
        look = {
            "color": colours.setdefault(problem, f"C{len(colours) % 10}"),
            "linestyle": styles.setdefault(curve.contestant, _STYLES[(len(styles) - 1) % len(_STYLES)]),
            "marker": "o" if curve.contestant == OURS else None,
            "markersize": 3,
            "label": label,
        }
        tokens = [point.size for point in curve.points]
        times.plot(tokens, [point.ms.median for point in curve.points], **look)
        shares.plot(tokens, [point.roofline_percent for point in curve.points], **look)
    ticks = sorted({point.size for curve in curves for point in curve.points})
    for axes, quantity in ((times, "ms per call"), (shares, "% of the roofline")):
        axes.set(xscale="log", xlabel="tokens M", ylabel=quantity)
        axes.set_xticks(ticks, labels=map(str, ticks), rotation=90, fontsize="small")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    times.set_yscale("log")
    shares.set_ylim(bottom=0)
    times.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _labels(curves: Sequence[Curve]) -> list[str]:
    """A label a curve: contestant, direction and dtype, and of the rest what is not the same for all."""
    named = [
        {
            "direction": curve.problem.direction,
            "dtype": curve.problem.dtype,
            "contestant": curve.contestant,
            "op": curve.problem.op,
            "shape": f"K{curve.problem.k}-N{curve.problem.n}",
            "rank": f"r{curve.problem.r}",
            "weight": curve.problem.weight,
            "dropout": f"p{curve.problem.dropout}",
            "threads": threads_text(curve.threads),
        }
        for curve in curves
    ]
    always = ("direction", "dtype", "contestant")
    return [
        ", ".join(
            value
            for part, value in parts.items()
            if part in always or any(other[part] != value for other in named)
        )
        for parts in named
    ]
