"""SVG elements with escaped text, and the frame that all charts share: grid, ticks, titles of the axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from .axis import Axis

SHAPES = ("circle", "square", "triangle", "diamond", "down", "cross", "hexagon", "bar")


def canvas(width: float, height: float, label: str) -> Element:
    """An empty drawing that scales with the page; `label` is what a screen reader says."""
    return Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": label})


def draw(parent: Element, tag: str, words: str | None = None, /, **attributes: float | str) -> Element:
    """Append an element; `class_` is class, `stroke_width` stroke-width; numbers to a tenth of a pixel."""
    named = {name.rstrip("_").replace("_", "-"): _text(value) for name, value in attributes.items()}
    element = SubElement(parent, tag, named)
    element.text = words
    return element


def line(parent: Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
    """Append a straight line of a class."""
    return draw(parent, "line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def mark(parent: Element, shape: int, x: float, y: float, size: float, kind: str) -> Element:
    """Append one of `SHAPES`, all of about the same area, `size` being the radius of the circle."""
    name = SHAPES[shape % len(SHAPES)]
    if name == "circle":
        return draw(parent, "circle", cx=x, cy=y, r=size, class_=kind)
    outline = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in _OUTLINES[name])
    return draw(parent, "polygon", points=outline, class_=kind)


def frame(chart: Element, x: Axis, y: Axis, titles: tuple[str, str], number: Callable[[float], str]) -> None:
    """Draw grid, tick labels and titles; that of y stands on top, not turned."""
    left, right, bottom, top = x.start, x.end, y.start, y.end
    for tick in x.ticks(max(3, int((right - left) / 42))):
        line(chart, x.at(tick), bottom, x.at(tick), top, "grid")
        draw(chart, "text", number(tick), x=x.at(tick), y=bottom + 14, class_="tick middle")
    for tick in y.ticks(max(3, int((bottom - top) / 32))):
        line(chart, left, y.at(tick), right, y.at(tick), "grid")
        draw(chart, "text", number(tick), x=left - 6, y=y.at(tick) + 3.5, class_="tick end")
    draw(chart, "text", titles[0], x=right, y=bottom + 29, class_="title end")
    draw(chart, "text", titles[1], x=0, y=top - 10, class_="title")


def markup(chart: Element) -> str:
    """The drawing as text to put into a page."""
    return ElementTree.tostring(chart, encoding="unicode")


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def _corners(count: int, turn: float, size: float) -> tuple[tuple[float, float], ...]:
    angles = [2 * math.pi * (i + turn) / count for i in range(count)]
    return tuple((size * math.sin(angle), -size * math.cos(angle)) for angle in angles)


_OUTLINES = {
    "square": _corners(4, 0.5, 1.25),
    "triangle": _corners(3, 0, 1.45),
    "diamond": _corners(4, 0, 1.35),
    "down": _corners(3, 0.5, 1.45),
    "cross": (
        *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
        *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
    ),
    "hexagon": _corners(6, 0, 1.1),
    "bar": ((-0.55, -1.4), (0.55, -1.4), (0.55, 1.4), (-0.55, 1.4)),
}
