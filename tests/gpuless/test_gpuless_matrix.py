"""Tensor instructions, shuffles, votes and atomics against numpy; tl.dot of every dtype on every
architecture.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

import gpuless
from gpuless.exact import random_bits, values
from gpuless.rounding import f32_to_bf16, f32_to_tf32, fp8_values
from gpuless.snippets import evaluate, run

EPSILON = np.finfo(np.float32).eps


def pack(matrix: NDArray, item: int) -> NDArray[np.uint32]:
    """Rows of elements as 32-bit words."""
    return np.ascontiguousarray(matrix.astype(f"u{item}")).view(np.uint32)


def encode(x: NDArray, kind: str) -> NDArray:
    """float32 -> bits of an operand of mma."""
    if kind == "bf16":
        return f32_to_bf16(x)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    if kind == "tf32":
        return f32_to_tf32(x)
    return (
        np.abs(np.asarray(fp8_values(kind))[None] - x[..., None].clip(-400, 400))
        .argsort(-1)[..., 0]
        .astype(np.uint8)
    )


def decode(bits: NDArray, kind: str) -> NDArray[np.float64]:
    """What the bits mean."""
    if kind in ("e4m3", "e5m2"):
        return fp8_values(kind)[bits].astype(np.float64)
    return values(bits, "f32" if kind == "tf32" else kind)


MMA = [
    ("m16n8k8", "tf32", "f32"), ("m16n8k4", "tf32", "f32"), ("m16n8k8", "bf16", "f32"),
    ("m16n8k16", "bf16", "f32"), ("m16n8k8", "f16", "f32"), ("m16n8k16", "f16", "f32"),
    ("m16n8k16", "f16", "f16"), ("m16n8k32", "e4m3", "f32"), ("m16n8k32", "e5m2", "f32"),
]  # fmt: skip


def fragment_indices(rows: int, k: int, per: int, half_rows: int) -> list[tuple[NDArray, NDArray]]:
    """(row, first column) of every register of a lane, as the tables of PTX ISA 9.7.14.5 give them, [32]
    each.
    """
    lane = np.arange(32)
    group, within = lane // 4, lane % 4
    registers = []
    for i in range(rows // 8 * (k // (4 * per))):
        row = group + 8 * (i % half_rows)
        registers.append((row, within * per + 4 * per * (i // half_rows)))
    return registers


@pytest.mark.parametrize(("shape", "kind", "to"), MMA)
def test_mma(shape: str, kind: str, to: str) -> None:
    rng = np.random.default_rng(0)
    k = int(shape.split("k")[1])
    a, b, c = rng.standard_normal((16, k)), rng.standard_normal((8, k)), rng.standard_normal((16, 8))
    a, b = encode(a.astype(np.float32), kind), encode(b.astype(np.float32), kind)
    item, accumulate = a.itemsize, np.float32 if to == "f32" else np.float16
    per = 4 // item
    words = {"a": pack(a, item), "b": pack(b, item)}
    layouts = {"a": fragment_indices(16, k, per, 2), "b": fragment_indices(8, k, per, 1)}
    lines, arrays = [], []
    for name, first in (("a", 10), ("b", 20)):
        for i, (row, column) in enumerate(layouts[name]):
            lines.append(
                f"  add.u64 %rd1, %rd{50 + len(arrays)}, %rd40; ld.global.b32 %r{first + i}, [%rd1];"
            )
            arrays.append(np.ascontiguousarray(words[name][row, column // per]))
    group, within = np.arange(32) // 4, np.arange(32) % 4
    c = c.astype(accumulate)
    outputs = 4 if to == "f32" else 2
    for i in range(outputs):
        lines.append(f"  add.u64 %rd1, %rd{50 + len(arrays)}, %rd40; ld.global.b32 %r{30 + i}, [%rd1];")
        if to == "f32":
            arrays.append(c[group + 8 * (i // 2), 2 * within + i % 2].view(np.uint32))
        else:
            arrays.append(
                np.ascontiguousarray(np.stack([c[group + 8 * i, 2 * within + j] for j in (0, 1)], 1)).view(
                    np.uint32
                )
            )
    d = np.zeros((outputs, 32), np.uint32)
    ra, rb = (", ".join(f"%r{f + i}" for i in range(len(layouts[n]))) for n, f in (("a", 10), ("b", 20)))
    rc = ", ".join(f"%r{30 + i}" for i in range(outputs))
    lines.append(
        f"  mma.sync.aligned.{shape}.row.col.{to}.{kind}.{kind}.{to} {{{rc}}}, {{{ra}}}, {{{rb}}}, {{{rc}}};"
    )
    lines.append(f"  add.u64 %rd1, %rd{50 + len(arrays)}, %rd40;")
    lines += [f"  st.global.b32 [%rd1+{128 * i}], %r{30 + i};" for i in range(outputs)]
    run("\n".join(lines), [*arrays, d], threads=32)
    got = np.zeros((16, 8))
    for i in range(outputs):
        if to == "f32":
            got[group + 8 * (i // 2), 2 * within + i % 2] = d[i].view(np.float32)
        else:
            for j in (0, 1):
                got[group + 8 * i, 2 * within + j] = d[i].view(np.float16).reshape(-1, 2)[:, j]
    x, y = decode(a, kind), decode(b, kind)
    expected = x @ y.T + c
    bound = (np.abs(x) @ np.abs(y).T + np.abs(c)) * (EPSILON if to == "f32" else 2.0**-11)
    assert (np.abs(got - expected) <= bound).all()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_through_shared_memory(count: int, transpose: bool) -> None:
    """stmatrix then ldmatrix, and each beside plain accesses."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    out = np.zeros((count, 32), np.uint32)
    flag = ".trans" if transpose else ""
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    body = f"""
  shl.b32 %r1, %r90, 4; mov.u32 %r2, tile; add.u32 %r3, %r2, %r1;   // lane l holds row l
  mul.wide.u32 %rd1, %r90, 16; add.u64 %rd2, %rd50, %rd1;
  ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd2];
  st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
  bar.warp.sync 0xffffffff;
  ldmatrix.sync.aligned.m8n8.x{count}{flag}.shared.b16 {{{registers}}}, [%r3];
  add.u64 %rd3, %rd51, %rd40;
""" + "\n".join(f"  st.global.b32 [%rd3+{128 * i}], %r{10 + i};" for i in range(count))
    declarations = ".shared .align 16 .b8 tile[512];"
    run(body, [data, out], threads=32, declarations=declarations)
    expected = data[:count].transpose(0, 2, 1) if transpose else data[:count]
    assert np.array_equal(out.view(np.uint16).reshape(count, 8, 8), expected)

    body = """
  shl.b32 %r1, %r90, 4; mov.u32 %r2, tile; add.u32 %r3, %r2, %r1;
  add.u64 %rd3, %rd50, %rd40;
""" + "\n".join(f"  ld.global.b32 %r{10 + i}, [%rd3+{128 * i}];" for i in range(count))
    body += f"""
  stmatrix.sync.aligned.m8n8.x{count}{flag}.shared.b16 [%r3], {{{registers}}};
  bar.sync 0;
  setp.lt.u32 %p1, %r90, {8 * count};
  mul.wide.u32 %rd1, %r90, 16; add.u64 %rd2, %rd51, %rd1;
  @%p1 ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
  @%p1 st.global.v4.b32 [%rd2], {{%r4, %r5, %r6, %r7}};
"""
    stored = np.zeros((count, 8, 8), np.uint16)
    run(body, [out, stored], threads=32, declarations=declarations)
    assert np.array_equal(stored, data[:count])


