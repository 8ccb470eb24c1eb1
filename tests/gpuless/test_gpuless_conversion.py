"""cvt and mov on random bits against rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest

from gpuless import exact
from gpuless.exact import BITS, COUNT, random_bits, same, values
from gpuless.snippets import evaluate


def near_ties(kind: str) -> np.ndarray:
    """float32 bits on, just above and just below the middle between two values of a narrower format."""
    rng = np.random.default_rng(1)
    drop = 24 - exact.FORMATS[kind].precision
    exponent = rng.integers(100, 140, COUNT).astype(np.uint32) << 23
    bits = exponent | rng.integers(0, 1 << (23 - drop), COUNT).astype(np.uint32) << drop | 1 << (drop - 1)
    return (bits + rng.choice([-1, 0, 0, 1], COUNT)).astype(np.uint32)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float32_to_half(kind: str, mode: str) -> None:
    for a in (random_bits("f32", 1), near_ties(kind)):
        got = evaluate(f"cvt.{mode}.{kind}.f32 {{d}}, {{a}};", [a], np.uint16)
        same(got, exact.apply(lambda x: x, exact.FORMATS[kind], values(a, "f32"), mode=mode), kind)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs_have_the_first_operand_on_top(kind: str, mode: str) -> None:
    high, low = near_ties(kind), random_bits("f32", 2)
    got = evaluate(f"cvt.{mode}.{kind}x2.f32 {{d}}, {{a}}, {{b}};", [high, low], np.uint32)
    for part, x in ((got >> 16, high), (got & 0xFFFF, low)):
        expected = exact.apply(lambda v: v, exact.FORMATS[kind], values(x, "f32"), mode=mode)
        same(part.astype(np.uint16), expected, kind)


def test_nan_and_infinity_to_half() -> None:
    a = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32)
    assert list(evaluate("cvt.rn.bf16.f32 {d}, {a};", [a], np.uint16)) == [
        0x7F80,
        0xFF80,
        0x7FFF,
        0x7FFF,
        0x7FFF,
    ]
    half = evaluate("cvt.rn.f16.f32 {d}, {a};", [a], np.uint16).view(np.float16)
    assert half[0] == np.inf
    assert half[1] == -np.inf
    assert np.isnan(half[2:]).all()


def test_relu() -> None:
    a = np.array([-1.5, 1.5], np.float32).view(np.uint32)
    assert list(evaluate("cvt.rn.relu.bf16.f32 {d}, {a};", [a], np.uint16)) == [0, 0x3FC0]


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32(mode: str) -> None:
    for a in (random_bits("f32", 1), near_ties("tf32")):
        a = a[(a >> 23 & 0xFF > 0)]  # subnormals have fewer bits
        got = evaluate(f"cvt.{mode}.tf32.f32 {{d}}, {{a}};", [a], np.uint32)
        same(got, exact.apply(lambda x: x, exact.TF32, values(a, "f32"), mode=mode), "f32")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_to_float32_is_exact(kind: str) -> None:
    a = np.arange(1 << 16, dtype=np.uint16)
    got = evaluate(f"cvt.f32.{kind} {{d}}, {{a}};", [a], np.uint32)
    same(got, values(a, kind), "f32")


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_float64_to_float32(mode: str) -> None:
    a = random_bits("f64", 1, spread=140)
    a[::2] &= ~np.uint64(0x1FFFFFFF)
    a[::4] |= np.uint64(0x10000000)  # ties
    got = evaluate(f"cvt.{mode}.f32.f64 {{d}}, {{a}};", [a], np.uint32)
    same(got, exact.apply(lambda x: x, exact.F32, values(a, "f64"), mode=mode), "f32")


ROUND = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("of", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("to", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("mode", list(ROUND))
def test_float_to_integer_saturates(to: str, of: str, mode: str) -> None:
    a = random_bits(of, 1, 256, spread=9 if of == "f16" else 70)
    x = values(a, of)
    bits = int(to[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    got = evaluate(f"cvt.{mode}.{to}.{of} {{d}}, {{a}};", [a], np.dtype(f"u{max(bits, 16) // 8}"))
    expected = [min(max(ROUND[mode](v), low), high) for v in x.tolist()]
    assert [g % (1 << bits) for g in got.tolist()] == [e % (1 << bits) for e in expected]


def test_nan_to_integer() -> None:
    nan = np.array([0x7FC00000], np.uint32)
    assert evaluate("cvt.rzi.s32.f32 {d}, {a};", [nan], np.uint32)[0] == 0
    assert evaluate("cvt.rzi.s64.f32 {d}, {a};", [nan], np.uint64)[0] == 1 << 63


@pytest.mark.parametrize("of", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_integer_to_float_rounds_once(to: str, of: str) -> None:
    rng = np.random.default_rng(0)
    bits = int(of[1:])
    a = rng.integers(0, 1 << bits, COUNT, dtype=np.uint64) >> rng.integers(0, bits, COUNT).astype(np.uint64)
    a[:4] = [0, 1, (1 << bits) - 1, 1 << (bits - 1)]
    a = a.astype(f"u{bits // 8}")
    got = evaluate(f"cvt.rn.{to}.{of} {{d}}, {{a}};", [a], BITS[to])
    numbers = a.view(f"{'i' if of[0] == 's' else 'u'}{bits // 8}").tolist()
    same(got, np.array([exact.FORMATS[to].round(Fraction(n)) for n in numbers]), to)


@pytest.mark.parametrize(
    ("to", "of"), [("s32", "s8"), ("u32", "u8"), ("s64", "s32"), ("u64", "u32"), ("u16", "u32")]
)
def test_integer_width(to: str, of: str) -> None:
    rng = np.random.default_rng(0)
    bits, wide = int(of[1:]), int(to[1:])
    a = rng.integers(0, 1 << max(bits, 32), COUNT, dtype=np.uint64).astype(f"u{max(bits, 32) // 8}")
    got = evaluate(f"cvt.{to}.{of} {{d}}, {{a}};", [a], np.dtype(f"u{wide // 8}"))
    for g, x in zip(got.tolist(), a.tolist(), strict=True):
        x %= 1 << bits
        assert g == (x - (1 << bits) if of[0] == "s" and x >> bits - 1 else x) % (1 << wide)
    got = evaluate("cvt.sat.s8.s32 {d}, {a};", [a], np.uint32).view(np.int32)
    assert np.array_equal(got, np.clip(a.view(np.int32), -128, 127)) if a.itemsize == 4 else True


@pytest.mark.parametrize(("kind", "largest", "step"), [("e4m3", 448.0, 3), ("e5m2", 57344.0, 2)])
def test_float8(kind: str, largest: float, step: int) -> None:
    high, low = random_bits("f32", 1, spread=12), random_bits("f32", 2, spread=20)
    got = evaluate(f"cvt.rn.satfinite.{kind}x2.f32 {{d}}, {{a}}, {{b}};", [high, low], np.uint16)
    format = exact.Format(step + 1, -6 if kind == "e4m3" else -14, largest)
    back = evaluate(f"cvt.rn.f16x2.{kind}x2 {{d}}, {{a}};", [got], np.uint32)
    for part, x in ((back >> 16, high), (back & 0xFFFF, low)):
        clipped = np.clip(values(x, "f32"), -largest, largest)
        same(part.astype(np.uint16), exact.apply(lambda v: v, format, clipped), "f16")


def test_moves_between_words_and_halves() -> None:
    a = random_bits("f32", 1)
    got = evaluate("mov.b32 {{%rs20, %rs21}}, {a}; mov.b32 {d}, {{%rs21, %rs20}};", [a], np.uint32)
    assert np.array_equal(got, a >> 16 | a << 16)
    b = random_bits("f64", 1)
    got = evaluate("mov.b64 {{%r20, %r21}}, {a}; mov.b64 {d}, {{%r21, %r20}};", [b], np.uint64)
    assert np.array_equal(got, b >> np.uint64(32) | b << np.uint64(32))
    got = evaluate("mov.b64 {{_, {d}}}, {a};", [b], np.uint32)
    assert np.array_equal(got, (b >> np.uint64(32)).astype(np.uint32))
