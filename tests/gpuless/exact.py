"""Floating-point results from their definition, in rational arithmetic; and random operands to compare them
on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Format:
    """A binary format: bits of precision (the hidden one included), least exponent of a normal number,
    largest value.
    """

    precision: int
    least: int
    largest: float

    def round(self, x: Fraction, mode: str = "rn") -> float:
        """The value of this format that x rounds to: rn (to even), rna (ties away), rz, rm or rp."""
        if x == 0:
            return 0.0
        exponent = math.frexp(float(x))[1] - 1 if abs(x) < 2**1023 else 1023
        while abs(x) >= Fraction(2) ** (exponent + 1):
            exponent += 1
        while abs(x) < Fraction(2) ** exponent:
            exponent -= 1
        unit = Fraction(2) ** (max(exponent, self.least) - self.precision + 1)
        floor = x // unit
        rest = x - floor * unit
        up = {
            "rn": rest * 2 > unit or (rest * 2 == unit and floor % 2 == 1),
            "rna": rest * 2 > unit or (rest * 2 == unit and x > 0),
            "rz": x < 0 and rest > 0,
            "rm": False,
            "rp": rest > 0,
        }[mode]
        value = (floor + up) * unit
        if abs(value) <= Fraction(self.largest):
            return float(value)
        inward = mode == "rz" or (mode == "rm" and x > 0) or (mode == "rp" and x < 0)
        return math.copysign(self.largest if inward else math.inf, x)


F16 = Format(11, -14, 65504.0)
BF16 = Format(8, -126, float.fromhex("0x1.fep127"))
TF32 = Format(11, -126, float.fromhex("0x1.ffcp127"))
F32 = Format(24, -126, float.fromhex("0x1.fffffep127"))
F64 = Format(53, -1022, float.fromhex("0x1.fffffffffffffp1023"))
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64, "tf32": TF32}


def apply(
    operation: Callable[..., Fraction], format: Format, *operands: Iterable[float], mode: str = "rn"
) -> NDArray[np.float64]:
    """operation(operands) exactly, then rounded once; for finite operands."""
    rows = zip(*(np.asarray(o, np.float64).tolist() for o in operands), strict=True)
    return np.array([format.round(operation(*map(Fraction, row)), mode) for row in rows])


COUNT = 512
BITS = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}


def values(bits: NDArray, kind: str) -> NDArray[np.float64]:
    """Bits as float64."""
    if kind == "bf16":
        bits, kind = bits.astype(np.uint32) << 16, "f32"
    with np.errstate(invalid="ignore"):  # signalling NaN
        return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]).astype(np.float64)


MANTISSA = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}


def random_bits(kind: str, seed: int, count: int = COUNT, spread: int = 0) -> NDArray:
    """Finite numbers of every exponent and sign, subnormals and zeros among them; spread: within 2^-spread …
    2^spread.
    """
    rng = np.random.default_rng(seed)
    dtype, mantissa = BITS[kind], MANTISSA[kind]
    width = 8 * dtype().itemsize
    top = (1 << (width - 1 - mantissa)) - 1  # the exponent of infinity
    low, high = (top // 2 - spread, top // 2 + spread) if spread else (0, top)
    exponent = rng.integers(low, high, count, dtype=np.uint64) << np.uint64(mantissa)
    sign = rng.integers(0, 2, count, dtype=np.uint64) << np.uint64(width - 1)
    bits = (sign | exponent | rng.integers(0, 1 << mantissa, count, dtype=np.uint64)).astype(dtype)
    if not spread:
        bits[:8] = 0
        bits[8:16] &= dtype(7)  # subnormal
        bits[16:24] = dtype(1 << (width - 1))  # -0
    return bits


def same(got: NDArray, expected: NDArray[np.float64], kind: str) -> None:
    got = values(got, kind)
    wrong = np.flatnonzero(~((got == expected) | (np.isnan(got) & np.isnan(expected))))
    assert len(wrong) == 0, (
        f"{len(wrong)} differ, e.g. got {got[wrong[0]].hex()}, want {expected[wrong[0]].hex()}"
    )
