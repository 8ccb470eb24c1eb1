"""What a run looks like in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .case import GATE_BASELINES, OURS, Case
from .compare import Change, Comparison, judge_regressions
from .gate import Verdict, judge
from .limits import Line
from .machine import Machine
from .oracle import CHECKED_TOKENS
from .results import CaseResult, ContestantResult, Measurement, Report, threads_text
from .roofline import Roofline

LEGEND = (
    "ratio = baseline time / our time, median of paired rounds [95 % band]; * gates --fail-below; "
    "GB/s and % roof count the bytes the problem needs, not those a contestant moves; "
    "faults = pages that a call is given anew, for its results or for more; "
    "scratch = peak memory of a call beyond its results, peak (whole models) = with them; "
    "error = max |error| / max |float64 result|, ! = outside the tolerance ours is held to"
)
TABLE_WIDTH = 150  # a narrower terminal wraps lines, which loses nothing
_HEADINGS = (
    *("ms", "", "ratio", "band", "GB/s", "GFLOP/s", "% roof"),
    *("faults", "scratch", "saved", "error", "rounds"),
)
_MODEL_HEADINGS = {"GB/s": "tokens/s", "scratch": "peak"}  # of whole models


def make_console() -> Console:
    """A console that is wide enough for the tables."""
    return Console(width=max(Console().width, TABLE_WIDTH))


def machine_table(machine: Machine, rooflines: list[Roofline]) -> Table:
    """Machine facts and measured limits."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if machine.gpu:
        table.add_row("GPU", machine.gpu)
    table.add_row("processor", f"{machine.cpu}, {machine.processors} usable")
    table.add_row("caches", ", ".join(f"{level} {size_text(size)}" for level, size in machine.caches.items()))
    table.add_row("system", machine.system)
    table.add_row(
        "versions", ", ".join(f"{name} {version or '-'}" for name, version in machine.versions.items())
    )
    native = machine.native_capability or f"[red]none: {escape(machine.native_reason or '')}[/red]"
    table.add_row("instructions", f"torch {machine.torch_capability}, native kernels {native}")
    for roofline in rooflines:
        peaks = ", ".join(f"{dtype} {peak:.0f} GFLOP/s" for dtype, peak in sorted(roofline.gflop_s.items()))
        limits = f"read {roofline.read_gb_s:.1f} GB/s, write {roofline.write_gb_s:.1f} GB/s, {peaks}"
        table.add_row(f"limits, {threads_text(roofline.threads)}", limits)
    return table


def case_view(result: CaseResult) -> Group:
    """All contestants of one case, and which of them have no speed and why."""
    copies = f"{result.copies} weight {'copy' if result.copies == 1 else 'copies'}"
    roof = f"roofline {_milliseconds(result.roofline_ms)} ms ({result.bound})"
    how = threads_text(result.threads) if result.clock in ("", "wall clock") else result.clock
    title = f"[bold]{escape(result.name)}[/bold]   {how}, {copies}, {roof}"
    if result.case.m > CHECKED_TOKENS and result.case.family == "linear":
        title += f", {CHECKED_TOKENS} tokens checked"
    table = Table(box=None, padding=(0, 1))
    table.add_column("", no_wrap=True, min_width=22)
    renamed = _MODEL_HEADINGS if result.case.family == "model" else {}
    for heading in _HEADINGS:
        table.add_column(renamed.get(heading, heading), justify="right", no_wrap=True)
    notes = []
    for contestant in result.contestants:
        if contestant.measurement:
            table.add_row(*_contestant_row(result.case, contestant, contestant.measurement))
        else:
            notes.append(_note(contestant))
    return Group(title, table, *notes, "")


def summary_table(report: Report) -> Table:
    """One row per case: how ours stands against the stock baseline that it beats by least."""
    title = "Against the fastest stock baseline"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    table.add_column("case", no_wrap=True)
    for heading in ("threads", "ms", "ratio", "lower end"):
        table.add_column(heading, justify="right")
    table.add_column("baseline")
    table.add_column("")
    for result in report.cases:
        ours, gate = result.contestants[0].measurement, result.gate
        kind = judge(result, report.settings.fail_below).kind
        table.add_row(
            escape(result.name),
            str(result.threads),
            _milliseconds(ours.ms.median) if ours else "-",
            *((f"{gate.ratio:.2f}x", f"{gate.low:.2f}x", gate.baseline) if gate else ("-", "-", "-")),
            "" if kind == "passed" else f"[red]{kind}[/red]",
        )
    return table


def print_verdicts(console: Console, report: Report) -> None:
    """The cases that do not pass, each with its reason."""
    fail_below = report.settings.fail_below
    verdicts = [(result, judge(result, fail_below)) for result in report.cases]
    failures = [(result, verdict) for result, verdict in verdicts if verdict.kind != "passed"]
    if failures:
        console.print(f"[bold red]{len(failures)} of {len(report.cases)} do not pass:[/bold red]")
        for result, verdict in failures:
            line = f"{result.title}: {verdict.text}"
            console.print(line, markup=False, highlight=False)
    elif fail_below is not None:
        console.print(f"[green]all {len(report.cases)} at or above {fail_below:g}[/green]")


