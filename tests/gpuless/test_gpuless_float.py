"""Floating-point instructions on random bits against rational arithmetic: each result is rounded once, as
PTX says.
"""

import operator
from fractions import Fraction

import numpy as np
import pytest

from gpuless import exact
from gpuless.exact import BITS, COUNT, random_bits, same, values
from gpuless.snippets import evaluate

OPERATIONS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@pytest.mark.parametrize("spread", [0, 4])
def test_arithmetic(kind: str, name: str, spread: int) -> None:
    a, b = random_bits(kind, 1, spread=spread), random_bits(kind, 2, spread=spread)
    got = evaluate(f"{name}.rn.{kind} {{d}}, {{a}}, {{b}};", [a, b], a.dtype)
    same(got, exact.apply(OPERATIONS[name], exact.FORMATS[kind], values(a, kind), values(b, kind)), kind)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_directed_rounding(name: str, mode: str) -> None:
    a, b, c = (random_bits("f32", seed, spread=30) for seed in (1, 2, 3))
    inputs = [a, b, c] if name == "fma" else [a, b]
    operands = ", ".join(f"{{{x}}}" for x in "abc"[: len(inputs)])
    got = evaluate(f"{name}.{mode}.f32 {{d}}, {operands};", inputs, np.uint32)
    operation = OPERATIONS.get(name, lambda x, y, z: x * y + z)
    same(got, exact.apply(operation, exact.F32, *(values(x, "f32") for x in inputs), mode=mode), "f32")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("operands", ["any", "close"])
