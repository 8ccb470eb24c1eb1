"""A run as one HTML file that needs nothing else: no network, no script, no fonts."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..case import GATE_BASELINES, OURS
from ..compare import Comparison
from ..results import Report
from . import prose, words
from .view import View

_FOLDER = Path(__file__).parent


def html_report(report: Report, comparison: Comparison | None = None) -> str:
    """The page. Every text in it that comes from the report is escaped.

    Args:
        report: of a run, complete or not.
        comparison: of this run with an older one.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (words.band, words.digits, words.error, words.milliseconds, words.size, words.times)
    environment.filters |= {each.__name__: each for each in filters}
    environment.filters["problem"] = words.problem_words
    environment.globals |= {
        "prose": prose,
        "words": words,
        "ours": OURS,
        "gating": GATE_BASELINES,
        "signs": {"faster": "▲", "slower": "▼", "level": "="},
    }
    style = Markup((_FOLDER / "style.css").read_text("utf-8"))  # ours, nothing of the report
    return environment.get_template("report.html.j2").render(view=View(report, comparison), style=style)
