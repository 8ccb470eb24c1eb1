"""From operands in the text to numpy rows, once per instruction and machine; the table of instructions."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.memory import LOCAL_BASE
from gpuless.program import Instruction, ParseError, split_address, type_bits
from gpuless.report import Unsupported

if TYPE_CHECKING:
    from gpuless.machine import Machine

Closure = Callable[[], int | None]
Binder = Callable[["Machine", Instruction], Closure]
BINDERS: dict[str, Binder] = {}
CONTROL: set[str] = set()  # opcodes whose closure returns the next program counter, or None

_DTYPE = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "e4m3": np.uint8, "e5m2": np.uint8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "e4m3x2": np.uint16, "e5m2x2": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "tf32": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "pred": np.bool_, "f16x2": np.float16, "bf16x2": np.uint16, "f32x2": np.float32,
}  # fmt: skip
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")


def instruction(*opcodes: str, control: bool = False) -> Callable[[Binder], Binder]:
    """Register a function that binds these opcodes: (machine, instruction) -> closure."""

    def register(binder: Binder) -> Binder:
        BINDERS.update(dict.fromkeys(opcodes, binder))
        CONTROL.update(opcodes if control else ())
        return binder

    return register


def unsupported(ins: Instruction, remedy: str = "") -> Unsupported:
    """The exception for an instruction, or a form of it, that is not emulated."""
    remedy = remedy or "compile for a target, or with options, that avoid it, or add it to tests/gpuless"
    return Unsupported(f"PTX line {ins.line}: `{ins.text}` is not emulated: {remedy}")


def dtype_of(kind: str) -> type:
    """numpy's type for the values of a PTX type; bf16, tf32 and fp8 as their bits."""
    return _DTYPE[kind]


def literal(text: str, kind: str) -> int | None:
    """Bits of a literal of this type; None if it is none."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        bits = int(text[2:], 16)
        if kind == "f64":
            return int.from_bytes(
                struct.pack("<d", struct.unpack("<f", struct.pack("<I", bits))[0]), "little"
            )
        return bits
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        bits = int(text[2:], 16)
        if kind == "f32":
            return int.from_bytes(
                struct.pack("<f", struct.unpack("<d", struct.pack("<Q", bits))[0]), "little"
            )
        return bits
    if _NUMBER.fullmatch(text):
        value = int(text.rstrip("U"), 0)
    elif re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", text) and kind in ("f32", "f64"):
        value = float(text)
    else:
        return None
    if kind in ("f32", "f64"):
        return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", float(value)), "little")
    return value & (1 << max(type_bits(kind), 8)) - 1


def constant(ins: Instruction, operand: str) -> int:
    """An operand that must be an integer literal."""
    if not _NUMBER.fullmatch(operand):
        raise unsupported(ins, f"{operand} must be a constant here")
    return int(operand.rstrip("U"), 0)


def is_register(m: Machine, operand: str) -> bool:
    """True for a register of the program (special registers are not)."""
    return operand in m.program.registers


def symbol_address(m: Machine, name: str) -> int | None:
    """Address of a variable in its own state space; None for other names."""
    symbol = m.program.symbols.get(name)
    if symbol is None:
        return None
    if symbol.space == "shared":
        return m.shared_symbols[name]
    return LOCAL_BASE + symbol.offset if symbol.space == "local" else m.program.variables[name].ctypes.data


def source(m: Machine, ins: Instruction, operand: str, kind: str) -> NDArray | np.generic:
    """The values of an operand: a row, a scalar for a literal, a row twice as long for a packed type."""
    want, dtype = type_bits(kind), _DTYPE[kind]
    if operand in m.program.registers:
        bits, slot = m.program.registers[operand]
        if bits == 1 or kind == "pred":
            if bits != 1 or kind != "pred":
                raise ParseError(
                    f"line {ins.line}: {operand} has {bits} bits, {kind} is needed in {ins.text}"
                )
            return m.rows["pred"][slot]
        row = m.rows[f"b{bits}"][slot]
        if want == bits:
            return row.view(dtype)
        if want < bits:
            return row.view(dtype)[:: bits // want]
        raise ParseError(f"line {ins.line}: {operand} has {bits} bits, {kind} is needed in {ins.text}")
    if operand in m.special:
        row = m.special[operand]
        if want > row.itemsize * 8:
            return row.astype(dtype)
        return row.view(dtype)[:: row.itemsize * 8 // want]
    value = literal(operand, kind)
    if value is None:
        name, _, offset = operand.partition("+")
        value = symbol_address(m, name.strip())
        if value is None:
            raise unsupported(ins, f"operand {operand} is not known")
        value += int(offset or "0", 0)
    if kind == "pred":
        return np.bool_(value & 1)
    scalar = np.array([value & (1 << want) - 1], f"u{want // 8}").view(dtype)
    return np.tile(scalar, m.lanes) if kind in PACKED else scalar[0]


def predicate(m: Machine, ins: Instruction, operand: str) -> Callable[[], NDArray]:
    """A predicate operand, which may be negated."""
    row = source(m, ins, operand.lstrip("!"), "pred")
    return (lambda: ~row) if operand.startswith("!") else (lambda: row)


def target(m: Machine, ins: Instruction, operand: str, kind: str) -> NDArray:
    """The row that an operand of exactly this width is written to."""
    want, dtype = type_bits(kind), _DTYPE[kind]
    if operand == "_":
        row = np.empty(m.lanes, np.bool_ if want == 1 else f"u{max(want, 8) // 8}")
        return row if kind == "pred" else row.view(dtype)
    if operand not in m.program.registers:
        raise ParseError(f"line {ins.line}: {operand} is not a register in {ins.text}")
    bits, slot = m.program.registers[operand]
    if kind == "pred" or bits == 1:
        if bits != 1 or kind != "pred":
            raise ParseError(f"line {ins.line}: {operand} has {bits} bits, {kind} is written in {ins.text}")
        return m.rows["pred"][slot]
    if bits != want:
        raise ParseError(f"line {ins.line}: {operand} has {bits} bits, {kind} is written in {ins.text}")
    return m.rows[f"b{bits}"][slot].view(dtype)


def wide_target(m: Machine, ins: Instruction, operand: str, kind: str) -> NDArray:
    """Like target, for a register that may be wider: the row has the register's width and the type's
    signedness.
    """
    if operand == "_" or kind == "pred":
        return target(m, ins, operand, kind)
    bits, slot = m.program.registers[operand]
    if bits == type_bits(kind):
        return target(m, ins, operand, kind)
    return m.rows[f"{'s' if kind[0] == 's' else 'b'}{bits}"][slot]


def assign(m: Machine, row: NDArray, values: NDArray | np.generic) -> None:
    """row = values in the active lanes; `row` may be of a packed type, twice as long."""
    where = m.where
    if where is not True and len(row) == 2 * m.lanes:
        where = np.repeat(where, 2)
    np.copyto(row, values, casting="unsafe", where=where)


def scatter(row: NDArray, lanes: NDArray | slice, values: NDArray) -> None:
    """row[lanes] = values, one value per lane, widened by the row's signedness."""
    row[lanes] = values


