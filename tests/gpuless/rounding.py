"""Bits to numbers and back, each result rounded once: f16, bf16, tf32, fp8, and sums and products exact
before rounding.

A sum or product that does not fit float64 is rounded there *to odd* (the last bit set where anything was cut
off). Rounding that once more, to a format at least two bits shorter, gives the correctly rounded result
(Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums", theorem 2).
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

F32, F64 = NDArray[np.float32], NDArray[np.float64]
_TINY_F32 = np.finfo(np.float32).tiny


def to_odd(rounded: F64, error: F64) -> F64:
    """The float64 that round-to-odd gives for rounded + error, where `rounded` is their sum rounded to
    nearest.
    """
    bits = rounded.view(np.int64)
    away = (error > 0) == (rounded > 0)  # the exact value is larger in magnitude
    move = (error != 0) & (bits & 1 == 0) & np.isfinite(rounded)
    # At rounded = 0 an error can only be what underflowed; float64 holds every product and sum of
    # narrower formats.
    return (bits + np.where(move, np.where(away, 1, -1), 0)).view(np.float64)


def two_sum(a: F64, b: F64) -> tuple[F64, F64]:
    """(s, e): s = a + b rounded to nearest, s + e = a + b exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def add_odd(a: F64, b: F64) -> F64:
    """a + b rounded to odd."""
    s, e = two_sum(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return to_odd(s, np.where(np.isfinite(s), e, 0.0))


def fma_f32(a: F32, b: F32, c: F32) -> F32:
    """a·b + c rounded once. The product is exact in float64; the sum is rounded there, then to float32.

    Two roundings differ from one only where the first lands on a tie of the second: there, and for results
    below the normal range, the sum is rounded to odd.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    result = total.astype(np.float32)
    doubtful = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    small = np.abs(result) < _TINY_F32
    if np.count_nonzero(small):
        doubtful |= small & (total != 0)
    if np.count_nonzero(doubtful):
        c64 = np.broadcast_to(np.asarray(c, np.float64), total.shape)
        result[doubtful] = add_odd(product[doubtful], c64[doubtful]).astype(np.float32)
    return result


def _split(a: F64) -> tuple[F64, F64]:
    t = a * 134217729.0  # 2^27 + 1 (Veltkamp)
    high = t - (t - a)
    return high, a - high


def fma_f64(a: F64, b: F64, c: F64) -> F64:
    """a·b + c rounded once (Boldo and Melquiond 2008, figure 4), for products that neither overflow nor
    underflow.
    """
    product = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    product_error = al * bl - (((product - ah * bh) - al * bh) - ah * bl)
    th, tl = two_sum(c, product_error)
    vh, vl = two_sum(product, th)
    exact = vh + add_odd(tl, vl)
    return np.where(np.isfinite(product_error) & np.isfinite(exact), exact, product + c)


def f64_to_f32(x: F64, mode: str = "rn") -> F32:
    """Round to float32; mode rn (nearest even), rz (to zero), rm (down), rp (up) or odd. x may be rounded to
    odd.
    """
    with np.errstate(all="ignore"):
        r = x.astype(np.float32)
    if mode == "rn":
        return r
    back = r.astype(np.float64)
    if mode == "odd":
        bits = r.view(np.int32) - (np.abs(back) > np.abs(x)).astype(np.int32)
        return (bits | ((back != x) & ~np.isnan(x)).astype(np.int32)).view(np.float32)
    step = {"rz": np.abs(back) > np.abs(x), "rm": back > x, "rp": back < x}[mode]
    towards = {"rz": np.float32(0), "rm": np.float32(-np.inf), "rp": np.float32(np.inf)}[mode]
    return np.where(step, np.nextafter(r, towards), r)


def bf16_to_f32(bits: NDArray[np.uint16]) -> F32:
    """Exact."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def f32_to_bf16(x: F32, mode: str = "rn") -> NDArray[np.uint16]:
    """Round to bfloat16 bits; mode rn or rz. Every NaN becomes 0x7fff, as on the device."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits if mode == "rz" else bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    result = (rounded >> 16).astype(np.uint16)
    nan = np.isnan(x)
    if np.count_nonzero(nan):
        result[nan] = 0x7FFF
    return result


def f64_to_bf16(x: F64, mode: str = "rn") -> NDArray[np.uint16]:
    """Round to bfloat16 bits once."""
    return f32_to_bf16(f64_to_f32(x, "odd"), mode)


def f64_to_f16(x: F64, mode: str = "rn") -> NDArray[np.float16]:
    """Round to float16 once; mode rn or rz."""
    r = x.astype(np.float16)
    if mode == "rz":
        r = np.where(np.abs(r.astype(np.float64)) > np.abs(x), np.nextafter(r, np.float16(0)), r)
    return r


def f32_to_tf32(x: F32, mode: str = "rna") -> NDArray[np.uint32]:
    """Round to 10 bits of mantissa; mode rna (ties away), rn (ties to even) or rz. The low 13 bits of the
    result are zero.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    half = {"rna": np.uint32(0x1000), "rn": ((bits >> 13) & 1) + np.uint32(0xFFF), "rz": np.uint32(0)}[mode]
    return np.where(np.isnan(x), np.uint32(0x7FFFE000), (bits + half) & np.uint32(0xFFFFE000))


@functools.lru_cache
def fp8_values(kind: str) -> F32:
    """The 256 values of e4m3 (no infinity, NaN at 0x7f and 0xff) or e5m2, by their bits (OCP 8-bit floating
    point, 2023).
    """
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if kind == "e4m3" else (5, 2, 15)
    code = np.arange(256)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    value = np.where(exponent > 0, 1 + mantissa, mantissa) * 2.0 ** (np.maximum(exponent, 1) - bias)
    if kind == "e4m3":
        value[(code & 0x7F) == 0x7F] = np.nan
    else:
        value[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(code & 0x80, -value, value).astype(np.float32)


def to_fp8(x: NDArray, kind: str, relu: bool = False) -> NDArray[np.uint8]:
    """Round to nearest even, saturating to the largest finite value (cvt.rn.satfinite); NaN becomes 0x7f."""
    x = np.asarray(x, np.float64)
    positive = fp8_values(kind)[:127].astype(np.float64)
    positive = positive[np.isfinite(positive)]
    magnitude = np.minimum(np.nan_to_num(np.abs(x), nan=0.0), positive[-1])
    above = np.clip(np.searchsorted(positive, magnitude), 1, len(positive) - 1)
    low, high = positive[above - 1], positive[above]
    up = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & (above % 2 == 0))
    code = np.where(up, above, above - 1).astype(np.uint8)
    code |= np.where(np.signbit(x), np.uint8(0x80), np.uint8(0))
    if relu:
        code = np.where(np.signbit(x), np.uint8(0), code)
    return np.where(np.isnan(x), np.uint8(0x7F), code)


def flush(x: NDArray) -> NDArray:
    """Subnormal float32 to zero of the same sign (.ftz)."""
    small = np.abs(x) < _TINY_F32
    return np.where(small, np.copysign(np.float32(0), x), x) if np.count_nonzero(small) else x
