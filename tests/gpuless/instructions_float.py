"""Floating-point arithmetic (PTX ISA 9.7.3 to 9.7.5): f16, bf16, f32, f64 and their packed pairs.

Each result is rounded once. The .approx functions are computed in float64 and rounded; the device's differ by
a few units in the last place, and never in the same way from one architecture to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.operands import PACKED, Closure, assign, instruction, source, target, unsupported
from gpuless.program import Instruction
from gpuless.rounding import (
    add_odd,
    bf16_to_f32,
    f32_to_bf16,
    f64_to_bf16,
    f64_to_f16,
    f64_to_f32,
    flush,
    fma_f32,
    fma_f64,
)

if TYPE_CHECKING:
    from gpuless.machine import Machine

_ROUNDINGS = ("rn", "rz", "rm", "rp")
_FUNCTIONS: dict[str, Callable[[NDArray], NDArray]] = {
    "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x), "rcp": lambda x: 1.0 / x,
}  # fmt: skip


def kind_of(ins: Instruction) -> str:
    """Type of the result, f16x2 and the like as f16."""
    return PACKED.get(ins.types[0], ins.types[0])


def widen(values: NDArray, kind: str) -> NDArray:
    """Values of a type as float64, exactly."""
    return (bf16_to_f32(values) if kind == "bf16" else values).astype(np.float64)


def narrow(exact: NDArray, kind: str, mode: str = "rn") -> NDArray:
    """float64, perhaps rounded to odd, to the bits or values of a type."""
    if kind == "bf16":
        return f64_to_bf16(exact, mode)
    if kind == "f16":
        return f64_to_f16(exact, mode)
    return f64_to_f32(exact, mode) if kind == "f32" else exact


def _finish(ins: Instruction, kind: str) -> Callable[[NDArray], NDArray] | None:
    """What .ftz, .sat and .relu do to a result; None where there is nothing to do."""
    steps: list[Callable[[NDArray], NDArray]] = []
    if ins.has("ftz") and kind == "f32":
        steps.append(flush)
    if ins.has("sat"):
        steps.append(lambda x: np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)))
    if ins.has("relu"):
        if kind == "bf16":
            steps.append(lambda x: np.where((x >= 0x8000) & ((x & 0x7FFF) <= 0x7F80), np.uint16(0), x))
        else:
            steps.append(lambda x: np.where(x <= 0, x.dtype.type(0), x))
    if not steps:
        return None

    def finish(x: NDArray) -> NDArray:
        for step in steps:
            x = step(x)
        return x

    return finish


def _bind(m: Machine, ins: Instruction, function: Callable[..., NDArray]) -> Closure:
    """d = finish(function(operands)); inputs flushed for .ftz."""
    kind, full = kind_of(ins), ins.types[0]
    d = target(m, ins, ins.operands[0], full)
    if len(ins.types) == 2:  # add.f32.bf16 d, a, c: the last operand is float32, the others are narrower
        return _bind_mixed(m, ins, function)
    values = [source(m, ins, o, full) for o in ins.operands[1:]]
    finish = _finish(ins, kind)
    if ins.has("ftz") and kind == "f32":
        return lambda: assign(m, d, finish(function(*(flush(v) for v in values))))
    if finish:
        return lambda: assign(m, d, finish(function(*values)))
    return lambda: assign(m, d, function(*values))


def _bind_mixed(m: Machine, ins: Instruction, function: Callable[..., NDArray]) -> Closure:
    of, finish = ins.types[1], _finish(ins, "f32") or (lambda x: x)
    d = target(m, ins, ins.operands[0], "f32")
    narrower = [source(m, ins, o, of) for o in ins.operands[1:-1]]
    last = source(m, ins, ins.operands[-1], "f32")
    to_f32 = bf16_to_f32 if of == "bf16" else np.float32
    return lambda: assign(m, d, finish(function(*(to_f32(v) for v in narrower), last)))


def _mode(ins: Instruction) -> str:
    return next((x for x in ins.modifiers if x in _ROUNDINGS), "rn")


def floating(m: Machine, ins: Instruction) -> Closure:
    """Bind an opcode that integers have too, for a floating-point type."""
    return _FLOAT[ins.opcode](m, ins)


def _add_multiply(m: Machine, ins: Instruction) -> Closure:
    kind, mode = kind_of(ins), _mode(ins)
    ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[ins.opcode]
    if kind in ("f32", "f64", "f16") and mode == "rn":
        if ins.types == (kind,) and not ins.has("ftz", "sat"):
            d = target(m, ins, ins.operands[0], kind)
            a, b = (source(m, ins, o, kind) for o in ins.operands[1:])
            return lambda: ufunc(a, b, out=d, where=m.where)
        return _bind(m, ins, ufunc)
    if kind == "f64":
        raise unsupported(ins)
    if ins.opcode == "mul":
        return _bind(m, ins, lambda a, b: narrow(widen(a, kind) * widen(b, kind), kind, mode))
    sign = -1.0 if ins.opcode == "sub" else 1.0
    return _bind(m, ins, lambda a, b: narrow(add_odd(widen(a, kind), sign * widen(b, kind)), kind, mode))


@instruction("fma")
def _fused(m: Machine, ins: Instruction) -> Closure:
    kind, mode = kind_of(ins), _mode(ins)
    if kind == "f32" and mode == "rn":
        return _bind(m, ins, fma_f32)
    if kind == "f64":
        if mode != "rn":
            raise unsupported(ins)
        return _bind(m, ins, lambda a, b, c: fma_f64(*np.broadcast_arrays(a, b, c)))
    return _bind(
        m, ins, lambda a, b, c: narrow(add_odd(widen(a, kind) * widen(b, kind), widen(c, kind)), kind, mode)
    )


def _divide(m: Machine, ins: Instruction) -> Closure:
    if kind_of(ins) not in ("f32", "f64") or _mode(ins) != "rn":
        raise unsupported(ins)
    return _bind(m, ins, np.divide)


def _minimum_maximum(m: Machine, ins: Instruction) -> Closure:
    if ins.has("xorsign"):
        raise unsupported(ins)
    kind, smallest = kind_of(ins), ins.opcode == "min"
    keep_nan, absolute = ins.has("NaN"), ins.has("abs")
    ufunc = {
        (True, True): np.minimum, (True, False): np.fmin, (False, True): np.maximum, (False, False): np.fmax
    }[smallest, keep_nan]  # fmt: skip
    bits = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}[kind]

    def pair(a: NDArray, b: NDArray) -> NDArray:
        x, y = (bf16_to_f32(v) for v in (a, b)) if kind == "bf16" else (a, b)
        if absolute:
            x, y = np.abs(x), np.abs(y)
        result = ufunc(x, y)
        result = f32_to_bf16(result) if kind == "bf16" else result
        equal = x == y
        if np.count_nonzero(equal):  # of +0 and -0 the smaller is -0
            u, v = (np.asarray(w).view(bits) for w in (a, b))
            result = np.where(equal, (u | v if smallest else u & v).view(result.dtype), result)
        return result

    def run(*values: NDArray) -> NDArray:
        result = pair(values[0], values[1])
        return pair(result, values[2]) if len(values) == 3 else result

    return _bind(m, ins, run)


def _sign(m: Machine, ins: Instruction) -> Closure:
    kind = kind_of(ins)
    if kind == "bf16":
        if ins.opcode == "neg":
            return _bind(m, ins, lambda x: x ^ np.uint16(0x8000))
        return _bind(m, ins, lambda x: x & np.uint16(0x7FFF))
    return _bind(m, ins, np.negative if ins.opcode == "neg" else np.abs)


@instruction("ex2", "lg2", "sin", "cos", "tanh", "sqrt", "rsqrt", "rcp")
def _function(m: Machine, ins: Instruction) -> Closure:
    kind, mode = kind_of(ins), _mode(ins)
    if mode != "rn":
        raise unsupported(ins)
    if ins.opcode == "sqrt" and kind in ("f32", "f64"):
        return _bind(m, ins, np.sqrt)
    if ins.opcode == "rcp" and kind in ("f32", "f64"):
        return _bind(m, ins, lambda x: x.dtype.type(1) / x)
    function = _FUNCTIONS[ins.opcode]
    return _bind(m, ins, lambda x: narrow(function(widen(x, kind)), kind))


@instruction("copysign")
def _copysign(m: Machine, ins: Instruction) -> Closure:
    return _bind(m, ins, lambda a, b: np.copysign(b, a))


@instruction("testp")
def _test(m: Machine, ins: Instruction) -> Closure:
    kind, what = ins.types[-1], ins.modifiers[0]
    p = target(m, ins, ins.operands[0], "pred")
    a = source(m, ins, ins.operands[1], kind)
    tiny = np.finfo(a.dtype).tiny
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }
    return lambda: np.copyto(p, tests[what](a), where=m.where)


_FLOAT = {
    **dict.fromkeys(("add", "sub", "mul"), _add_multiply),
    **dict.fromkeys(("min", "max"), _minimum_maximum),
    **dict.fromkeys(("neg", "abs"), _sign),
    "div": _divide,
    "mad": _fused,
}
