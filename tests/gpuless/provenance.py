"""Which arguments an address can have been computed from, by data flow over the whole program."""

from __future__ import annotations

import re

from gpuless.memory import space_of
from gpuless.parameters import loaded_slots, slots
from gpuless.program import Program, split_vector, type_bits

ANYWHERE = ""  # stands for memory that pointers in memory lead to


def reachable(program: Program) -> dict[int, frozenset[str]]:
    """For each memory instruction the parameters (their slots) and variables its address is computed from.

    A flow-insensitive union over all instructions; a 64-bit value loaded from memory may be any pointer.
    """
    everything = set(slots(program)) | {
        s for s, v in program.symbols.items() if v.space in ("global", "const")
    }
    origin: dict[str, set[str]] = {name: {name} for name in (*everything, ANYWHERE)}
    moves: list[tuple[list[str], list[str]]] = []
    for ins in program.instructions:
        if not ins.operands or ins.opcode in ("st", "red", "bra"):
            continue
        if ins.opcode in ("ld", "ldu") and space_of(ins) == "param":
            outputs = split_vector(ins.operands[0])
            moves += [([o], [s]) for o, s in zip(outputs, loaded_slots(program, ins), strict=True)]
            continue
        outputs, *inputs = (_names(o) for o in ins.operands)
        if ins.opcode in ("ld", "ldu", "atom"):
            # What memory holds does not come from the pointer to it, but may be a pointer itself.
            inputs = [[*everything, ANYWHERE]] if ins.types and type_bits(ins.types[-1]) == 64 else []
        moves.append((outputs, [name for part in inputs for name in part]))
    changed = True
    while changed:
        changed = False
        for outputs, inputs in moves:
            reach = set().union(*(origin.get(name, ()) for name in inputs))
            for register in outputs:
                known = origin.setdefault(register, set())
                if not reach <= known:
                    known |= reach
                    changed = True
    result = {}
    for ins in program.instructions:
        if ins.opcode in ("ld", "ldu", "st", "red", "atom", "cp") and len(ins.operands) > 1:
            place = 0 if ins.opcode in ("st", "red") else 1
            names = set().union(*(origin.get(name, ()) for name in _names(ins.operands[place])))
            result[ins.index] = frozenset(names or {*everything, ANYWHERE})
    return result


def written(program: Program, reach: dict[int, frozenset[str]]) -> frozenset[str]:
    """Parameters and variables through which the program may write."""
    return frozenset().union(
        *(
            reach[ins.index]
            for ins in program.instructions
            if ins.opcode in ("st", "red", "atom") and ins.index in reach
        )
    )


_NAME = re.compile(r"[%$A-Za-z_][\w$@.]*")


def _names(operand: str) -> list[str]:
    return _NAME.findall(operand)
