"""Bugs planted in compiled kernels: one statement of the PTX removed or weakened at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpuless.memory import space_of
from gpuless.parser import parse
from gpuless.program import Instruction, Program


@dataclass(frozen=True)
class Mutant:
    """A changed kernel, and why the change can do no harm (empty: it must be caught)."""

    what: str
    ptx: str
    harmless: str


def mutants(ptx: str, name: str | None = None) -> Iterator[Mutant]:
    """Every barrier and fence removed, every wait weakened by one group, every guard of a global access
    removed.
    """
    program, lines = parse(ptx, name), ptx.splitlines()
    for ins in program.instructions:
        change = _change(ins, lines[ins.line - 1])
        if change is None:
            continue
        label, line = change
        reason = ""
        if ins.opcode == "cp":
            reason = _wait_is_repeated(program, ins.index)
        elif ins.opcode in ("bar", "barrier"):
            reason = _barrier_orders_nothing(program, ins.index)
        changed = [*lines[: ins.line - 1], line, *lines[ins.line :]]
        if ins.opcode == "bar" and ins.has("warp"):  # without any, the emulator would not look at lanes
            start = program.instructions[0].line - 1
            changed[start] = f"bar.warp.sync -1; {changed[start]}"
        yield Mutant(f"line {ins.line}: {label} `{ins.text}`", "\n".join(changed), reason)


def weaken_all_waits(ptx: str, name: str | None = None) -> str:
    """Every cp.async.wait_group allows one group more: what repeats a wait is weakened together with it."""
    lines = ptx.splitlines()
    for ins in parse(ptx, name).instructions:
        if ins.opcode == "cp" and ins.has("wait_group"):
            lines[ins.line - 1] = _change(ins, lines[ins.line - 1])[1]
    return "\n".join(lines)


def _change(ins: Instruction, line: str) -> tuple[str, str] | None:
    if ins.opcode in ("bar", "barrier") or ins.name.startswith(("fence.proxy", "wgmma.fence")):
        return "without", ""
    if ins.opcode in ("cp", "wgmma") and ins.has("wait_group"):
        return "weaker", re.sub(r"(\d+)(\s*;)", lambda m: f"{int(m[1]) + 1}{m[2]}", line)
    if ins.guard and ins.opcode in ("ld", "st") and space_of(ins) == "global":
        return "without its guard", re.sub(r"@!?%\w+\s", "", line)
    if ins.opcode == "selp" and ins.operands[1:3] == ("16", "0"):  # the bytes that a cp.async reads
        return "always 16", line.replace("16, 0,", "16, 16,")
    return None


def _is_wait(ins: Instruction) -> bool:
    return ins.opcode == "cp" and ins.has("wait_group", "wait_all")


def _count(ins: Instruction) -> int:
    return int(ins.operands[0]) if ins.has("wait_group") else 0


def _search(
    program: Program, start: int, forward: bool, stop: Callable[[Instruction], bool]
) -> tuple[list[Instruction], bool]:
    """Instructions that paths from `start` meet up to and with the first that stops them; and whether one
    gets to the end.
    """
    code = program.instructions
    following: dict[int, list[int]] = {i: [] for i in range(len(code))}
    ends = set()
    for ins in code:
        if ins.opcode == "bra":
            following[ins.index].append(program.labels[ins.operands[0]])
        if ins.opcode not in ("ret", "exit") and (ins.opcode != "bra" or ins.guard):
            following[ins.index].append(ins.index + 1)
    if forward:
        steps, ends = (
            following,
            {ins.index for ins in code if ins.opcode in ("ret", "exit") and not ins.guard},
        )
    else:
        steps = {i: [] for i in following}
        for i, successors in following.items():
            for j in successors:
                if j in steps:
                    steps[j].append(i)
        ends = {0}
    met, todo, escaped = set(), list(steps[start]), start in ends
    while todo:
        at = todo.pop()
        if at in met or at >= len(code):
            continue
        met.add(at)
        if not stop(code[at]):
            escaped |= at in ends
            todo += steps[at]
    return [code[i] for i in met], escaped


def _wait_is_repeated(program: Program, index: int) -> str:
    """A wait changes nothing if on all ways to it, or on from it, another one does the same with no use in
    between.
    """
    count = _count(program.instructions[index])

    def before(ins: Instruction) -> bool:
        return ins.opcode == "cp" and (ins.has("commit_group") or (_is_wait(ins) and _count(ins) <= count))

    met, escaped = _search(program, index, False, before)
    if not escaped and not any(ins.has("commit_group") for ins in met if ins.opcode == "cp"):
        return "an earlier wait has done the same, and nothing was committed since"

    def after(ins: Instruction) -> bool:
        return (_is_wait(ins) and _count(ins) <= count) or _uses_shared(ins)

    met, escaped = _search(program, index, True, after)
    if not escaped and not any(_uses_shared(ins) for ins in met):
        return "a later wait does the same before anything uses the data"
    return ""


def _uses_shared(ins: Instruction) -> bool:
    memory = ins.opcode in ("ld", "st", "atom", "red", "ldmatrix", "stmatrix") and space_of(ins) != "global"
    return (
        (memory and space_of(ins) != "param")
        or ins.opcode in ("bar", "wgmma")
        or (ins.opcode == "cp" and not _is_wait(ins))
    )


def _barrier_orders_nothing(program: Program, index: int) -> str:
    """A barrier changes nothing if between the barriers around it shared memory is only read."""
    around = []
    for forward in (False, True):
        met, _ = _search(program, index, forward, lambda ins: ins.opcode in ("bar", "barrier"))
        around += met
    for ins in around:
        writes = ins.opcode in ("st", "atom", "red", "stmatrix") and space_of(ins) in ("shared", "generic")
        arrives = _is_wait(ins) and not _wait_is_repeated(program, ins.index)
        if writes or arrives or ins.opcode == "wgmma" or (ins.opcode == "cp" and len(ins.operands) > 2):
            return ""
    return "shared memory is only read between the barriers before and after it"