@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffle(mode: str, width: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 1 << 32, 256).astype(np.uint32), rng.integers(0, 32, 256).astype(np.uint32)
    clamp = ((32 - width) << 8) | (0 if mode == "up" else 31)
    shuffle = f"shfl.sync.{mode}.b32 {{d}}|{{p}}, {{a}}, {{b}}, {clamp}, 0xffffffff;"
    statement = shuffle + "@!{p} add.u32 {d}, {d}, 1;"
    got = evaluate(statement, [a, b], np.uint32)
    for i, n in enumerate(b.tolist()):
        lane, first = i % 32, i % 32 // width * width
        origin = {"idx": first + n % width, "up": lane - n, "down": lane + n, "bfly": lane ^ n}[mode]
        inside = origin >= first if mode == "up" else origin < first + width
        expected = a[i - lane + origin] if inside else a[i] + np.uint32(1)
        assert got[i] == expected


def test_votes_and_warp_reductions() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 6, 256).astype(np.uint32)
    a[:32] = 3
    warps = a.reshape(-1, 32)

    def check(statement: str, reference: Callable[[NDArray], int]) -> None:
        got = evaluate(statement, [a], np.uint32).reshape(-1, 32)
        assert [row.tolist() for row in got] == [[reference(w) % 2**32] * 32 for w in warps]

    p = "setp.eq.u32 %p3, {a}, 3; "
    bits = [1 << i for i in range(32)]
    check(p + "vote.sync.ballot.b32 {d}, %p3, 0xffffffff;", lambda w: int((w == 3) @ bits))
    for name, reference in (("all", np.all), ("any", np.any), ("uni", lambda x: x.all() or not x.any())):
        check(
            p + f"vote.sync.{name}.pred {{p}}, %p3, 0xffffffff; selp.u32 {{d}}, 1, 0, {{p}};",
            lambda w, f=reference: int(f(w == 3)),
        )
    for name, reference in (
        ("add", np.sum),
        ("min", np.min),
        ("max", np.max),
        ("xor", np.bitwise_xor.reduce),
    ):
        check(
            f"redux.sync.{name}.{'b' if name == 'xor' else 'u'}32 {{d}}, {{a}}, 0xffffffff;",
            lambda w, f=reference: int(f(w)),
        )
    got = evaluate("match.any.sync.b32 {d}, {a}, 0xffffffff;", [a], np.uint32).reshape(-1, 32)
    assert [row.tolist() for row in got] == [[int((w == x) @ bits) for x in w] for w in warps]
    got = evaluate(
        "setp.lt.u32 {p}, {a}, 3; mov.u32 {d}, 0; @{p} activemask.b32 {d};", [a], np.uint32
    ).reshape(-1, 32)
    assert [row.tolist() for row in got] == [[int((w < 3) @ bits) if x < 3 else 0 for x in w] for w in warps]


