"""A run as pictures: measured roofline, ratios with noise bands, scaling, memory; drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .case import OURS, Case
from .report import size_text
from .results import CaseResult, Report
from .roofline import Roofline
from .standing import Outcome, Standing, standings
from .sweep import Curve, Over, curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Row = TypeVar("_Row")
_OVERS: tuple[Over, ...] = ("m", "r")
_MARKERS = "osDv^PXhd<>"
_LOOKS: dict[Outcome, tuple[str, str]] = {  # colour, and a word: not everyone sees the colour
    "faster": ("tab:blue", ""),
    "slower": ("tab:red", "SLOWER  "),
    "level": ("tab:gray", "level  "),
}
_ROWS = 60  # of one picture; a longer list goes on in the next


def save_plots(report: Report, folder: Path) -> list[Path]:
    """Write PNG files into a folder that exists; none of what the report has nothing for.

    `roofline-<threads>.png`; `ratios.png`, ours against every baseline, slowest first; `scaling-m.png` and
    `scaling-r.png`; `memory.png`. A list too long for a picture is in `ratios-1.png`, `ratios-2.png`, ...

    Returns:
        The files that were written.

    Raises:
        ModuleNotFoundError: there is no matplotlib.
    """
    title = report.heading
    ratios = [standing for standing in standings(report) if standing.ratio]
    ratios.sort(key=lambda standing: standing.ratio.median if standing.ratio else 0.0)
    scratch = [r for r in report.cases if any(each.scratch_bytes is not None for each in r.contestants)]
    return [
        *(path for roof in report.rooflines if (path := _roofline(report, roof, title, folder))),
        *_pages(
            ratios, _draw_ratios, f"baseline time / our time, 95 % bands; {title}", folder / "ratios.png"
        ),
        *(path for over in _OVERS if (path := _scaling(report, over, title, folder))),
        *_pages(
            scratch, _draw_memory, f"peak memory of a call beyond its results; {title}", folder / "memory.png"
        ),
    ]


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure  # an optional dependency

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure


def _pages(
    rows: Sequence[_Row], draw: Callable[[Axes, Sequence[_Row]], None], title: str, path: Path
) -> list[Path]:
    """A picture for up to `_ROWS` rows each, the first rows on top."""
    written = []
    for start in range(0, len(rows), _ROWS):
        page = rows[start : start + _ROWS]
        figure = _figure(13, 1.2 + 0.2 * len(page), title)
        axes = figure.subplots()
        draw(axes, page)
        axes.set_ylim(len(page) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
        number = f"-{start // _ROWS + 1}" if len(rows) > _ROWS else ""
        written.append(path.with_stem(path.stem + number))
        figure.savefig(written[-1], dpi=120)
    return written


def _draw_ratios(axes: Axes, rows: Sequence[Standing]) -> None:
    """An interval a comparison around its median; the line at 1 parts slower from faster."""
    axes.set_xscale("log", base=2)
    axes.axvline(1, color="black", linewidth=0.8)
    labels = []
    for i, row in enumerate(rows):
        assert row.ratio
        colour, word = _LOOKS[row.outcome]
        axes.plot([row.ratio.low, row.ratio.high], [i, i], color=colour, linewidth=4, alpha=0.4)
        axes.plot(row.ratio.median, i, "v" if row.outcome == "slower" else "o", color=colour, markersize=4)
        labels.append(f"{word}{row.result.title}, against {row.contestant.name}")
    axes.set_yticks(range(len(rows)), labels, fontsize="x-small")
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(_LOOKS[row.outcome][0] if row.outcome != "faster" else "black")
    axes.xaxis.set_major_formatter("{x:g}×")


def _draw_memory(axes: Axes, rows: Sequence[CaseResult]) -> None:
    """A mark a contestant in the row of its case, ours filled."""
    axes.set_xscale("symlog", base=16, linthresh=4096)  # some need none
    names = list(
        dict.fromkeys(each.name for row in rows for each in row.contestants if each.scratch_bytes is not None)
    )
    for name in names:
        sizes = {
            i: each.scratch_bytes
            for i, row in enumerate(rows)
            for each in row.contestants
            if each.name == name and each.scratch_bytes is not None
        }
        axes.plot(list(sizes.values()), list(sizes), linestyle="none", label=name, **_mark(name, names))
    axes.set_yticks(range(len(rows)), [row.title for row in rows], fontsize="x-small")
    axes.xaxis.set_major_formatter(lambda size, _: size_text(round(size)))
    axes.tick_params(axis="x", labelsize="small")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _roofline(report: Report, roof: Roofline, title: str, folder: Path) -> Path | None:
    """Every measured case of one thread count under the limits; None without any that has counted FLOPs."""
    cases = [result for result in report.cases if result.threads == roof.threads and result.gflop_s]
    if not cases:
        return None
    figure = _figure(11, 6.5, f"Measured roofline, {report.measured_on(roof.threads)}; {title}")
    axes = figure.subplots()
    families = list(dict.fromkeys(result.case.family for result in report.cases))
    for i, family in enumerate(families):
        colour, marker = f"C{i % 10}", _MARKERS[i % len(_MARKERS)]
        for ours in (False, True):
            points = [
                (result.intensity, each.measurement.gflop_s)
                for result in cases
                for each in result.contestants
                if result.case.family == family
                and (each.name == OURS) == ours
                and each.measurement
                and each.measurement.gflop_s
            ]
            look: dict[str, Any] = (
                {"markersize": 7} if ours else {"markersize": 4, "fillstyle": "none", "alpha": 0.5}
            )
            if points:
                label = family if ours else None
                axes.plot(*zip(*points, strict=True), marker, color=colour, label=label, **look)
    peaks = {dtype: max(peak, roof.gflop_s.get("float32", 0.0)) for dtype, peak in roof.gflop_s.items()}
    reach = [result.intensity for result in cases]
    for dtype, peak in sorted(peaks.items()):
        for bandwidth, style in ((roof.read_gb_s, "-"), (roof.write_gb_s, ":")):
            ends = sorted({min(reach) / 2, peak / bandwidth, 2 * max(*reach, peak / bandwidth)})
            axes.plot(ends, [min(peak, bandwidth * end) for end in ends], style, color="black", linewidth=1)
        axes.annotate(
            f"{dtype} {peak:.0f} GFLOP/s", (ends[-1], peak), ha="right", va="bottom", fontsize="small"
        )
    bandwidths = f"diagonals: read {roof.read_gb_s:.0f} GB/s, write {roof.write_gb_s:.0f} GB/s (dotted)"
    axes.set(xscale="log", yscale="log", xlabel=f"FLOP per byte; {bandwidths}", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(title="filled: ours", fontsize="small", loc="lower right")
    path = folder / f"roofline-{roof.threads}.png"
    figure.savefig(path, dpi=120)
    return path


def _scaling(report: Report, over: Over, title: str, folder: Path) -> Path | None:
    """A panel a problem, with time over M or r of every contestant; None without curves."""
    panels: dict[tuple[Case, int], list[Curve]] = {}
    for curve in curves(report, over):
        panels.setdefault((curve.problem, curve.threads), []).append(curve)
    if not panels:
        return None
    names = list(dict.fromkeys(curve.contestant for found in panels.values() for curve in found))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(5 * columns, 3.6 * rows + 0.8, f"ms per call; {title}")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for ((problem, threads), found), axes in zip(panels.items(), grid, strict=False):
        for curve in found:
            sizes, times = [p.size for p in curve.points], [p.ms.median for p in curve.points]
            axes.plot(sizes, times, label=curve.contestant, **_mark(curve.contestant, names))
        axes.set_title(f"{problem.name}, {report.measured_on(threads)}", fontsize="small")
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="tokens M" if over == "m" else "rank r")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    for axes in grid:  # those that no problem has filled
        axes.set_axis_off()
    path = folder / f"scaling-{over}.png"
    figure.savefig(path, dpi=120)
    return path


def _mark(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of a contestant; ours is filled and blue."""
    if name == OURS:
        return {"color": "tab:blue", "marker": "o", "markersize": 5, "linewidth": 2.2}
    i = names.index(name)
    return {
        "color": f"C{1 + i % 9}",
        "marker": _MARKERS[i % len(_MARKERS)],
        "markersize": 4,
        "fillstyle": "none",
    }
