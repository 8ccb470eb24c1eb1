"""The report for people: in a terminal, from 80 columns on, and as Markdown for a bug report."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peft_kernels import __version__
from peft_kernels.core.text import as_text
from peft_kernels.diagnostics.advice import Advice
from peft_kernels.diagnostics.checks import DTYPES, SelfTestResult
from peft_kernels.diagnostics.environment import Section

COLOURS = {"problem": "bold red", "slower": "yellow", "hint": "cyan"}


def inventory_view(sections: Mapping[str, Section]) -> Group:
    """What is here, section by section."""
    parts: list[RenderableType] = []
    for title, section in sections.items():
        table = Table.grid(padding=(0, 2))
        for name, value in (_by_backend(section) if title == "backends" else section).items():
            style = "bold red" if name.isupper() else "cyan"
            table.add_row(Text(f"  {name}", style=style), Text(value, overflow="fold"))
        parts += [Text(title, style="bold"), table, Text("")]
    return Group(*parts)


def advice_view(advice: list[Advice]) -> Group:
    """What to change, or that nothing is to be."""
    pressing = [a for a in advice if a.level != "hint"]
    headline = f"{len(pressing)} to follow" if pressing else "nothing to change"
    if hints := len(advice) - len(pressing):
        headline += f", {hints} hint{'s' * (hints > 1)} for some uses only"
    parts: list[RenderableType] = [Text(f"advice: {headline}", style="bold")]
    for each in advice:
        table = Table.grid(padding=(0, 2))
        level = Text(f"  {each.level}", style=COLOURS[each.level])
        table.add_row(level, Text(each.what, style="bold", overflow="fold"))
        for name, value in (("why", each.why), ("do", each.remedy), ("gain", each.gain or "not measured")):
            table.add_row(Text(f"  {name:>7}", style="dim"), Text(value, overflow="fold"))
        parts.append(table)
    return Group(*parts, Text(""))


def self_test_view(results: list[SelfTestResult]) -> Group:
    """A row for each case: how much of what rounding may do was used, by dtype."""
    if not results:
        return Group(Text("self-test: not run", style="bold red"))
    passed = sum(result.passed for result in results)
    table = Table("op", "case", *DTYPES, box=box.SIMPLE_HEAD, show_edge=False)
    for column in table.columns[:2]:
        column.overflow = "fold"
    for column in table.columns[2:]:
        column.justify = "right"
    for (op, case), by_dtype in _by_case(results).items():
        table.add_row(op, case, *(_verdict(by_dtype.get(dtype)) for dtype in DTYPES))
    good = passed == len(results)
    headline = Text(
        f"self-test: {passed} of {len(results)} passed", style="bold green" if good else "bold red"
    )
    legend = "error against float64, as a share of what rounding may do to that element"
    return Group(headline, table, Text(legend, style="dim"))


def issue(sections: Mapping[str, Section], advice: list[Advice], results: list[SelfTestResult] | None) -> str:
    """The report in Markdown, to be pasted into an issue; the home folder's name is left out."""
    failed = [result for result in results or () if not result.passed]
    if results is None:
        verdict = "not asked for"
    elif not results:
        verdict = "could not run"
    else:
        verdict = f"{len(results) - len(failed)} of {len(results)} passed"
    failures = [
        f"{r.case}: error {r.error:.1e}, {r.tolerance_used:.2g} times what is allowed" for r in failed
    ]
    found = [f"{each.level}: {each.what} ({each.name})" for each in advice] or ["nothing to change"]
    parts = [
        f"**peft_kernels {__version__}**, self-test: {verdict}",
        *("- " + line.replace("*", r"\*") for line in failures),
        "<details><summary>python -m peft_kernels --issue</summary>",
        "```text\n"
        + "\n".join([as_text(inventory_view(sections)), "advice", *(f"  {a}" for a in found)])
        + "\n```",
        "</details>",
    ]
    home = re.compile(re.escape(str(Path.home())) + r"(?=/)")
    return home.sub("~", "\n\n".join(parts))


def _by_backend(section: Section) -> Section:
    """The ops of each backend, where the section has a backend for each op."""
    ops: dict[str, list[str]] = {}
    for op, backend in section.items():
        ops.setdefault(backend, []).append(op)
    return {backend: ", ".join(names) for backend, names in ops.items()}


def _by_case(results: Iterable[SelfTestResult]) -> dict[tuple[str, str], dict[str, SelfTestResult]]:
    """Results by (op, case without its dtype), then by dtype."""
    cases: dict[tuple[str, str], dict[str, SelfTestResult]] = {}
    for result in results:
        op, *parts = result.case.split("/")
        (dtype,) = set(parts) & set(DTYPES)
        case = " ".join(part for part in parts if part != dtype)
        cases.setdefault((op, case), {})[dtype] = result
    return cases


def _verdict(result: SelfTestResult | None) -> str:
    if result is None:
        return ""
    return (
        f"[green]{result.tolerance_used:.0%}"
        if result.passed
        else f"[bold red]WRONG {result.tolerance_used:.2g}×"
    )
