"""Branches, barriers, the end (PTX ISA 9.7.12, 9.7.13.1). These closures return where to go on, or None."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuless.instructions_warp import warp_barrier
from gpuless.operands import (
    Closure,
    instruction,
    is_register,
    literal,
    predicate,
    source,
    target,
    unsupported,
)
from gpuless.program import Instruction

if TYPE_CHECKING:
    from gpuless.machine import Machine


@instruction("bra", control=True)
def _branch(m: Machine, ins: Instruction) -> Closure:
    to = m.program.labels[ins.operands[0]]
    return lambda: to


@instruction("brx", control=True)
def _branch_table(m: Machine, ins: Instruction) -> Closure:
    places = np.array([m.program.labels[name] for name in m.program.branch_tables[ins.operands[1]]])
    index = source(m, ins, ins.operands[0], "u32")

    def run() -> None:
        mask = m.active.mask
        chosen = np.where(mask, index, 0)
        if int(chosen.max()) >= len(places):
            m.report(
                "branch", ins, np.flatnonzero(chosen >= len(places)), "brx.idx past the end of its table"
            )
            chosen = np.minimum(chosen, len(places) - 1)
        where = places[chosen]
        for pc in np.unique(where[mask]):
            m.park(int(pc), mask & (where == pc))

    return run


@instruction("ret", "exit", control=True)
def _end(m: Machine, ins: Instruction) -> Closure:
    return lambda: m.retire(m.active.mask)


@instruction("trap", control=True)
def _trap(m: Machine, ins: Instruction) -> Closure:
    def run() -> None:
        m.report("trap", ins, np.flatnonzero(m.active.mask), "the kernel trapped")
        m.retire(m.active.mask)

    return run


@instruction("brkpt")
def _nothing(m: Machine, ins: Instruction) -> Closure:
    return lambda: None


@instruction("call", control=True)
def _call(m: Machine, ins: Instruction) -> Closure:
    if "__assertfail" in ins.text:

        def run() -> None:
            m.report("assertion", ins, np.flatnonzero(m.active.mask), "a device-side assertion failed")
            m.retire(m.active.mask)

        return run
    raise unsupported(ins, "make the function __forceinline__ (no recursion, no printf)")


@instruction("bar", "barrier", control=True)
def _barrier(m: Machine, ins: Instruction) -> Closure:
    if ins.has("warp"):
        run = warp_barrier(m, ins)

        def warp() -> int:
            run()
            return ins.index + 1

        return warp
    if ins.has("cluster", "arrive") or not ins.has("sync", "red"):
        raise unsupported(
            ins, "warp specialisation and clusters are not emulated: use barriers of the whole CTA"
        )
    if ins.has("red"):
        return _reducing_barrier(m, ins)
    number = literal(ins.operands[0], "u32")
    padded = -(-m.threads // 32) * 32
    if len(ins.operands) > 1:
        count = literal(ins.operands[1], "u32")
        if count is None or count != padded:
            raise unsupported(ins, f"a barrier of some threads only: the CTA has {m.threads}")
    if number is not None:
        return lambda: m.barrier(ins.index, number)
    if not is_register(m, ins.operands[0]):
        raise unsupported(ins)
    which = source(m, ins, ins.operands[0], "u32")

    def run() -> int | None:
        numbers = np.unique(which[m.active.mask])
        if len(numbers) > 1:
            raise unsupported(ins, "threads at one barrier instruction with different barrier numbers")
        return m.barrier(ins.index, int(numbers[0]))

    return run


def _reducing_barrier(m: Machine, ins: Instruction) -> Closure:
    """bar.red: __syncthreads_count, _and, _or."""
    kind = next(x for x in ins.modifiers if x in ("popc", "and", "or"))
    d = target(m, ins, ins.operands[0], "u32" if kind == "popc" else "pred")
    p = predicate(m, ins, ins.operands[-1])
    if len(ins.operands) not in (3, 4) or literal(ins.operands[1], "u32") is None:
        raise unsupported(ins)
    number = literal(ins.operands[1], "u32")

    def run() -> int | None:
        if m.where is not True:
            raise unsupported(ins, "CTAs or threads reach it at different times")
        yes = m.per_cta(p() & m.live)
        live = m.per_cta(m.live)
        result = {"popc": yes.sum(1), "or": yes.any(1), "and": (yes | ~live).all(1)}[kind]
        np.copyto(d, np.repeat(result, m.lanes // m.ctas), casting="unsafe", where=m.where)
        return m.barrier(ins.index, number)

    return run