ATOMICS = {
    "add": lambda old, new: old + new, "min": min, "max": max, "exch": lambda old, new: new,
    "and": lambda old, new: old & new, "or": lambda old, new: old | new, "xor": lambda old, new: old ^ new,
}  # fmt: skip


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", list(ATOMICS))
def test_atomics(name: str, space: str) -> None:
    """Every thread updates one of four counters; the values returned are a sequence of updates."""
    rng = np.random.default_rng(0)
    new = rng.integers(0, 1 << 32, 128).astype(np.uint32)
    memory, old = rng.integers(0, 1 << 32, 4).astype(np.uint32), np.zeros(128, np.uint32)
    before = memory.copy()
    kind = "b32" if name in ("exch", "and", "or", "xor") else "u32"
    body = f"""
  add.u64 %rd1, %rd50, %rd40; ld.global.b32 %r1, [%rd1];
  and.b32 %r2, %r90, 3; mul.wide.u32 %rd2, %r2, 4; add.u64 %rd3, %rd51, %rd2;
  shl.b32 %r4, %r2, 2; mov.u32 %r5, counters; add.u32 %r6, %r5, %r4;
  setp.lt.u32 %p1, %r90, 4;
  @%p1 ld.global.b32 %r7, [%rd3];
  @%p1 st.shared.b32 [%r6], %r7;
  bar.sync 0;
  atom.{space}.{name}.{kind} %r3, [{"%rd3" if space == "global" else "%r6"}], %r1;
  add.u64 %rd4, %rd52, %rd40; st.global.b32 [%rd4], %r3;
  bar.sync 0;
"""
    body += "  @%p1 ld.shared.b32 %r7, [%r6];\n  @%p1 st.global.b32 [%rd3], %r7;" if space == "shared" else ""
    run(body, [new, memory, old], declarations=".shared .align 4 .b8 counters[16];")
    for counter in range(4):
        current = int(before[counter])
        for thread in range(counter, 128, 4):
            assert old[thread] == current
            current = ATOMICS[name](current, int(new[thread])) % 2**32
        assert memory[counter] == current