def address_of(m: Machine, ins: Instruction, operand: str) -> Callable[[NDArray | slice], NDArray]:
    """[register + offset] -> function of lanes giving their addresses as int64."""
    base, offset = split_address(operand)
    if is_register(m, base):
        bits, slot = m.program.registers[base]
        row = m.rows[f"{'u' if bits == 32 else 's'}{bits}"][slot]
        if bits == 64 and offset == 0:
            return lambda lanes: row[lanes]
        return lambda lanes: np.add(row[lanes], offset, dtype=np.int64)
    value = literal(base, "s64") if symbol_address(m, base) is None else symbol_address(m, base)
    if value is None:
        raise unsupported(ins, f"address {operand} is not known")
    fixed = np.full(m.lanes, value + offset, np.int64)
    return lambda lanes: fixed[lanes]


def members(m: Machine, ins: Instruction, operand: str, what: str) -> Callable[[], None]:
    """The check of a .sync instruction: every live lane of its member mask is here."""
    mask = source(m, ins, operand, "u32")
    bit = np.uint32(1) << m.special["%laneid"]

    def check() -> None:
        if m.where is True and isinstance(mask, np.uint32) and mask == 0xFFFFFFFF:
            return
        active = m.active.mask
        each = np.where(active, mask, np.uint32(0)).reshape(-1, 32)
        union = np.repeat(np.bitwise_or.reduce(each, axis=1), 32)
        m.check_converged(ins, m.live & (union & bit != 0), f"{what} without all lanes of its member mask")
        outside = active & (mask & bit == 0)
        if np.count_nonzero(outside):
            m.report(
                "divergence",
                ins,
                np.flatnonzero(outside),
                f"{what} by a lane that its member mask leaves out",
            )

    return check


def whole_warp(m: Machine, ins: Instruction, what: str) -> Callable[[], None]:
    """The check of an .aligned instruction: all lanes of the warp are here."""

    def check() -> None:
        if m.where is not True:
            m.check_converged(ins, m.exists, f"{what} in a warp that is not together")
        elif not m.active.everyone:
            m.check_converged(ins, m.exists & m.present, f"{what} after lanes of the warp have ended")

    return check