def limits_table(lines: Sequence[Line]) -> Table:
    """Every figure of a suite that has some: what was found, what it has to be, and whether it is."""
    title = "Figures to reach: geometric means over shapes and thread counts; sizes are the largest"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    for heading in ("", "against"):
        table.add_column(heading, no_wrap=True)
    for heading in ("found", "worst", "at least", "reach for", "results"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("reached", no_wrap=True)
    colours = {"reach for": "green", "at least": "green", "no": "red", "incomplete": "yellow", "": "dim"}
    for line in lines:
        values = (line.value, line.worst, line.at_least, line.reach_for)
        table.add_row(
            line.title,
            line.against,
            *("-" if value is None else _figure(value, line.unit) for value in values),
            f"{line.results} of {line.wanted}",
            Text(line.reached, style=colours[line.reached]),
        )
    return table


def _figure(value: float, unit: str) -> str:
    if unit == "times as fast":
        return f"{value:.2f}x"
    if unit == "more time":
        return f"{value:+.1%}"
    return size_text(round(value)) if unit == "bytes" else f"{value:.0f}"


def print_sweep(console: Console, verdicts: Sequence[Verdict]) -> None:
    """Whether cost grows with M, and where it does not."""
    if not verdicts:
        console.print("[green]cost grows with M, without a jump[/green]")
    for kind, heading in (
        ("slow", "[bold red]cost does not grow with M as it should:[/bold red]"),
        ("unjudged", "[yellow]without a time:[/yellow]"),
    ):
        texts = [verdict.text for verdict in verdicts if verdict.kind == kind]
        if texts:
            console.print(heading)
            console.print("\n".join(texts), markup=False, highlight=False)


def print_comparison(console: Console, comparison: Comparison, threshold: float | None) -> None:
    """What has changed since an older run, and whether that is too much."""
    changes = comparison.changes
    console.print(f"[bold]Against the run of {comparison.old}[/bold]")
    for change in sorted(changes, key=lambda change: -change.time.median):
        if change.verdict != "same":
            console.print(_change_text(change))
    same = sum(change.verdict == "same" for change in changes)
    console.print(f"{same} of {len(changes)} cases take the same time within their noise bands")
    for what, names in (
        ("not comparable", comparison.differences),
        ("too noisy to compare, or no baseline in common", comparison.unjudged),
        ("only in this run", comparison.added),
        ("only in the old run", comparison.removed),
    ):
        for name in names:
            console.print(f"{what}: {name}", markup=False, highlight=False)
    if threshold is not None:
        verdicts = judge_regressions(comparison, threshold)
        slow = [verdict for verdict in verdicts if verdict.kind == "slow"]
        for change in changes:
            if change.verdict == "same" and change.time.median > 1 + threshold:
                console.print(f"too noisy to judge: {change.title}: {change.sentence}", markup=False)
        if slow:
            console.print(f"[bold red]{len(slow)} slower by more than {threshold:.0%}[/bold red]")
        elif changes:
            console.print(f"[green]none slower by more than {threshold:.0%} beyond noise[/green]")


def print_header(console: Console, report: Report) -> None:
    """Machine, limits and legend."""
    console.print(machine_table(report.machine, report.rooflines))
    console.print(f"[dim]{escape(LEGEND)}[/dim]\n")


def _change_text(change: Change) -> Text:
    colour = {"slower": "red", "faster": "green", "same": ""}[change.verdict]
    return Text(f"  {change.verdict}: {change.title}: {change.sentence}", style=colour)


def _contestant_row(case: Case, contestant: ContestantResult, measurement: Measurement) -> list[str]:
    ratio = measurement.ratio
    error = "-" if contestant.error is None else f"{contestant.error:.1e}"
    outside = contestant.tolerance_used is not None and contestant.tolerance_used > 1
    return [
        f"[bold]{contestant.name}[/bold]"
        if contestant.name == OURS
        else contestant.name + _mark(contestant.name),
        _milliseconds(measurement.ms.median),
        f"±{100 * measurement.ms.half_width:.1f}%",
        f"{ratio.median:.2f}x" if ratio else "",
        escape(f"[{ratio.low:.2f}, {ratio.high:.2f}]") if ratio else "",
        f"{1e3 * case.m / measurement.ms.median:.1f}"
        if case.family == "model"
        else f"{measurement.gb_s:.2f}",
        "-" if measurement.gflop_s is None else f"{measurement.gflop_s:.1f}",
        f"{measurement.roofline_percent:.0f}",
        f"{measurement.page_faults:.0f}",
        size_text(contestant.scratch_bytes),
        size_text(contestant.saved_bytes),
        f"[red]{error}![/red]" if outside else error,
        f"{measurement.rounds}" + (f" (-{measurement.dropped})" if measurement.dropped else ""),
    ]


def _note(contestant: ContestantResult) -> Text:
    colour = "bold red" if contestant.status == "failed" else "yellow"
    error = "" if contestant.error is None else f" (error {contestant.error:.1e})"
    status = contestant.status.upper() if contestant.status == "failed" else contestant.status
    return Text(
        f"  {contestant.name}{_mark(contestant.name)}: {status}: {contestant.reason}{error}", style=colour
    )


def _mark(name: str) -> str:
    return "*" if name in GATE_BASELINES else ""


def size_text(size: int | None) -> str:
    """Bytes in binary units with at most three digits; "-" for None."""
    if size is None:
        return "-"
    value, units = float(size), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1000 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:.3g} {unit}"


def _milliseconds(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds >= 10 else f"{milliseconds:.3g}"