def test_floating_atomics() -> None:
    a, total = random_bits("f32", 1, 256, spread=5), np.zeros(1, np.float32)
    body = "add.u64 %rd1, %rd50, %rd40; ld.global.f32 %r1, [%rd1]; red.global.add.f32 [%rd51], %r1;"
    run(body, [a[:128], total])
    expected = np.float32(0)
    for x in a[:128].view(np.float32):
        expected += x
    assert total[0] == expected
    pair, sums = np.full(128, 0x3F804000, np.uint32), np.zeros(1, np.uint32)  # bf16: (2, 1)
    body = "add.u64 %rd1, %rd50, %rd40; ld.global.b32 %r1, [%rd1]; red.global.add.noftz.bf16x2 [%rd51], %r1;"
    run(body, [pair, sums])
    assert sums[0] == 0x43004380  # 128 and 256


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros((M, N), tl.float32 if c_ptr.dtype.element_ty != tl.int32 else tl.int32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        if TRANSPOSED:
            b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :])
        else:
            b = tl.load(b_ptr + n[None, :] * K + (start + k)[:, None])
        acc = tl.dot(a, b, acc, input_precision=HOW, out_dtype=acc.dtype)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)


DOTS = [
    ("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "ieee"), ("float32", "tf32"),
    ("float32", "tf32x3"), ("int8", "ieee"), ("float8_e5m2", "ieee"),
]  # fmt: skip
DOTS_BY_ARCH = [
    *((arch, dtype, how, False) for arch in (80, 90) for dtype, how in DOTS),
    *((arch, dtype, how, True) for arch in (80, 90) for dtype, how in DOTS if dtype != "int8"),
    *((arch, dtype, how, False) for arch in (86, 89, 120) for dtype, how in (DOTS[0], DOTS[2], DOTS[4])),
    *((arch, "float8_e4m3fn", "ieee", False) for arch in (89, 90, 120)),
]


@pytest.mark.parametrize(("arch", "dtype", "how", "transposed"), DOTS_BY_ARCH)
def test_triton_dot(arch: int, dtype: str, how: str, transposed: bool) -> None:
    kind = getattr(torch, dtype)
    m, n, k = 64, 32, 128
    a, b = torch.randn(m, k), torch.randn(n, k)
    if dtype == "int8":
        a, b = (a * 40).clamp(-128, 127), (b * 40).clamp(-128, 127)
    a, b = a.to(kind), b.to(kind)
    exact = a.double() @ b.double().T
    given = b.T.contiguous() if transposed else b
    c = torch.zeros(m, n, dtype=torch.int32 if dtype == "int8" else torch.float32)
    with gpuless.device(arch):
        product_kernel[(1,)](a, given, c, k, m, n, 64, transposed, how, enable_fp_fusion=True)
    if dtype == "int8":
        assert torch.equal(c.double(), exact)
        return
    unit = 2.0**-10 if how == "tf32" else 2.0**-20 if how == "tf32x3" else k * 2.0**-24
    assert ((c.double() - exact).abs() <= 2 * unit * (a.double().abs() @ b.double().abs().T)).all()


@triton.jit
def ragged_kernel(a_ptr, b_ptr, c_ptr, lengths_ptr, K, SIZE: tl.constexpr, BK: tl.constexpr):
    i, k, cta = tl.arange(0, SIZE), tl.arange(0, BK), tl.program_id(0)
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, tl.load(lengths_ptr + cta), BK):
        a = tl.load(a_ptr + i[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + i[None, :] * K + (start + k)[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + cta * SIZE * SIZE + i[:, None] * SIZE + i[None, :], acc)


@pytest.mark.parametrize("arch", [80, 90])
def test_ctas_whose_loops_differ(arch: int) -> None:
    """CTAs of one chunk leave a pipelined loop one by one, with copies and products under way."""
    torch.manual_seed(0)
    a, b, c = torch.randn(64, 256).bfloat16(), torch.randn(64, 256).bfloat16(), torch.empty(5, 64, 64)
    lengths = torch.tensor([32, 256, 0, 128, 64], dtype=torch.int32)
    with gpuless.device(arch):
        ragged_kernel[(5,)](a, b, c, lengths, 256, 64, 32, num_stages=3, enable_fp_fusion=True)
    for result, n in zip(c.double(), lengths.tolist(), strict=True):
        x, y = a[:, :n].double(), b[:, :n].double()
        assert ((result - x @ y.T).abs() <= (n + 2) * 2.0**-24 * (x.abs() @ y.abs().T)).all()
