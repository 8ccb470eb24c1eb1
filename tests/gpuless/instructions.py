"""Binding: an instruction and a machine give a closure without arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuless import (
    instructions_bits,
    instructions_compare,
    instructions_control,
    instructions_conversion,
    instructions_float,
    instructions_integer,
    instructions_matrix,
    instructions_memory,
    instructions_warp,
    instructions_wgmma,
)
from gpuless.operands import BINDERS, CONTROL, Closure, unsupported
from gpuless.program import Instruction

if TYPE_CHECKING:
    from gpuless.machine import Machine

# Their import fills the table of instructions.
_GROUPS = (
    instructions_bits,
    instructions_compare,
    instructions_control,
    instructions_conversion,
    instructions_matrix,
    instructions_memory,
    instructions_warp,
    instructions_wgmma,
)
_SHARED_NAMES = (
    "add", "sub", "mul", "mad", "div", "rem", "min", "max", "neg", "abs", "and", "or", "xor", "not",
    "shl", "shr", "addc", "subc",
)  # fmt: skip


def bind(m: Machine, ins: Instruction) -> tuple[Closure, bool]:
    """(closure, whether it is control flow: returns the next program counter or None)."""
    if ins.opcode in _SHARED_NAMES:
        kind = ins.types[-1] if ins.types else ""
        floats = kind.startswith(("f", "bf")) and ins.opcode not in ("and", "or", "xor", "not")
        closure = (instructions_float.floating if floats else instructions_integer.integer)(m, ins)
    elif ins.opcode in BINDERS:
        closure = BINDERS[ins.opcode](m, ins)
    else:
        remedy = "mbarrier, tcgen05, clusters and TMA are not: compile without TMA and warp specialisation"
        raise unsupported(ins, remedy)
    if m.matrix_registers:
        closure = instructions_wgmma.watch_registers(m, ins, closure, m.matrix_registers)
    control = ins.opcode in CONTROL
    if ins.guard is None:
        return closure, control
    return (_guarded_control if control else _guarded)(m, ins, closure), control


def _guarded(m: Machine, ins: Instruction, closure: Closure) -> Closure:
    row = m.rows["pred"][m.program.registers[ins.guard][1]]
    narrow = np.greater if ins.negated else np.logical_and  # mask > p is mask and not p

    def run() -> None:
        active = m.active
        mask = narrow(active.mask, row)
        count = int(np.count_nonzero(mask))
        if count == active.count:
            closure()
        elif count:
            m.active, m.where = active.narrow(mask, count), mask
            closure()
            m.active, m.where = active, active.where

    return run


def _guarded_control(m: Machine, ins: Instruction, closure: Closure) -> Closure:
    row = m.rows["pred"][m.program.registers[ins.guard][1]]
    narrow = np.greater if ins.negated else np.logical_and
    following = ins.index + 1

    def run() -> int | None:
        active = m.active
        mask = narrow(active.mask, row)
        count = int(np.count_nonzero(mask))
        if count == active.count:
            return closure()
        if count == 0:
            return following
        m.park(following, active.mask & ~mask)
        m.activate(mask)
        target = closure()
        if target is not None:
            m.park(target, mask)
        return None

    return run
