"""`python -m gpuless.tables`: what every shipped kernel takes of every GPU, as the tables of docs/gpu.md.

    python -m gpuless.tables            # compile everything, print, rewrite docs/gpu.md
    python -m gpuless.tables --check    # the same without writing: docs/gpu.md must say it already
    python -m gpuless.tables --mix      # what hot loops issue, by pipe

It fails where a rule is broken: no spill, no stack, at least two CTAs on a multiprocessor, or a reason in
`REASONS`; bytes within 1.1 times the fewest, or a reason in `traffic_tables.MORE_BYTES`; sectors and
wavefronts within 1.1 times the fewest, or a reason in `wavefront_tables.REASONS`.
"""

import argparse
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gpuless import wavefront_tables
from gpuless.launches import Configuration, cases, configuration, configurations, launches, missing
from gpuless.static import TARGETS, Budget, budget
from gpuless.traffic_tables import bytes_table, executed_traffic, predicted_table, too_many_bytes

DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu.md"
FEWEST_CTAS = 2

# (kernel, target) -> why it may have fewer CTAs, a spill or a stack. A reason that nothing needs is an error.
REASONS: dict[tuple[str, int | str], str] = {}

Budgets = dict[Configuration, dict[int | str, Budget]]


def target_name(target: int | str) -> str:
    """As NVIDIA and AMD write it."""
    return f"sm_{target}" if isinstance(target, int) else target


def budgets(targets: Sequence[int | str] = TARGETS) -> Budgets:
    """Budgets of every configuration that a case launches on a target.

    Specialisations of one configuration (dtypes, divisible sizes) are one entry, the most demanding.
    """
    found: dict[Configuration, dict[int | str, list[Budget]]] = defaultdict(lambda: defaultdict(list))
    measured: dict[str, Budget] = {}
    for target in targets:
        for case in cases():
            for launch in launches(case, target):
                if launch.ptx not in measured:
                    measured[launch.ptx] = budget(launch)
                found[configuration(launch)][target].append(measured[launch.ptx])
    return {
        which: {target: max(several, key=_demand) for target, several in found[which].items()}
        for which in sorted(found)
    }


def _demand(each: Budget) -> tuple[int, int, int, int]:
    spilled = (each.spill_bytes or 0) + each.stack_bytes
    return spilled, -each.occupancy.ctas, each.registers, each.shared_bytes


def faults(found: Budgets, reasons: Mapping[tuple[str, int | str], str] = REASONS) -> list[str]:
    """What breaks the rules, a sentence each; and reasons that are not needed."""
    sentences, used = [], set()
    for which, of_target in found.items():
        for target, each in of_target.items():
            broken = []
            if not each.in_registers:
                broken.append(f"spills {each.spill_bytes} bytes, has a stack of {each.stack_bytes}")
            if each.occupancy.ctas < FEWEST_CTAS:
                broken.append(f"has {each.occupancy.ctas} CTAs a multiprocessor ({each.occupancy.limiter})")
            if broken and (which.kernel, target) in reasons:
                used.add((which.kernel, target))
            elif broken:
                sentences.append(
                    f"{which} on {target_name(target)} {' and '.join(broken)}: no reason is given"
                )
    unused = sorted(set(reasons) - used, key=str)
    return sentences + [f"REASONS[{key}] is not needed: take it out" for key in unused]


def budget_table(found: Budgets, targets: Sequence[int | str] = TARGETS) -> str:
    """Markdown: a row a configuration, a column a target."""
    lines = [
        "| kernel, constants, warps, stages | " + " | ".join(map(target_name, targets)) + " |",
        "|---|" + "---|" * len(targets),
    ]
    for which, of_target in found.items():
        cells = (_cell(of_target[target]) if target in of_target else "–" for target in targets)
        lines.append(f"| `{which}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(each: Budget) -> str:
    shared = f"{each.shared_bytes / 1024:.3g}"
    tensor = f"{each.loop.tensor}" if each.loop.tensor else "–"
    parts = [str(each.registers), shared, f"{each.occupancy.ctas} ({each.occupancy.share:.0%})", tensor]
    if not each.in_registers:
        parts.append(f"**spill {each.spill_bytes} B, stack {each.stack_bytes} B**")
    return " · ".join(parts)


def mix_table(found: Budgets, targets: Sequence[int | str] = TARGETS) -> str:
    """Text: what a warp issues in a turn of the hot loop (of the whole kernel, without one), by pipe."""
    lines = []
    for which, of_target in found.items():
        lines.append(str(which))
        for target in (target for target in targets if target in of_target):
            loop = of_target[target].loop
            pipes = ", ".join(f"{pipe} {count}" for pipe, count in loop.pipes.most_common())
            where = "loop" if loop.in_loop else "kernel"
            lines.append(f"  {target_name(target)}: {where} of {loop.instructions}: {pipes}")
    return "\n".join(lines)


def shipped(targets: Sequence[int | str] = TARGETS) -> dict[str, set[str]]:
    """Configuration, as the table writes it, to the targets it is launched on: nothing is compiled."""
    found = defaultdict(set)
    for target in targets:
        for case in cases():
            for which in configurations(case, target):
                found[str(which)].add(target_name(target))
    return dict(found)


def documented(text: str) -> dict[str, set[str]]:
    """The same, read from the table in the document."""
    rows = [line.strip("|").split("|") for line in section(text, "budgets").splitlines()]
    names = [cell.strip() for cell in rows[0][1:]] if rows else []
    return {
        cells[0].strip().strip("`"): {
            name for name, cell in zip(names, cells[1:], strict=True) if cell.strip() != "–"
        }
        for cells in rows[2:]
    }


def section(text: str, name: str) -> str:
    """What stands between the markers of a generated table."""
    match = re.search(rf"<!-- {name}:[^>]*-->\n(.*?)\n?<!-- end of {name} -->", text, re.DOTALL)
    if match is None:
        raise ValueError(f"docs/gpu.md must have the markers of {name}, has none")
    return match[1]


def with_section(text: str, name: str, content: str) -> str:
    """The document with a generated table replaced."""
    old = section(text, name)
    start = text.index(old, text.index(f"<!-- {name}:")) if old else text.index(f"<!-- end of {name} -->")
    return text[:start] + content + text[start + len(old) :]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gpuless.tables", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare docs/gpu.md instead")
    parser.add_argument("--mix", action="store_true", help="print instructions of hot loops by pipe, no more")
    options = parser.parse_args(arguments)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says on stderr what it lacks on this CPU
    found = budgets()
    if options.mix:
        print(mix_table(found))
        return 0
    executed = executed_traffic()
    moved = wavefront_tables.transactions()
    wrong = faults(found) + too_many_bytes(executed) + wavefront_tables.too_many(moved)
    wrong += [f"{name} has no Triton kernel" for name in missing()]
    contents = {
        "budgets": budget_table(found),
        "transactions": wavefront_tables.table(moved),
        "bytes": bytes_table(executed),
        "predicted": predicted_table(executed),
    }
    return conclude(contents, wrong, check=options.check)


def conclude(contents: Mapping[str, str], wrong: Iterable[str], *, check: bool) -> int:
    """Print tables and what is wrong, write docs/gpu.md or `check` it; returns the exit status."""
    sentences = list(wrong)
    text = new = DOCUMENT.read_text()
    for name, content in contents.items():
        new = with_section(new, name, content)
        print(f"{name}:\n{content}\n")
    if check and new != text:
        sentences.append("docs/gpu.md is not what the code is: run `make gpu-report`")
    elif not check:
        DOCUMENT.write_text(new)
    for sentence in sentences:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
