"""The charts of the report: the measured roofline, and time and share of the roofline over M or r."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from xml.etree.ElementTree import Element

from ..case import BASELINES, OURS, Case
from ..results import CaseResult
from ..roofline import Roofline
from ..sweep import Curve, Over, Point
from .axis import Axis, log_axis, spread
from .svg import canvas, draw, frame, line, mark, markup
from .words import digits, milliseconds, short, times

_CHARACTER = 6.0  # about the width of one, at the size of a chart's text
_LINE = 12.0  # and the height


def roofline_chart(
    roof: Roofline, results: Mapping[str, CaseResult], families: Sequence[str], width: float, height: float
) -> str:
    """Every measured case of one thread count under the measured limits; empty where none has counted FLOPs.

    Args:
        roof: measured limits.
        results: anchor in the page -> case.
        families: in the order of their marks.
        width: of the drawing.
        height: of the drawing.
    """
    shown = {
        anchor: result
        for anchor, result in results.items()
        if result.threads == roof.threads and result.gflop_s
    }
    if not shown:
        return ""
    peaks = {dtype: max(peak, roof.gflop_s.get("float32", 0.0)) for dtype, peak in roof.gflop_s.items()}
    ridge = max(peaks.values()) / roof.read_gb_s
    speeds = [
        each.measurement.gflop_s
        for result in shown.values()
        for each in result.contestants
        if each.measurement and each.measurement.gflop_s
    ]
    x = log_axis([ridge, *(result.intensity for result in shown.values())], 46, width - 18, room=1.8)
    y = log_axis([*peaks.values(), *speeds], height - 36, 26, room=1.5)
    label = f"GFLOP/s over FLOP per byte of {len(shown)} cases; the tables below have the numbers"
    chart = canvas(width, height, label)
    frame(chart, x, y, ("FLOP per byte", "GFLOP/s"), short)
    for anchor, result in shown.items():
        _case(chart, anchor, result, families, x, y)
    _limits(chart, roof, peaks, x, y)
    return markup(chart)


def _limits(chart: Element, roof: Roofline, peaks: Mapping[str, float], x: Axis, y: Axis) -> None:
    """The diagonals of the bandwidths up to the highest peak, and a level line a peak."""
    top = max(peaks.values())
    for bandwidth, kind in ((roof.read_gb_s, "roof"), (roof.write_gb_s, "roof dashed")):
        first, last = max(x.low, y.low / bandwidth), min(x.high, top / bandwidth)
        line(chart, x.at(first), y.at(first * bandwidth), x.at(last), y.at(last * bandwidth), kind)
    words = f"read {roof.read_gb_s:.0f} GB/s", f"write {roof.write_gb_s:.0f} GB/s, dashed"
    for i, text in enumerate(words):  # in the corner over the diagonals, where no case can be
        draw(chart, "text", text, x=x.start + 6, y=y.end + 14 + _LINE * i, class_="limit")
    order = sorted(peaks, key=lambda dtype: -peaks[dtype])
    places = spread([y.at(peaks[dtype]) - 5 for dtype in order], _LINE, y.end, y.start)
    for dtype, place in zip(order, places, strict=True):
        line(
            chart, x.at(peaks[dtype] / roof.read_gb_s), y.at(peaks[dtype]), x.end, y.at(peaks[dtype]), "roof"
        )
        draw(chart, "text", f"{dtype} {peaks[dtype]:.0f} GFLOP/s", x=x.end, y=place, class_="limit end")


def _case(chart: Element, anchor: str, result: CaseResult, families: Sequence[str], x: Axis, y: Axis) -> None:
    """A stem up to the case's own roof, the others' marks, and ours on top, a link to its numbers."""
    ours, *others = result.contestants
    assert ours.measurement
    assert ours.measurement.gflop_s
    shape, column = families.index(result.case.family), x.at(result.intensity)
    place = y.at(ours.measurement.gflop_s)
    line(chart, column, place, column, y.at(result.flops / (result.roofline_ms * 1e6)), f"stem f{shape}")
    for other in others:
        if other.measurement and other.measurement.gflop_s:
            point = mark(chart, shape, column, y.at(other.measurement.gflop_s), 2.6, f"other f{shape}")
            ratio = f", {times(other.measurement.ratio.median)} our time" if other.measurement.ratio else ""
            draw(point, "title", f"{other.name}: {milliseconds(other.measurement.ms.median)}{ratio}")
    link = draw(chart, "a", href=f"#{anchor}", tabindex="-1")
    point = mark(link, shape, column, place, 4.6, f"ours f{shape}")
    speed = (
        f"{digits(ours.measurement.gflop_s)} GFLOP/s, {ours.measurement.roofline_percent:.0f} % of its roof"
    )
    draw(point, "title", f"{result.name}: {speed}")


def family_mark(index: int) -> str:
    """The mark of a family, for a legend."""
    chart = canvas(14, 14, "")
    del chart.attrib["role"], chart.attrib["aria-label"]
    chart.set("aria-hidden", "true")
    mark(chart, index, 7, 7, 4.6, f"ours f{index}")
    return markup(chart)


def curve_charts(curves: Sequence[Curve], over: Over) -> tuple[str, str]:
    """Two charts of the contestants of one problem: time of a call, and roofline time as a share of it."""
    unit = "tokens M" if over == "m" else "rank r"
    points = [point for curve in curves for point in curve.points]
    slowest, fullest = max(p.ms.high for p in points), max(p.roofline_percent for p in points)
    fastest = min(p.ms.low for p in points)
    return (
        _curve_chart(
            curves,
            unit,
            "ms per call",
            lambda p: p.ms.median,
            lambda a, b: log_axis((fastest, slowest), a, b),
        ),
        _curve_chart(
            curves,
            unit,
            "% of the roofline",
            lambda p: p.roofline_percent,
            lambda a, b: Axis(0, 1.08 * max(fullest, 1), a, b, None),
        ),
    )


def _curve_chart(
    curves: Sequence[Curve],
    unit: str,
    quantity: str,
    value: Callable[[Point], float],
    axis: Callable[[float, float], Axis],
) -> str:
    names = [curve.contestant for curve in curves]
    width, height = 380.0, 250.0
    right = width - 12 - _CHARACTER * max(map(len, names))
    sizes = sorted({point.size for curve in curves for point in curve.points})
    x, y = log_axis(sizes, 44, right, base=2, room=1.1), axis(height - 36, 26)
    chart = canvas(width, height, f"{quantity} over {unit}: {', '.join(names)}")
    frame(chart, x, y, (unit, quantity), short)
    ends = spread([y.at(value(curve.points[-1])) + 3.5 for curve in curves], _LINE, y.end, y.start)
    for curve, end in reversed(list(zip(curves, ends, strict=True))):  # ours, the first, on top
        kind = f"k-{_look(curve.contestant)}"
        places = [(x.at(point.size), y.at(value(point))) for point in curve.points]
        draw(
            chart, "polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places), class_=f"curve {kind}"
        )
        for point, (a, b) in zip(curve.points, places, strict=True):
            dot = draw(chart, "circle", cx=a, cy=b, r=2.6, class_=f"dot {kind}")
            band = f"{digits(point.ms.low)} to {digits(point.ms.high)}"
            words = (
                f"{milliseconds(point.ms.median)} [{band}], {point.roofline_percent:.0f} % of the roofline"
            )
            draw(dot, "title", f"{curve.contestant}, {unit} = {point.size}: {words}")
        draw(chart, "text", curve.contestant, x=right + 8, y=end, class_=f"name {kind}")
    return markup(chart)


def _look(contestant: str) -> str:
    """The class that gives a contestant its colour and dashes."""
    return contestant if contestant in (OURS, *BASELINES) else "unknown"


def by_problem(curves: Sequence[Curve]) -> list[list[Curve]]:
    """The curves of one problem at one thread count together, in the order of contestants."""
    groups: dict[tuple[Case, int], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.problem, curve.threads), []).append(curve)
    return list(groups.values())
