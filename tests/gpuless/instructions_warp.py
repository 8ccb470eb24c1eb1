"""What the lanes of a warp do together: shuffles, votes, reductions (PTX ISA 9.7.9.6, 9.7.13.9 and
following).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.operands import (
    Closure,
    assign,
    dtype_of,
    instruction,
    members,
    predicate,
    source,
    target,
    unsupported,
)
from gpuless.program import Instruction, type_bits

if TYPE_CHECKING:
    from gpuless.machine import Machine

WARP = 32


@instruction("shfl")
def _shuffle(m: Machine, ins: Instruction) -> Closure:
    if not ins.has("sync"):
        raise unsupported(ins, "use __shfl_sync")
    mode = next(x for x in ins.modifiers if x in ("up", "down", "bfly", "idx"))
    to, *p = [o.strip() for o in ins.operands[0].split("|")]
    d = target(m, ins, to, "b32")
    valid = target(m, ins, p[0], "pred") if p else None
    a = np.broadcast_to(source(m, ins, ins.operands[1], "b32"), m.lanes)
    by, clamp = (source(m, ins, o, "u32") for o in ins.operands[2:4])
    check = members(m, ins, ins.operands[4], "shfl.sync")
    lane = m.special["%laneid"].astype(np.int64)
    base = np.arange(m.lanes) - lane

    def plan() -> tuple[NDArray, NDArray]:
        b, c = np.asarray(by, np.int64) & 31, np.asarray(clamp, np.int64)
        segment, limit = c >> 8 & 31, c & 31
        first = lane & segment
        last = first | (limit & ~segment)
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
        inside = j >= last if mode == "up" else j <= last
        return np.where(inside, j, lane) + base, inside

    fixed = plan() if not isinstance(by, np.ndarray) and not isinstance(clamp, np.ndarray) else None

    def run() -> None:
        check()
        origin, inside = fixed or plan()
        if not m.active.everyone:
            bad = m.active.mask & ~m.active.mask[origin]
            if np.count_nonzero(bad):
                m.report(
                    "divergence", ins, np.flatnonzero(bad), "shfl.sync reads a lane that does not take part"
                )
        value = a[origin]
        if valid is not None:
            assign(m, valid, inside)
        assign(m, d, value)

    return run


def _by_warp(mask: NDArray) -> NDArray:
    return mask.reshape(-1, WARP)


def _ballot(mask: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """One bit per lane, [warps]."""
    return np.packbits(_by_warp(mask), axis=1, bitorder="little").view(np.uint32).ravel()


@instruction("vote")
def _vote(m: Machine, ins: Instruction) -> Closure:
    if not ins.has("sync"):
        raise unsupported(ins, "use the .sync form")
    kind = next(x for x in ins.modifiers if x in ("all", "any", "uni", "ballot"))
    d = target(m, ins, ins.operands[0], "b32" if kind == "ballot" else "pred")
    p = predicate(m, ins, ins.operands[1])
    check = members(m, ins, ins.operands[2], "vote.sync")

    def run() -> None:
        check()
        here, yes = m.active.mask, p() & m.active.mask
        if kind == "ballot":
            result = _ballot(yes)
        elif kind == "any":
            result = _by_warp(yes).any(1)
        else:
            every = (_by_warp(yes) | ~_by_warp(here)).all(1)
            result = every | ~_by_warp(yes).any(1) if kind == "uni" else every
        assign(m, d, np.repeat(result, WARP))

    return run


@instruction("activemask")
def _active_mask(m: Machine, ins: Instruction) -> Closure:
    d = target(m, ins, ins.operands[0], "b32")
    return lambda: assign(m, d, np.repeat(_ballot(m.active.mask), WARP))


@instruction("elect")
def _elect(m: Machine, ins: Instruction) -> Closure:
    to, p = (o.strip() for o in ins.operands[0].split("|"))
    d, elected = target(m, ins, to, "b32"), target(m, ins, p, "pred")
    check = members(m, ins, ins.operands[1], "elect.sync")

    def run() -> None:
        check()
        leader = np.repeat(_by_warp(m.active.mask).argmax(1), WARP)
        assign(m, elected, m.special["%laneid"] == leader)
        assign(m, d, leader)

    return run


_REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@instruction("redux")
def _reduce(m: Machine, ins: Instruction) -> Closure:
    kind = ins.types[-1]
    operation = next(x for x in ins.modifiers if x in _REDUCE)
    d, a = target(m, ins, ins.operands[0], kind), source(m, ins, ins.operands[1], kind)
    check = members(m, ins, ins.operands[2], "redux.sync")
    reduce = _REDUCE[operation]
    if kind == "f32":
        neutral = np.nan if not ins.has("NaN") else np.inf if operation == "min" else -np.inf
        reduce = reduce if ins.has("NaN") else {"min": np.fmin, "max": np.fmax}[operation]
    else:
        limits = np.iinfo(dtype_of(kind))
        neutral = {"min": limits.max, "max": limits.min, "and": ~dtype_of(kind)(0)}.get(operation, 0)

    def run() -> None:
        check()
        values = np.where(m.active.mask, np.abs(a) if ins.has("abs") else a, dtype_of(kind)(neutral))
        assign(m, d, np.repeat(reduce.reduce(_by_warp(values), axis=1, dtype=values.dtype), WARP))

    return run


@instruction("match")
def _match(m: Machine, ins: Instruction) -> Closure:
    to, *p = [o.strip() for o in ins.operands[0].split("|")]
    d = target(m, ins, to, "b32")
    a = source(m, ins, ins.operands[1], f"b{type_bits(ins.types[-1])}")
    check = members(m, ins, ins.operands[2], "match.sync")
    everybody = target(m, ins, p[0], "pred") if p else None

    def run() -> None:
        check()
        values, here = _by_warp(a), _by_warp(m.active.mask)
        same = (values[:, :, None] == values[:, None, :]) & here[:, None, :]
        masks = np.packbits(same, axis=2, bitorder="little").view(np.uint32).ravel()
        if ins.has("any"):
            assign(m, d, masks)
            return
        every = masks == np.repeat(_ballot(m.active.mask), WARP)
        every = np.repeat((_by_warp(every) | ~here).all(1), WARP)
        assign(m, d, np.where(every, masks, np.uint32(0)))
        if everybody is not None:
            assign(m, everybody, every)

    return run


def warp_barrier(m: Machine, ins: Instruction) -> Closure:
    """bar.warp.sync mask: orders the memory of the lanes of a warp."""
    check = members(m, ins, ins.operands[0], "bar.warp.sync")

    def run() -> None:
        check()
        m.shared.synchronise_warp(m.active.mask)

    return run
