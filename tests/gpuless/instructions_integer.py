"""Integer arithmetic, bits, comparison and selection (PTX ISA 9.7.1, 9.7.2, 9.7.6 to 9.7.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.operands import Closure, assign, constant, dtype_of, instruction, predicate, source, target, unsupported
from gpuless.parser import Instruction, type_bits
from gpuless.rounding import bf16_to_f32

if TYPE_CHECKING:
    from gpuless.machine import Machine

_UFUNC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative,
    "abs": np.absolute, "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip
_REVERSED = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)


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
        ufunc = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}[ins.opcode]
        d = target(m, ins, ins.operands[0], kind)
        values = [predicate(m, ins, o) for o in ins.operands[1:]]
        return lambda: ufunc(*(v() for v in values), out=d, where=m.where)
    if ins.has("cc") or ins.opcode in ("addc", "subc"):
        return _with_carry(m, ins)
    if ins.has("sat"):
        limits, ufunc = np.iinfo(dtype_of(kind)), _UFUNC[ins.opcode]
        return computed(
            m, ins, lambda a, b: np.clip(ufunc(a, b, dtype=np.int64), limits.min, limits.max), [kind] * 2, kind
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


@instruction("popc", "clz", "brev", "cnot", "bfind")
def _bits(m: Machine, ins: Instruction) -> Closure:
    kind = ins.types[-1]
    bits = type_bits(kind)

    def length(a: NDArray) -> NDArray:
        if bits == 64:
            high, low = (a >> np.uint64(32)).astype(np.float64), (a & np.uint64(0xFFFFFFFF)).astype(np.float64)
            return np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(low)[1])
        return np.frexp(a.astype(np.float64))[1]

    def reverse(a: NDArray) -> NDArray:
        size = bits // 8
        octets = np.ascontiguousarray(a).view(np.uint8).reshape(-1, size)[:, ::-1]
        return np.ascontiguousarray(_REVERSED[octets]).view(f"u{size}").ravel()

    def highest(a: NDArray) -> NDArray:
        if kind[0] == "s":
            a = np.where(a.view(f"i{bits // 8}") < 0, ~a, a)
        n = length(a)
        return np.where(n == 0, -1, bits - n if ins.has("shiftamt") else n - 1).astype(np.int32).view(np.uint32)

    functions = {
        "popc": (np.bitwise_count, "u32"),
        "clz": (lambda a: bits - length(a), "u32"),
        "brev": (reverse, f"b{bits}"),
        "cnot": (lambda a: a == 0, f"b{bits}"),
        "bfind": (highest, "u32"),
    }
    function, result = functions[ins.opcode]
    d = target(m, ins, ins.operands[0], result)
    a = source(m, ins, ins.operands[1], f"u{bits}")
    return lambda: assign(m, d, function(np.atleast_1d(a)))


@instruction("bfe")
def _bit_field_extract(m: Machine, ins: Instruction) -> Closure:
    kind = ins.types[-1]
    bits, signed = type_bits(kind), kind[0] == "s"
    d = target(m, ins, ins.operands[0], kind)
    a = source(m, ins, ins.operands[1], kind)
    position, length = (source(m, ins, o, "u32") for o in ins.operands[2:4])

    def run() -> None:
        start = position & 0xFF
        size = np.minimum(length & 0xFF, bits)
        # Move the field to the top, then down again: the arithmetic shift brings the sign. Past the end, a is extended.
        reach = np.minimum(size, np.maximum(np.int64(bits) - start, 0)).astype(np.int64)
        wide = a.astype(dtype_of(kind))
        up = (bits - reach - np.minimum(start, bits)).astype(wide.dtype)
        down = (bits - reach).astype(wide.dtype)
        field = np.where(reach > 0, (wide << up) >> down, 0)
        if signed:
            sign = np.where(wide < 0, -1, 0)
            beyond = (size > reach) & (size > 0)
            field = np.where(beyond, np.where(reach > 0, wide >> np.minimum(start, bits - 1).astype(wide.dtype), sign), field)
        assign(m, d, field)

    return run


@instruction("bfi")
def _bit_field_insert(m: Machine, ins: Instruction) -> Closure:
    kind = ins.types[-1]
    bits = type_bits(kind)
    d = target(m, ins, ins.operands[0], kind)
    a, b = (source(m, ins, o, kind) for o in ins.operands[1:3])
    position, length = (source(m, ins, o, "u32") for o in ins.operands[3:5])

    def run() -> None:
        start, size = (position & 0xFF).astype(d.dtype), np.minimum(length & 0xFF, bits).astype(d.dtype)
        ones = np.invert(np.left_shift(~d.dtype.type(0), size))
        field = np.left_shift(ones, start)
        assign(m, d, (b & ~field) | (np.left_shift(a, start) & field))

    return run


@instruction("bmsk")
def _bit_mask(m: Machine, ins: Instruction) -> Closure:
    wrap = ins.has("wrap")

    def run(a: NDArray, b: NDArray) -> NDArray:
        if wrap:
            a, b = a & 31, b & 31
        return ~np.left_shift(~np.uint32(0), np.minimum(b, 32)) << np.minimum(a, 32)

    return computed(m, ins, run, ["u32", "u32"], "u32")


@instruction("shf")
def _funnel_shift(m: Machine, ins: Instruction) -> Closure:
    wrap, right = ins.has("wrap"), ins.has("r")

    def run(low: NDArray, high: NDArray, by: NDArray) -> NDArray:
        n = (by & 31 if wrap else np.minimum(by, 32)).astype(np.uint64)
        both = np.left_shift(high, np.uint64(32), dtype=np.uint64) | low
        return both >> n if right else (both << n) >> np.uint64(32)

    return computed(m, ins, run, ["u32"] * 3, "u32")


@instruction("lop3")
def _logic3(m: Machine, ins: Instruction) -> Closure:
    if ins.has("BoolOp") or len(ins.operands) != 5:
        raise unsupported(ins)
    table = constant(ins, ins.operands[4]) & 0xFF
    d = target(m, ins, ins.operands[0], "b32")
    a, b, c = (source(m, ins, o, "b32") for o in ins.operands[1:4])
    known = {0x80: lambda: a & b & c, 0xFE: lambda: a | b | c, 0x96: lambda: a ^ b ^ c, 0xEA: lambda: (a & b) | c,
             0xCA: lambda: (a & b) | (~a & c), 0xF8: lambda: a | (b & c), 0xE8: lambda: (a & b) | (c & (a | b)),
             0x6A: lambda: (a & b) ^ c, 0x78: lambda: a ^ (b & c), 0xD8: lambda: (a & ~c) | (b & c)}  # fmt: skip

    def run() -> NDArray:
        if table in known:
            return known[table]()
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return result

    return lambda: assign(m, d, run())


@instruction("prmt")
def _permute(m: Machine, ins: Instruction) -> Closure:
    mode = next((x for x in ins.modifiers if x in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), "")
    d = target(m, ins, ins.operands[0], "b32")
    a, b, selector = (source(m, ins, o, "u32") for o in ins.operands[1:4])
    # What each mode selects for the result's bytes 3 … 0, by the selector's low two bits (PTX ISA, table for prmt).
    tables = {
        "f4e": ("3210", "4321", "5432", "6543"),
        "b4e": ("5670", "6701", "7012", "0123"),
        "rc8": ("0000", "1111", "2222", "3333"),
        "ecl": ("3210", "3211", "3222", "3333"),
        "ecr": ("0000", "1110", "2210", "3210"),
        "rc16": ("1010", "3232", "1010", "3232"),
    }
    table = np.array([int(code, 16) for code in tables[mode]], np.uint32) if mode else None

    def choices() -> list[NDArray]:
        select = table[selector & 3] if table is not None else selector
        return [select >> np.uint32(4 * i) & np.uint32(15) for i in range(4)]

    fixed = choices() if not isinstance(selector, np.ndarray) else None

    def run() -> None:
        result = np.uint32(0)
        for i, choice in enumerate(fixed or choices()):
            if fixed:
                octet = (a if int(choice) & 7 < 4 else b) >> np.uint32(8 * (int(choice) & 3)) & np.uint32(0xFF)
                replicate = bool(int(choice) & 8)
            else:
                octet = np.where(choice & 4 == 0, a, b) >> (np.uint32(8) * (choice & 3)) & np.uint32(0xFF)
                replicate = choice & 8 != 0
            sign = (octet >> np.uint32(7)) * np.uint32(0xFF)
            octet = np.where(replicate, sign, octet) if not fixed else sign if replicate else octet
            result = result | octet << np.uint32(8 * i)
        assign(m, d, result)

    return run


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


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(ins: Instruction, name: str, kind: str) -> object:
    """f(a, b) -> bool for a comparison; floats compare false with NaN, or true where the name ends in u."""
    floating = kind in ("f16", "f32", "f64", "bf16")
    flush_inputs = ins.has("ftz")

    def prepare(x: NDArray) -> NDArray:
        x = bf16_to_f32(x) if kind == "bf16" else x
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, x.dtype.type(0), x) if flush_inputs else x

    if floating and name in ("num", "nan"):
        nan = name == "nan"
        return lambda a, b: (np.isnan(prepare(a)) | np.isnan(prepare(b))) == nan
    base = name[:-1] if floating and name.endswith("u") else name
    if base not in _COMPARE:
        raise unsupported(ins)
    ufunc = _COMPARE[base]
    if not floating:
        return ufunc
    if name.endswith("u"):
        if base == "ne":
            return lambda a, b: prepare(a) != prepare(b)
        return lambda a, b: ufunc(prepare(a), prepare(b)) | np.isnan(prepare(a)) | np.isnan(prepare(b))
    if base == "ne":  # numpy's is true for NaN
        return lambda a, b: (prepare(a) != prepare(b)) & ~(np.isnan(prepare(a)) | np.isnan(prepare(b)))
    return lambda a, b: ufunc(prepare(a), prepare(b))


@instruction("setp")
def _set_predicate(m: Machine, ins: Instruction) -> Closure:
    kind = ins.types[-1]
    if kind in ("f16x2", "bf16x2"):
        raise unsupported(ins)
    compare = comparison(ins, ins.modifiers[0], kind)
    a, b = (source(m, ins, o, kind) for o in ins.operands[1:3])
    outputs = [target(m, ins, o.strip(), "pred") for o in ins.operands[0].split("|")]
    if len(ins.operands) == 3 and len(outputs) == 1:
        (p,) = outputs
        if isinstance(compare, np.ufunc):
            return lambda: compare(a, b, out=p, where=m.where)
        return lambda: np.copyto(p, compare(a, b), where=m.where)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[
        next((x for x in ins.modifiers if x in ("and", "or", "xor")), "and")
    ]
    other = predicate(m, ins, ins.operands[3]) if len(ins.operands) == 4 else lambda: np.bool_(True)

    def run() -> None:
        holds, also = compare(a, b), other().copy()
        for p, value in zip(outputs, (holds, ~holds), strict=False):
            np.copyto(p, combine(value, also), where=m.where)

    return run


@instruction("set")
def _set(m: Machine, ins: Instruction) -> Closure:
    result, kind = ins.types[-2:]
    if len(ins.operands) != 3 or kind in ("f16x2", "bf16x2"):
        raise unsupported(ins)
    compare = comparison(ins, ins.modifiers[0], kind)
    a, b = (source(m, ins, o, kind) for o in ins.operands[1:3])
    d = target(m, ins, ins.operands[0], result)
    true = {"f32": np.float32(1), "f16": np.float16(1), "bf16": np.uint16(0x3F80)}.get(result, ~d.dtype.type(0))
    return lambda: assign(m, d, np.where(compare(a, b), true, d.dtype.type(0)))


@instruction("selp")
def _select(m: Machine, ins: Instruction) -> Closure:
    kind = ins.types[-1]
    kind = f"b{type_bits(kind)}"
    d = target(m, ins, ins.operands[0], kind)
    a, b = (source(m, ins, o, kind) for o in ins.operands[1:3])
    p = source(m, ins, ins.operands[3], "pred")
    return lambda: np.copyto(d, np.where(p, a, b), where=m.where)


@instruction("slct")
def _select_by_sign(m: Machine, ins: Instruction) -> Closure:
    kind, by = f"b{type_bits(ins.types[0])}", ins.types[1]
    d = target(m, ins, ins.operands[0], kind)
    a, b = (source(m, ins, o, kind) for o in ins.operands[1:3])
    c = source(m, ins, ins.operands[3], by)
    return lambda: assign(m, d, np.where(c >= 0, a, b))