def test_fma_rounds_once(kind: str, operands: str) -> None:
    a, b, c = (random_bits(kind, seed, spread=0 if operands == "any" else 3) for seed in (1, 2, 3))
    got = evaluate(f"fma.rn.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], a.dtype)
    expected = exact.apply(
        lambda x, y, z: x * y + z, exact.FORMATS[kind], *(values(x, kind) for x in (a, b, c))
    )
    same(got, expected, kind)


def test_fma_of_float32_is_not_rounded_in_float64_first() -> None:
    """a·b + c off the middle of two float32 by so little that float64 cannot see it: 2^-46 of half a unit.

    8384513 · 8392705 = 2^46 + 1 and (2^23 - 1)(2^23 + 1) = 2^46 - 1.
    """
    above, below = (8384513.0, 8392705.0), (2.0**23 - 1, 2.0**23 + 1)
    cases = []
    for unit in (2.0**-23, 2.0**-149):  # of results of about one, and of subnormal ones
        for (a, b), multiple in ((above, 2**9), (below, 2**9 + 1), (above, 2**9 + 1), (below, 2**9)):
            start = 1.0 if unit > 2.0**-100 else 0.0
            scale = np.sqrt(unit / 2 * 2.0**-46)  # a power of two: a·b is half a unit and a hair
            cases += [(sign * a * scale, b * scale, sign * (start + multiple * unit)) for sign in (1, -1)]
    a, b, c = (np.array(x, np.float32) for x in zip(*cases, strict=True))
    got = evaluate("fma.rn.f32 {d}, {a}, {b}, {c};", [x.view(np.uint32) for x in (a, b, c)], np.uint32)
    same(got, exact.apply(lambda x, y, z: x * y + z, exact.F32, a, b, c), "f32")


def test_fma_of_float64() -> None:
    a, b, c = (random_bits("f64", seed, spread=40) for seed in (1, 2, 3))
    got = evaluate("fma.rn.f64 {d}, {a}, {b}, {c};", [a, b, c], np.uint64)
    expected = exact.apply(lambda x, y, z: x * y + z, exact.F64, *(values(x, "f64") for x in (a, b, c)))
    same(got, expected, "f64")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed(kind: str) -> None:
    a, b, c = (random_bits(kind, seed, 2 * COUNT, spread=6) for seed in (1, 2, 3))
    got = evaluate(
        f"fma.rn.{kind}x2 {{d}}, {{a}}, {{b}}, {{c}};", [x.view(np.uint32) for x in (a, b, c)], np.uint32
    )
    expected = exact.apply(
        lambda x, y, z: x * y + z, exact.FORMATS[kind], *(values(x, kind) for x in (a, b, c))
    )
    same(got.view(np.uint16), expected, kind)
    got = evaluate(f"mul.{kind}x2 {{d}}, {{a}}, {{b}};", [a.view(np.uint32), b.view(np.uint32)], np.uint32)
    same(
        got.view(np.uint16),
        exact.apply(operator.mul, exact.FORMATS[kind], values(a, kind), values(b, kind)),
        kind,
    )


def test_packed_float32() -> None:
    a, b, c = (random_bits("f32", seed, 2 * COUNT, spread=20) for seed in (1, 2, 3))
    got = evaluate("fma.rn.f32x2 {d}, {a}, {b}, {c};", [x.view(np.uint64) for x in (a, b, c)], np.uint64)
    expected = exact.apply(lambda x, y, z: x * y + z, exact.F32, *(values(x, "f32") for x in (a, b, c)))
    same(got.view(np.uint32), expected, "f32")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mixed_precision_add(kind: str) -> None:
    a, c = random_bits(kind, 1, spread=9), random_bits("f32", 2, spread=9)
    got = evaluate(f"add.rn.f32.{kind} {{d}}, {{a}}, {{c}};".replace("{c}", "{b}"), [a, c], np.uint32)
    same(got, exact.apply(operator.add, exact.F32, values(a, kind), values(c, "f32")), "f32")


def test_division_and_roots_of_float32() -> None:
    a, b = random_bits("f32", 1, spread=60), random_bits("f32", 2, spread=60)
    got = evaluate("div.rn.f32 {d}, {a}, {b};", [a, b], np.uint32)
    same(got, exact.apply(operator.truediv, exact.F32, values(a, "f32"), values(b, "f32")), "f32")
    got = evaluate("rcp.rn.f32 {d}, {a};", [a], np.uint32)
    same(got, exact.apply(lambda x: 1 / x, exact.F32, values(a, "f32")), "f32")
    positive = a & np.uint32(0x7FFFFFFF)
    got = values(evaluate("sqrt.rn.f32 {d}, {a};", [positive], np.uint32), "f32")
    x = values(positive, "f32")
    below, above = (
        np.nextafter(got.astype(np.float32), np.float32(to)).astype(np.float64) for to in (0, np.inf)
    )
    for low, root, high, square in zip(below.tolist(), got.tolist(), above.tolist(), x.tolist(), strict=True):
        assert ((Fraction(low) + Fraction(root)) / 2) ** 2 <= Fraction(square)
        assert Fraction(square) <= ((Fraction(root) + Fraction(high)) / 2) ** 2


@pytest.mark.parametrize(
    ("name", "function"),
    [("ex2", np.exp2), ("lg2", np.log2), ("rsqrt", lambda x: x**-0.5), ("sin", np.sin), ("cos", np.cos),
     ("tanh", np.tanh), ("rcp", lambda x: 1 / x), ("sqrt", np.sqrt)],
)  # fmt: skip
def test_approximate_functions_are_the_rounded_function(name: str, function: object) -> None:
    a = random_bits("f32", 1, spread=6) & np.uint32(0x7FFFFFFF)
    got = evaluate(f"{name}.approx.f32 {{d}}, {{a}};", [a], np.uint32).view(np.float32)
    np.testing.assert_array_max_ulp(got, function(values(a, "f32")).astype(np.float32), maxulp=1)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_minimum_and_maximum(kind: str, name: str) -> None:
    nan, zero, minus = {"f32": (0x7FC00000, 0, 0x80000000)}.get(kind, (0x7FFF, 0, 0x8000))
    special = np.array([nan, nan, zero, minus, zero, minus], BITS[kind])
    other = np.array([nan, zero, minus, zero, nan, minus], BITS[kind])
    a = np.concatenate([special, random_bits(kind, 1)])
    b = np.concatenate([other, random_bits(kind, 2)])
    got = evaluate(f"{name}.{kind} {{d}}, {{a}}, {{b}};", [a, b], a.dtype)
    x, y = values(a, kind), values(b, kind)
    same(got, (np.fmin if name == "min" else np.fmax)(x, y), kind)
    want = minus if name == "min" else zero
    assert list(got[2:4]) == [want, want]
    got = evaluate(f"{name}.NaN.{kind} {{d}}, {{a}}, {{b}};", [a, b], a.dtype)
    same(got, (np.minimum if name == "min" else np.maximum)(x, y), kind)


def test_flush_to_zero() -> None:
    tiny, small = 0x00400000, 0x80000001  # subnormal
    a = np.array([tiny, small, 0x00800000, 0x3F800000], np.uint32)
    b = np.array([0x3F800000, 0x3F800000, 0x3F000000, 0x3F800000], np.uint32)
    assert list(evaluate("mul.ftz.f32 {d}, {a}, {b};", [a, b], np.uint32)) == [0, 0x80000000, 0, 0x3F800000]
    assert list(evaluate("mul.f32 {d}, {a}, {b};", [a, b], np.uint32)) == [
        tiny,
        small,
        0x00400000,
        0x3F800000,
    ]


def test_saturate_and_relu() -> None:
    a = np.array([-2.0, 0.25, 3.0, np.nan], np.float32).view(np.uint32)
    one = np.ones(4, np.float32).view(np.uint32)
    assert list(evaluate("mul.sat.f32 {d}, {a}, {b};", [a, one], np.uint32).view(np.float32)) == [
        0,
        0.25,
        1,
        0,
    ]
    x = np.array([0xC000, 0x3F80, 0x8000, 0x7FFF], np.uint16)  # -2, 1, -0, NaN
    unit = np.full(4, 0x3F80, np.uint16)
    zero = np.zeros(4, np.uint16)
    got = evaluate("fma.rn.relu.bf16 {d}, {a}, {b}, {c};", [x, unit, zero], np.uint16)
    assert list(got) == [0, 0x3F80, 0, 0x7FFF]


def test_signs() -> None:
    a = random_bits("bf16", 1)
    assert np.array_equal(evaluate("neg.bf16 {d}, {a};", [a], np.uint16), a ^ 0x8000)
    assert np.array_equal(evaluate("abs.bf16 {d}, {a};", [a], np.uint16), a & 0x7FFF)
    x, y = random_bits("f32", 1), random_bits("f32", 2)
    got = evaluate("copysign.f32 {d}, {a}, {b};", [x, y], np.uint32)
    assert np.array_equal(got, (y & 0x7FFFFFFF) | (x & 0x80000000))


COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@pytest.mark.parametrize("name", [*COMPARISONS, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_comparison_with_nan(name: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.choice(np.array([-1.0, 0.0, -0.0, 1.0, np.inf, np.nan], np.float32), (2, COUNT))
    statement = f"setp.{name}.f32 {{p}}, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, {{p}};"
    got = evaluate(statement, [a.view(np.uint32), b.view(np.uint32)], np.uint32)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        expected = unordered == (name == "nan")
    else:
        ordered = np.array([COMPARISONS[name[:2]](x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
        expected = (ordered | unordered) if len(name) == 3 else ordered & ~unordered
    assert np.array_equal(got, expected)
