"""Integer instructions on random bits against Python's integers."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from gpuless.snippets import evaluate

COUNT = 512


def operands(bits: int, how_many: int) -> list[NDArray]:
    """Random bits; extremes and small numbers among them."""
    rng = np.random.default_rng(bits)
    special = np.array([0, 1, 2, 31, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1], np.uint64)
    arrays = []
    for _ in range(how_many):
        x = rng.integers(0, 1 << bits, COUNT, dtype=np.uint64)
        x[: COUNT // 3] = rng.choice(special, COUNT // 3)
        arrays.append(x.astype(f"u{bits // 8}"))
    return arrays


def check(
    statement: str,
    reference: Callable[..., int],
    kinds: list[str],
    result: str,
    inputs: list[NDArray] | None = None,
) -> None:
    """The statement gives reference(operands as Python integers of their type) modulo 2^bits."""
    bits = int(kinds[0][1:])
    inputs = inputs or operands(bits, len(kinds))
    width = int(result[1:])
    got = evaluate(statement, inputs, np.dtype(f"u{max(width, 16) // 8}"))
    for row in zip(got.tolist(), *(x.tolist() for x in inputs), strict=True):
        args = [signed(x, k) for x, k in zip(row[1:], kinds, strict=True)]
        assert row[0] == reference(*args) % (1 << width), (statement, args, row[0])


def signed(x: int, kind: str) -> int:
    bits = int(kind[1:])
    x %= 1 << bits
    return x - (1 << bits) if kind[0] == "s" and x >> (bits - 1) else x


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", list(BINARY))
def test_binary(name: str, kind: str) -> None:
    check(f"{name}.{kind} {{d}}, {{a}}, {{b}};", BINARY[name], [kind] * 2, kind)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_high_product(kind: str) -> None:
    check(f"mul.hi.{kind} {{d}}, {{a}}, {{b}};", lambda a, b: a * b >> int(kind[1:]), [kind] * 2, kind)
    check(f"mad.lo.{kind} {{d}}, {{a}}, {{b}}, {{c}};", lambda a, b, c: a * b + c, [kind] * 3, kind)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_product(kind: str) -> None:
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    check(f"mul.wide.{kind} {{d}}, {{a}}, {{b}};", lambda a, b: a * b, [kind] * 2, wide)


def test_wide_multiply_add() -> None:
    a, b = operands(32, 2)
    (c,) = operands(64, 1)
    got = evaluate("mad.wide.s32 {d}, {a}, {b}, {c};", [a, b, c], np.uint64)
    for r, x, y, z in zip(*(v.tolist() for v in (got, a, b, c)), strict=True):
        assert r == (signed(x, "s32") * signed(y, "s32") + z) % 2**64


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_division(kind: str) -> None:
    a, b = operands(int(kind[1:]), 2)
    b[b == 0] = 3
    if kind[0] == "s":
        b[b == b.dtype.type(-1 % 2 ** int(kind[1:]))] = 5  # -2^31 / -1 has no result
    check(f"div.{kind} {{d}}, {{a}}, {{b}};", truncated, [kind] * 2, kind, [a, b])
    check(f"rem.{kind} {{d}}, {{a}}, {{b}};", lambda a, b: a - b * truncated(a, b), [kind] * 2, kind, [a, b])


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits: int) -> None:
    rng = np.random.default_rng(0)
    a, by = operands(bits, 1)[0], rng.integers(0, 80, COUNT).astype(np.uint32)
    left = evaluate(f"shl.b{bits} {{d}}, {{a}}, {{b}};", [a, by], a.dtype)
    logical = evaluate(f"shr.u{bits} {{d}}, {{a}}, {{b}};", [a, by], a.dtype)
    arithmetic = evaluate(f"shr.s{bits} {{d}}, {{a}}, {{b}};", [a, by], a.dtype)
    for x, n, up, u, s in zip(*(v.tolist() for v in (a, by, left, logical, arithmetic)), strict=True):
        assert up == (x << n) % 2**bits
        assert u == x >> n
        assert s == (signed(x, f"s{bits}") >> n) % 2**bits


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counts(bits: int) -> None:
    (a,) = operands(bits, 1)
    for name, reference in (("popc", int.bit_count), ("clz", lambda x: bits - x.bit_length())):
        got = evaluate(f"{name}.b{bits} {{d}}, {{a}};", [a], np.uint32)
        assert got.tolist() == [reference(x) for x in a.tolist()]
    got = evaluate(f"brev.b{bits} {{d}}, {{a}};", [a], a.dtype)
    assert got.tolist() == [int(f"{x:0{bits}b}"[::-1], 2) for x in a.tolist()]
    got = evaluate(f"bfind.u{bits} {{d}}, {{a}};", [a], np.uint32)
    assert got.tolist() == [(x.bit_length() - 1) % 2**32 for x in a.tolist()]


def extract(x: int, start: int, length: int, bits: int, is_signed: bool) -> int:
    """The loop of the PTX ISA's description of bfe."""
    start, length = start & 0xFF, length & 0xFF
    sign = 0 if not is_signed or length == 0 else x >> min(start + length - 1, bits - 1) & 1
    return sum((x >> start + i & 1 if i < length and start + i < bits else sign) << i for i in range(bits))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(kind: str) -> None:
    rng = np.random.default_rng(0)
    bits = int(kind[1:])
    a = operands(bits, 1)[0]
    start, length = rng.integers(0, bits + 8, (2, COUNT)).astype(np.uint32)
    got = evaluate(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, start, length], a.dtype)
    for r, x, s, n in zip(*(v.tolist() for v in (got, a, start, length)), strict=True):
        assert r == extract(x, s, n, bits, kind[0] == "s"), (hex(x), s, n)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits: int) -> None:
    rng = np.random.default_rng(0)
    a, b = operands(bits, 2)
    start, length = rng.integers(0, bits + 8, (2, COUNT)).astype(np.uint32)
    got = evaluate(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {{c}}, {{e}};", [a, b, start, length], a.dtype)
    for r, x, y, s, n in zip(*(v.tolist() for v in (got, a, b, start, length)), strict=True):
        expected = y
        for i in range(min(n, max(bits - s, 0))):
            expected = expected & ~(1 << s + i) | (x >> i & 1) << s + i
        assert r == expected


@pytest.mark.parametrize(
    "table", [0x80, 0x96, 0xE8, 0xCA, 0x1D, 0x6A, 0xF8, 0x00, 0xFF, 0x2B, 0xD8, 0x78, 0xEA, 0xFE]
)
def test_three_input_logic(table: int) -> None:
    a, b, c = operands(32, 3)
    got = evaluate(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", [a, b, c], np.uint32)
    for r, x, y, z in zip(*(v.tolist() for v in (got, a, b, c)), strict=True):
        assert r == sum(
            (table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1) & 1) << i for i in range(32)
        )


PERMUTED = {  # bytes 3 … 0 of the result, for the selector's low two bits (PTX ISA, prmt)
    "f4e": ["3210", "4321", "5432", "6543"], "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"], "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"], "rc16": ["1010", "3232", "1010", "3232"],
}  # fmt: skip


