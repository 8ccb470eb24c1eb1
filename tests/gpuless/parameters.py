"""Parameters of a kernel that are structs: loads through registers, and the 8-byte slots that hold pointers.

nvcc takes the address of a struct: ``mov.b64 %rd1, param; add.s64 %rd2, %rd1, 64; ld.param.u64 %rd3,
[%rd2+-8]``. It is a constant, and folded here, so that the rest of the emulator sees only ``[param+56]``.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict

from gpuless.program import Instruction, Program, split_address, split_vector, type_bits
from gpuless.report import Unsupported

SLOT = 8  # bytes: of a pointer
_OFFSET = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)")
_NAME = re.compile(r"[%$A-Za-z_][\w$@.]*")


def slot(program: Program, parameter: str, offset: int) -> str:
    """Name of the slot that a byte of a parameter is in; of the parameter where that is no larger."""
    size = program.parameters[parameter]
    return parameter if size <= SLOT else f"{parameter}+{offset // SLOT * SLOT}"


def slots(program: Program) -> dict[str, tuple[str, int]]:
    """All slots: name -> (parameter, first byte)."""
    return {
        slot(program, parameter, offset): (parameter, offset)
        for parameter, size in program.parameters.items()
        for offset in range(0, size, SLOT)
    }


def loaded_slots(program: Program, ins: Instruction) -> list[str]:
    """For each output of an ld.param the slot that it is loaded from."""
    parameter, offset = split_address(ins.operands[1])
    item = type_bits(ins.types[-1]) // 8
    return [slot(program, parameter, offset + i * item) for i in range(len(split_vector(ins.operands[0])))]


def fold_addresses(program: Program) -> None:
    """Loads through registers that hold a parameter's address become loads by name; what computed it goes.

    Raises:
        Unsupported: an address that is not the same constant wherever it may come from, or that is used for
            anything but loads.
    """
    writers: dict[str, list[Instruction]] = defaultdict(list)
    for ins in program.instructions:
        if ins.operands and ins.opcode not in ("st", "red", "bra"):
            for register in _NAME.findall(ins.operands[0]):
                writers[register].append(ins)
    known: dict[str, tuple[str, int]] = {}  # register -> parameter, offset
    folded: set[int] = set()
    changed = True
    while changed:
        changed = False
        for register, instructions in writers.items():
            values = {_address(program, ins, known) for ins in instructions}
            if register not in known and len(values) == 1 and None not in values:
                known[register] = values.pop()
                folded |= {ins.index for ins in instructions}
                changed = True
    kept, moved = [], [0]
    for ins in program.instructions:
        if ins.index not in folded:
            kept.append(dataclasses.replace(_by_name(program, ins, known), index=len(kept)))
        moved.append(len(kept))
    program.instructions[:] = kept
    program.labels.update({label: moved[index] for label, index in program.labels.items()})


def _address(program: Program, ins: Instruction, known: dict[str, tuple[str, int]]) -> tuple[str, int] | None:
    """The constant address of a parameter that an instruction computes; None if it does something else."""
    if ins.guard:
        return None
    if ins.opcode == "mov" or (ins.opcode == "cvta" and ins.has("param")):
        name, _, offset = ins.operands[1].partition("+")
        if name in program.parameters:
            return name, int(offset or "0", 0)
        return known.get(ins.operands[1])
    if ins.opcode in ("add", "sub") and ins.operands[1] in known and _OFFSET.fullmatch(ins.operands[2]):
        parameter, offset = known[ins.operands[1]]
        return parameter, offset + int(ins.operands[2], 0) * (1 if ins.opcode == "add" else -1)
    return None


def _by_name(program: Program, ins: Instruction, known: dict[str, tuple[str, int]]) -> Instruction:
    if ins.opcode in ("ld", "ldu") and (base := split_address(ins.operands[1]))[0] in known:
        parameter, offset = known[base[0]]
        modifiers = ins.modifiers if ins.has("param") else ("param", *ins.modifiers)
        operands = (ins.operands[0], f"[{parameter}+{offset + base[1]}]")
        return dataclasses.replace(ins, modifiers=modifiers, operands=operands)
    loads = ins.opcode in ("ld", "ldu") and ins.has("param")
    names = {name for operand in ins.operands for name in _NAME.findall(operand)}
    for name in sorted(names & (known.keys() | program.parameters.keys())):
        if not (loads and name in program.parameters):
            parameter = name if name in program.parameters else known[name][0]
            raise Unsupported(
                f"line {ins.line}: the address of parameter {parameter} is used in `{ins.text}`: only loads"
                " from constant offsets are emulated. Do not index into a struct parameter with a variable,"
                " or choose between parts of one by pointer"
            )
    if loads and split_address(ins.operands[1])[0].startswith("%"):
        raise Unsupported(
            f"line {ins.line}: `{ins.text}` loads from no constant offset of a parameter. Do not index into a"
            " struct parameter with a variable"
        )
    return ins
