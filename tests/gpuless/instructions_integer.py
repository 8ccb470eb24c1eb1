"""Integer arithmetic, bits, comparison and selection (PTX ISA 9.7.1, 9.7.2, 9.7.6 to 9.7.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.operands import (
    Closure,
    assign,
    dtype_of,
    instruction,
    predicate,
    source,
    target,
    unsupported,
)
from gpuless.program import Instruction, type_bits

if TYPE_CHECKING:
    from gpuless.machine import Machine

_UFUNC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative,
    "abs": np.absolute, "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip


def simple(m: Machine, ins: Instruction, ufunc: np.ufunc, kinds: list[str], result: str) -> Closure:
    """d = ufunc(operands), all rows of their own type."""
    d = target(m, ins, ins.operands[0], result)
    values = [source(m, ins, o, k) for o, k in zip(ins.operands[1:], kinds, strict=True)]
    if len(values) == 1:
        (a,) = values
        return lambda: ufunc(a, out=d, where=m.where)
    a, b = values
    return lambda: ufunc(a, b, out=d, where=m.where)


def computed(m: Machine, ins: Instruction, function: object, kinds: list[str], result: str) -> Closure:
    """d = function(operands), for what is more than one ufunc."""
    d = target(m, ins, ins.operands[0], result)
    values = [source(m, ins, o, k) for o, k in zip(ins.operands[1:], kinds, strict=True)]
    return lambda: assign(m, d, function(*values))


def integer(m: Machine, ins: Instruction) -> Closure:
    """The opcodes that exist for floating point too come here for integers and bits; see instructions.py."""
    return _INTEGER[ins.opcode](m, ins)


def _arithmetic(m: Machine, ins: Instruction) -> Closure:
    kind = ins.types[-1]
    if kind == "pred":
        ufunc = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}[
            ins.opcode
        ]
        d = target(m, ins, ins.operands[0], kind)
        values = [predicate(m, ins, o) for o in ins.operands[1:]]
        return lambda: ufunc(*(v() for v in values), out=d, where=m.where)
    if ins.has("cc") or ins.opcode in ("addc", "subc"):
        return _with_carry(m, ins)
    if ins.has("sat"):
        limits, ufunc = np.iinfo(dtype_of(kind)), _UFUNC[ins.opcode]
        return computed(
            m,
            ins,
            lambda a, b: np.clip(ufunc(a, b, dtype=np.int64), limits.min, limits.max),
            [kind] * 2,
            kind,
        )
    if ins.opcode in ("shl", "shr"):  # numpy shifts by the width or more as PTX does: to 0, or to the sign
        d, a = target(m, ins, ins.operands[0], kind), source(m, ins, ins.operands[1], kind)
        shift, ufunc = source(m, ins, ins.operands[2], "u32"), _UFUNC[ins.opcode]
        bits = type_bits(kind)
        if bits == 32:
            by = shift.view(d.dtype)
            return lambda: ufunc(a, by, out=d, where=m.where)
        return lambda: ufunc(a, np.minimum(shift, bits).astype(d.dtype), out=d, where=m.where)
    return simple(m, ins, _UFUNC[ins.opcode], [kind] * (len(ins.operands) - 1), kind)


def _with_carry(m: Machine, ins: Instruction) -> Closure:
    kind = ins.types[-1].replace("s", "u")
    d = target(m, ins, ins.operands[0], kind)
    a, b = (source(m, ins, o, kind) for o in ins.operands[1:])
    bits, subtract = type_bits(kind), ins.opcode.startswith("sub")
    uses, sets = ins.opcode.endswith("c"), ins.has("cc")

    def run() -> None:
        carry = m.carry.astype(np.uint64) if uses else np.uint64(0)
        if bits == 32:
            wide = np.subtract(a, b, dtype=np.int64) - carry.astype(np.int64) if subtract else None
            wide = np.add(a, b, dtype=np.uint64) + carry if wide is None else wide
            out = (wide < 0) if subtract else (wide >> np.uint64(32)) != 0
            value = wide.astype(np.uint32)
        else:
            value = a - b if subtract else a + b
            out = a < b if subtract else value < a
            last = value - carry if subtract else value + carry
            out = out | ((value < carry) if subtract else (last < value))
            value = last
        assign(m, d, value)
        if sets:
            assign(m, m.carry, out)

    return run


def _multiply(m: Machine, ins: Instruction) -> Closure:
    kind, mad = ins.types[-1], ins.opcode == "mad"
    bits = type_bits(kind)
    if ins.has("cc", "sat"):
        raise unsupported(ins)
    if ins.has("wide"):
        wide = f"{kind[0]}{2 * bits}"
        big = dtype_of(wide)
        d = target(m, ins, ins.operands[0], wide)
        a, b = (source(m, ins, o, kind) for o in ins.operands[1:3])
        if not mad:
            return lambda: np.multiply(a, b, out=d, where=m.where, dtype=big)
        c = source(m, ins, ins.operands[3], wide)
        return lambda: np.add(np.multiply(a, b, dtype=big), c, out=d, where=m.where)
    if ins.has("hi"):
        product = _high_product(bits, kind[0] == "s")
    elif bits == 16 or not mad:
        product = np.multiply
    else:
        product = np.multiply
    if not mad:
        if product is np.multiply:
            return simple(m, ins, np.multiply, [kind] * 2, kind)
        return computed(m, ins, product, [kind] * 2, kind)
    d = target(m, ins, ins.operands[0], kind)
    a, b, c = (source(m, ins, o, kind) for o in ins.operands[1:4])
    return lambda: np.add(product(a, b), c, out=d, where=m.where)


def _high_product(bits: int, signed: bool) -> object:
    if bits < 64:
        wide, narrow = (f"{'i' if signed else 'u'}{n // 8}" for n in (2 * bits, bits))
        return lambda a, b: (np.multiply(a, b, dtype=wide) >> bits).astype(narrow)

    def unsigned(a: NDArray, b: NDArray) -> NDArray:
        low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        ah, al, bh, bl = a >> half, a & low, b >> half, b & low
        middle = ah * bl + (al * bl >> half)
        cross = al * bh + (middle & low)
        return ah * bh + (middle >> half) + (cross >> half)

    def signed_product(a: NDArray, b: NDArray) -> NDArray:
        ua, ub = np.asarray(a).view(np.uint64), np.asarray(b).view(np.uint64)
        zero = np.uint64(0)
        return (unsigned(ua, ub) - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)).view(np.int64)

    return signed_product if signed else unsigned


@instruction("mul24", "mad24")
def _multiply24(m: Machine, ins: Instruction) -> Closure:
    kind, shift = ins.types[-1], 16 if ins.has("hi") else 0
    extend = 8 if kind == "s32" else 0

    def product(a: NDArray, b: NDArray, c: NDArray | None = None) -> NDArray:
        x, y = ((np.left_shift(v, 8) >> 8 if extend else v & np.uint32(0xFFFFFF)) for v in (a, b))
        p = (np.multiply(x, y, dtype=np.int64) >> shift).astype(dtype_of(kind))
        return p if c is None else p + c

    return computed(m, ins, product, [kind] * (len(ins.operands) - 1), kind)


def _divide(m: Machine, ins: Instruction) -> Closure:
    kind, rest = ins.types[-1], ins.opcode == "rem"

    def run(a: NDArray, b: NDArray) -> NDArray:
        zero = b == 0
        divisor = np.where(zero, b.dtype.type(1), b)
        remainder = np.fmod(a, divisor)
        if rest:
            return np.where(zero, a, remainder)
        return np.where(zero, ~b.dtype.type(0), (a - remainder) // divisor)

    return computed(m, ins, run, [kind] * 2, kind)


_INTEGER = {
    **dict.fromkeys((*_UFUNC, "addc", "subc"), _arithmetic),
    "mul": _multiply,
    "mad": _multiply,
    "div": _divide,
    "rem": _divide,
}


@instruction("sad")
def _absolute_difference(m: Machine, ins: Instruction) -> Closure:
    kind = ins.types[-1]
    return computed(m, ins, lambda a, b, c: c + np.where(a < b, b - a, a - b), [kind] * 3, kind)


@instruction("dp4a", "dp2a")
def _dot(m: Machine, ins: Instruction) -> Closure:
    d = target(m, ins, ins.operands[0], "s32")
    a, b = (np.atleast_1d(source(m, ins, o, "u32")) for o in ins.operands[1:3])
    c = source(m, ins, ins.operands[3], "s32")
    types = [dtype_of(f"{kind[0]}8") for kind in ins.types]
    halves = dtype_of(f"{ins.types[0][0]}16")
    offset = 2 if ins.has("hi") else 0

    def run() -> None:
        y = b.view(types[1]).reshape(-1, 4).astype(np.int32)
        if ins.opcode == "dp4a":
            total = (a.view(types[0]).reshape(-1, 4).astype(np.int32) * y).sum(1, dtype=np.int32)
        else:
            x = a.view(halves).reshape(-1, 2).astype(np.int32)
            total = (x * y[:, offset : offset + 2]).sum(1, dtype=np.int32)
        assign(m, d, total + c)

    return run