@pytest.mark.parametrize("mode", ["", *PERMUTED])
def test_permute(mode: str) -> None:
    a, b, c = operands(32, 3)
    statement = f"prmt.b32{'.' + mode if mode else ''} {{d}}, {{a}}, {{b}}, {{c}};"
    got = evaluate(statement, [a, b, c], np.uint32)
    for r, x, y, z in zip(*(v.tolist() for v in (got, a, b, c)), strict=True):
        both = y << 32 | x
        choices = (
            [int(i) for i in reversed(PERMUTED[mode][z & 3])] if mode else [z >> 4 * i & 15 for i in range(4)]
        )
        octets = [both >> 8 * (i & 7) & 0xFF for i in choices]
        octets = [(0xFF if o & 0x80 else 0) if i & 8 else o for o, i in zip(octets, choices, strict=True)]
        assert r == sum(o << 8 * i for i, o in enumerate(octets))
    fixed = evaluate("prmt.b32 {d}, {a}, {b}, 0x9A41U;", [a, b], np.uint32)
    same = evaluate("prmt.b32 {d}, {a}, {b}, {c};", [a, b, np.full_like(a, 0x9A41)], np.uint32)
    assert np.array_equal(fixed, same)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(mode: str) -> None:
    a, b, c = operands(32, 3)
    c %= 70
    left = evaluate(f"shf.l.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.uint32)
    right = evaluate(f"shf.r.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.uint32)
    for up, r, x, y, n in zip(*(v.tolist() for v in (left, right, a, b, c)), strict=True):
        n = n & 31 if mode == "wrap" else min(n, 32)
        assert up == ((y << 32 | x) << n) >> 32 & 0xFFFFFFFF
        assert r == (y << 32 | x) >> n & 0xFFFFFFFF


def test_dot_products_of_bytes() -> None:
    a, b, c = operands(32, 3)
    for kinds in ("s32.s32", "u32.u32", "s32.u32"):
        got = evaluate(f"dp4a.{kinds} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.uint32)
        first, second = (k[0] + "8" for k in kinds.split("."))
        for r, x, y, z in zip(*(v.tolist() for v in (got, a, b, c)), strict=True):
            total = z + sum(
                signed(x >> 8 * i & 255, first) * signed(y >> 8 * i & 255, second) for i in range(4)
            )
            assert r == total % 2**32


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_absolute_difference(kind: str) -> None:
    check(f"sad.{kind} {{d}}, {{a}}, {{b}}, {{c}};", lambda a, b, c: c + abs(a - b), [kind] * 3, kind)


def test_carries_make_wide_sums() -> None:
    a, b, c, e = operands(32, 4)
    low = evaluate("add.cc.u32 {d}, {a}, {b}; addc.u32 %r80, {c}, {e};", [a, b, c, e], np.uint32)
    high = evaluate("add.cc.u32 %r80, {a}, {b}; addc.u32 {d}, {c}, {e};", [a, b, c, e], np.uint32)
    for lo, h, w, x, y, z in zip(*(v.tolist() for v in (low, high, a, b, c, e)), strict=True):
        assert lo | h << 32 == ((y << 32 | w) + (z << 32 | x)) % 2**64
    high = evaluate("sub.cc.u32 %r80, {a}, {b}; subc.u32 {d}, {c}, {e};", [a, b, c, e], np.uint32)
    for h, w, x, y, z in zip(*(v.tolist() for v in (high, a, b, c, e)), strict=True):
        assert h == ((y << 32 | w) - (z << 32 | x)) % 2**64 >> 32


COMPARISONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", list(COMPARISONS))
def test_comparison(name: str, kind: str) -> None:
    a, b = operands(int(kind[1:]), 2)
    got = evaluate(f"setp.{name}.{kind} {{p}}, {{a}}, {{b}}; selp.u32 {{d}}, 7, 9, {{p}};", [a, b], np.uint32)
    for r, x, y in zip(*(v.tolist() for v in (got, a, b)), strict=True):
        assert r == (7 if COMPARISONS[name](signed(x, kind), signed(y, kind)) else 9)


def test_comparison_with_a_second_predicate() -> None:
    a, b = operands(32, 2)
    statement = "setp.lt.u32 %p3, {a}, 100; setp.gt.or.s32 {p}|%p2, {a}, {b}, !%p3; selp.u32 %r80, 1, 0, %p2;"
    got = evaluate(statement + "selp.u32 {d}, 2, 0, {p}; or.b32 {d}, {d}, %r80;", [a, b], np.uint32)
    for r, x, y in zip(*(v.tolist() for v in (got, a, b)), strict=True):
        greater = signed(x, "s32") > signed(y, "s32")
        assert r == 2 * (greater or x >= 100) + (not greater or x >= 100)


def test_select_by_sign() -> None:
    a, b, c = operands(32, 3)
    got = evaluate("slct.b32.s32 {d}, {a}, {b}, {c};", [a, b, c], np.uint32)
    assert np.array_equal(got, np.where(c.view(np.int32) >= 0, a, b))


def test_guards_write_only_their_lanes() -> None:
    a, b = operands(32, 2)
    statement = "mov.u32 {d}, {b}; setp.lt.u32 {p}, {a}, 5; @{p} mov.u32 {d}, 1; @!{p} add.u32 {d}, {d}, 1;"
    got = evaluate(statement, [a, b], np.uint32)
    assert np.array_equal(got, np.where(a < 5, 1, b + np.uint32(1)))
