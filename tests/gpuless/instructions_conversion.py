"""mov, cvt, cvta (PTX ISA 9.7.9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.instructions_float import narrow, widen
from gpuless.memory import LOCAL_WINDOW, SHARED_WINDOW
from gpuless.operands import (
    Closure,
    assign,
    dtype_of,
    instruction,
    source,
    target,
    unsupported,
    wide_target,
)
from gpuless.program import Instruction, split_vector, type_bits
from gpuless.rounding import f32_to_tf32, flush, fp8_values, to_fp8, to_odd

if TYPE_CHECKING:
    from gpuless.machine import Machine

_FLOATS = ("f16", "bf16", "f32", "f64", "tf32")
_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("mov")
def _move(m: Machine, ins: Instruction) -> Closure:
    to, value = ins.operands[0], ins.operands[1]
    kind = ins.types[-1]
    if kind == "b128":
        raise unsupported(ins)
    if to.startswith("{"):
        parts = split_vector(to)
        small = f"b{type_bits(kind) // len(parts)}"
        row = np.atleast_1d(source(m, ins, value, kind))
        pieces = row.view(dtype_of(small)).reshape(-1, len(parts))
        targets = [target(m, ins, part, small) for part in parts]

        def unpack() -> None:
            for i, d in enumerate(targets):
                assign(m, d, pieces[:, i])

        return unpack
    d = target(m, ins, to, kind if kind == "pred" else f"b{type_bits(kind)}")
    if value.startswith("{"):
        parts = split_vector(value)
        small = f"b{type_bits(kind) // len(parts)}"
        rows = [source(m, ins, part, small) for part in parts]
        halves = d.view(dtype_of(small)).reshape(-1, len(parts))

        def pack() -> None:
            if any(np.shares_memory(row, halves) for row in rows):
                copies = [np.array(row) for row in rows]
            else:
                copies = rows
            for i, row in enumerate(copies):
                np.copyto(halves[:, i], row, where=m.where)

        return pack
    a = source(m, ins, value, kind if kind == "pred" else f"b{type_bits(kind)}")
    return lambda: np.copyto(d, a, where=m.where)


@instruction("cvta")
def _convert_address(m: Machine, ins: Instruction) -> Closure:
    kind = f"u{type_bits(ins.types[-1])}"
    space = next(
        x.split("::")[0] for x in ins.modifiers if x.split("::")[0] in ("global", "shared", "local", "const")
    )
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
    d, a = target(m, ins, ins.operands[0], kind), source(m, ins, ins.operands[1], kind)
    if ins.has("to"):
        return lambda: np.subtract(a, np.uint64(window), out=d, where=m.where)
    return lambda: np.add(a, np.uint64(window), out=d, where=m.where)


@instruction("isspacep")
def _is_space(m: Machine, ins: Instruction) -> Closure:
    limits = {
        "local": (LOCAL_WINDOW, 1 << 63),
        "shared": (SHARED_WINDOW, LOCAL_WINDOW),
        "global": (0, SHARED_WINDOW),
    }
    low, high = limits[ins.modifiers[0].split("::")[0]]
    p, a = target(m, ins, ins.operands[0], "pred"), source(m, ins, ins.operands[1], "u64")
    return lambda: np.copyto(p, (a >= np.uint64(low)) & (a < np.uint64(high)), where=m.where)


@instruction("cvt")
def _convert(m: Machine, ins: Instruction) -> Closure:
    to, of = ins.types[-2:]
    if to.endswith("x2") or of.endswith("x2"):
        return _convert_pair(m, ins, to, of)
    if ins.has("rs", "pack"):
        raise unsupported(ins)
    d, a = wide_target(m, ins, ins.operands[0], to), source(m, ins, ins.operands[1], of)
    function = _conversion(ins, to, of)
    return lambda: assign(m, d, function(a))


def _conversion(ins: Instruction, to: str, of: str) -> object:
    mode = next((x for x in ins.modifiers if x in ("rn", "rz", "rm", "rp", "rna")), "rn")
    integral = next((_INTEGRAL[x] for x in ins.modifiers if x in _INTEGRAL), None)
    saturate, relu, ftz = ins.has("sat", "satfinite"), ins.has("relu"), ins.has("ftz")

    def finish(x: NDArray) -> NDArray:
        if saturate:
            x = np.where(np.isnan(x), 0.0, np.clip(x, 0.0, 1.0))
        return np.where(x <= 0, 0.0, x) if relu else x

    if of in _FLOATS and to in _FLOATS:
        if to == "tf32":
            return lambda a: f32_to_tf32(finish(a).astype(np.float32) if relu else a, mode)

        def float_to_float(a: NDArray) -> NDArray:
            if ftz and of == "f32":
                a = flush(a)
            x = widen(a.view(np.float32) if of == "tf32" else a, of)
            if integral is not None:
                x = integral(x)
            result = narrow(finish(x), to, mode)
            return flush(result) if ftz and to == "f32" else result

        return float_to_float
    if of in _FLOATS:
        return _to_integer(to, of, integral or np.trunc, ftz)
    if to == "f64":
        if mode != "rn" and type_bits(of) == 64:
            raise unsupported(ins)
        return lambda a: a.astype(np.float64)
    if to in _FLOATS:
        return lambda a: narrow(finish(_integer_to_odd(a)), to, mode)
    dtype = dtype_of(to)
    if saturate:
        limits = np.iinfo(dtype)
        own = np.iinfo(dtype_of(of))
        low, high = max(limits.min, own.min), min(limits.max, own.max)
        return lambda a: np.clip(a, low, high).astype(dtype)
    return lambda a: a.astype(dtype)


def _integer_to_odd(a: NDArray) -> NDArray:
    """Integers as float64, rounded to odd where 64 bits do not fit."""
    x = a.astype(np.float64)
    if a.dtype.itemsize < 8:
        return x
    top = 2.0 ** (63 if a.dtype.kind == "i" else 64)
    back = np.where(x >= top, 0, x).astype(a.dtype)  # at the top, a - 2^64 wraps to the same as a - 0
    error = (a - back).view(np.int64).astype(np.float64)
    return to_odd(x, error)


def _to_integer(to: str, of: str, integral: object, ftz: bool) -> object:
    dtype, bits = dtype_of(to), type_bits(to)
    limits = np.iinfo(dtype)
    of_nan = 0 if of != "f64" and bits != 64 else limits.min if to[0] == "s" else 1 << (bits - 1)

    def run(a: NDArray) -> NDArray:
        x = widen(flush(a) if ftz and of == "f32" else a, of)
        x = integral(x)
        nan, high, low = np.isnan(x), x >= 2.0 ** (bits - (to[0] == "s")), x < float(limits.min)
        value = np.where(nan | high | low, 0.0, x).astype(dtype)
        value = np.where(high, dtype(limits.max), np.where(low, dtype(limits.min), value))
        return np.where(nan, dtype(of_nan), value)

    return run


def _convert_pair(m: Machine, ins: Instruction, to: str, of: str) -> Closure:
    """cvt.rn.bf16x2.f32 d, high, low and conversions between pairs."""
    mode = "rz" if ins.has("rz") else "rn"
    relu, item = ins.has("relu"), to[:-2]
    if ins.has("rs") or len(ins.operands) not in (2, 3):
        raise unsupported(ins)
    d = target(m, ins, ins.operands[0], f"b{type_bits(to)}")
    halves = d.view(dtype_of(f"b{type_bits(to) // 2}")).reshape(-1, 2)

    def encode(x: NDArray) -> NDArray:
        if item in ("e4m3", "e5m2"):
            return to_fp8(x, item, relu)
        return narrow(np.where(x <= 0, 0.0, x) if relu else x, item, mode).view(np.uint16)

    if of == "f32" and len(ins.operands) == 3:
        high, low = (source(m, ins, o, "f32") for o in ins.operands[1:])

        def from_two() -> None:
            values = encode(widen(high, "f32")), encode(widen(low, "f32"))
            np.copyto(halves[:, 1], values[0], where=m.where)
            np.copyto(halves[:, 0], values[1], where=m.where)

        return from_two
    if of.endswith("x2"):
        small = of[:-2]
        a = np.atleast_1d(source(m, ins, ins.operands[1], f"b{type_bits(of)}"))
        if small in ("e4m3", "e5m2"):
            pairs = a.view(np.uint8).reshape(-1, 2)
            table = fp8_values(small)
            return lambda: assign(m, d, encode(widen(table[pairs], "f32")).view(d.dtype).ravel())
        pairs = a.view(dtype_of(small)).reshape(-1, 2)
        return lambda: assign(m, d, encode(widen(pairs, small)).view(d.dtype).ravel())
    raise unsupported(ins)
