"""Bits and bytes: counting, fields, funnel shifts, three-input logic, prmt (PTX ISA 9.7.1, 9.7.8, 9.7.9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.instructions_integer import computed
from gpuless.operands import Closure, assign, constant, dtype_of, instruction, source, target, unsupported
from gpuless.program import Instruction, type_bits

if TYPE_CHECKING:
    from gpuless.machine import Machine

_REVERSED = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)


@instruction("popc", "clz", "brev", "cnot", "bfind")
def _bits(m: Machine, ins: Instruction) -> Closure:
    kind = ins.types[-1]
    bits = type_bits(kind)

    def length(a: NDArray) -> NDArray:
        if bits == 64:
            high, low = (
                (a >> np.uint64(32)).astype(np.float64),
                (a & np.uint64(0xFFFFFFFF)).astype(np.float64),
            )
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
        return (
            np.where(n == 0, -1, bits - n if ins.has("shiftamt") else n - 1).astype(np.int32).view(np.uint32)
        )

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
        # Move the field to the top, then down again: the arithmetic shift brings the sign. Past the
        # end, a is extended.
        reach = np.minimum(size, np.maximum(np.int64(bits) - start, 0)).astype(np.int64)
        wide = a.astype(dtype_of(kind))
        up = (bits - reach - np.minimum(start, bits)).astype(wide.dtype)
        down = (bits - reach).astype(wide.dtype)
        field = np.where(reach > 0, (wide << up) >> down, 0)
        if signed:
            sign = np.where(wide < 0, -1, 0)
            beyond = (size > reach) & (size > 0)
            field = np.where(
                beyond,
                np.where(reach > 0, wide >> np.minimum(start, bits - 1).astype(wide.dtype), sign),
                field,
            )
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
    known = {  # what compilers emit most
        0x80: lambda: a & b & c, 0xFE: lambda: a | b | c, 0x96: lambda: a ^ b ^ c,
        0xEA: lambda: (a & b) | c, 0xF8: lambda: a | (b & c), 0xCA: lambda: (a & b) | (~a & c),
        0x6A: lambda: (a & b) ^ c, 0x78: lambda: a ^ (b & c), 0xE8: lambda: (a & b) | (c & (a | b)),
    }  # fmt: skip

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
    # What each mode selects for the result's bytes 3 … 0, by the selector's low two bits (PTX ISA,
    # table for prmt).
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
                octet = (a if int(choice) & 7 < 4 else b) >> np.uint32(8 * (int(choice) & 3)) & np.uint32(
                    0xFF
                )
                replicate = bool(int(choice) & 8)
            else:
                octet = np.where(choice & 4 == 0, a, b) >> (np.uint32(8) * (choice & 3)) & np.uint32(0xFF)
                replicate = choice & 8 != 0
            sign = (octet >> np.uint32(7)) * np.uint32(0xFF)
            octet = np.where(replicate, sign, octet) if not fixed else sign if replicate else octet
            result = result | octet << np.uint32(8 * i)
        assign(m, d, result)

    return run
