"""Comparison and selection (PTX ISA 9.7.6, 9.7.7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.operands import Closure, assign, instruction, predicate, source, target, unsupported
from gpuless.program import Instruction, type_bits
from gpuless.rounding import bf16_to_f32

if TYPE_CHECKING:
    from gpuless.machine import Machine

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
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
    true = {"f32": np.float32(1), "f16": np.float16(1), "bf16": np.uint16(0x3F80)}.get(
        result, ~d.dtype.type(0)
    )
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
