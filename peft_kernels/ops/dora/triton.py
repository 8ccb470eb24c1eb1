"""Triton kernels of `dora_norm`: W + s B A is formed in registers, squared and summed by rows; see README.md.

Two launches, no host in between. The first writes a sum of squares for every row and split of K; the second
adds up those of a row, tests the result, and makes rows that fail again in fp64.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from peft_kernels.core.gpu import check_kernel_dtype, gpu, launch_options
from peft_kernels.ops.dora.schema import NormArgs, check_dora_norm
from peft_kernels.ops.nf4.schema import BaseWeight
from peft_kernels.ops.nf4.triton import (
    code_table,
    contiguous,
    decode,
    has_shuffle,
    load_absmax,
    nested_blocksize,
)

_WARPS = 4
_CTAS_PER_SM = 4  # wanted: two or three fit at a time
_LEAST_COLUMNS = 256  # of a split
_RANK = 16  # of a product that is added to a tile: the fewest that Triton 3.6 takes
_FINISH_ROWS, _FINISH_COLUMNS, _FINISH_RANK, _FINISH_REGISTERS = 8, 512, 32, 64

_GROUP = tl.constexpr(32)  # the least blocksize
_MOST_ERROR = tl.constexpr(4e-7)
_LEAST_SQUARE, _MOST_SQUARE = tl.constexpr(1e-24), tl.constexpr(1e38)


@dataclass(frozen=True)
class NormPlan:
    """How rows and inputs are shared out.

    Attributes:
        rows, columns: of a tile of W.
        aligned: every row begins with a group of 32 elements of one absmax.
        registers: of a thread; left to itself, ptxas aims at one more CTA and spills.
        stages: of Triton's software pipeline, which has no registers where the last ranks are masked.
        splits: parts of K, of which every row has its own sum.
        split_columns: inputs of a part, a multiple of `columns`.
    """

    rows: int
    columns: int
    aligned: bool
    registers: int
    stages: int
    splits: int
    split_columns: int


def norm_plan(out_features: int, in_features: int, rank: int, nf4: bool, multiprocessors: int) -> NormPlan:
    """The plan for a problem, a function of its shape and the device alone.

    As many splits as give every multiprocessor its CTAs. Rows that begin anywhere need an address for every
    element, which leaves registers for a small tile only.
    """
    aligned = in_features % _GROUP.value == 0
    rows, columns = (64, 64) if aligned else (16, 32)
    registers = 168 if nf4 and rank % _RANK == 0 else 255  # three CTAs, or two
    wanted = triton.cdiv(_CTAS_PER_SM * multiprocessors, triton.cdiv(out_features, rows))
    splits = max(1, min(wanted, in_features // _LEAST_COLUMNS))
    split_columns = triton.cdiv(triton.cdiv(in_features, splits), columns) * columns
    splits = triton.cdiv(in_features, split_columns)
    stages = 3 if rank % _RANK == 0 else 1
    return NormPlan(rows, columns, aligned, registers, stages, splits, split_columns)


@triton.jit
def _weight_tile(
    base, row, inside, k0, K, stride_n, stride_k, table, COLUMNS: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """fp32 W[row, k0 : k0 + COLUMNS], zero outside; BLOCKSIZE 0 for a dense W.

    With ALIGNED, K a multiple of 32, every 32 columns share an absmax and rows share no byte. Otherwise rows
    begin anywhere in blocks and bytes, and every element has its own byte and absmax loaded.
    """
    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr = base
    ROWS: tl.constexpr = row.shape[0]
    columns = k0 + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (columns < K)[None, :]
    if BLOCKSIZE == 0:
        element = row[:, None] * stride_n + columns[None, :].to(tl.int64) * stride_k
        weight = tl.load(weight_ptr + element, mask=mask, other=0.0).to(tl.float32)
    elif ALIGNED:
        byte = k0 // 2 + tl.arange(0, COLUMNS // 2)
        byte_mask = inside[:, None] & (byte < K // 2)[None, :]
        packed = tl.load(weight_ptr + row[:, None] * (K // 2) + byte[None, :], mask=byte_mask, other=0)
        group = k0 + _GROUP * tl.arange(0, COLUMNS // _GROUP)
        block = (row[:, None] * K + group[None, :]) // BLOCKSIZE
        absmax = load_absmax(
            absmax_ptr, block, inside[:, None] & (group < K)[None, :],
            nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, NESTED,
        )  # fmt: skip
        high, low = decode(packed, table, SHUFFLE)
        code = tl.reshape(tl.join(high, low), (ROWS, COLUMNS // _GROUP, _GROUP))
        weight = tl.reshape(code * absmax[:, :, None], (ROWS, COLUMNS))
    else:
        element = row[:, None] * K + columns[None, :]
        packed = tl.load(weight_ptr + element // 2, mask=mask, other=0)
        absmax = load_absmax(
            absmax_ptr, element // BLOCKSIZE, mask,
            nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, NESTED,
        )  # fmt: skip
        high, low = decode(packed, table, SHUFFLE)
        weight = tl.where(element % 2 == 0, high, low) * absmax
    return weight


@triton.jit
def _scaled_sum(weight, update, scaling):
    """weight + scaling * update; scaling in two fp32 numbers, as its rounding would not average out."""
    high = scaling.to(tl.float32)
    low = (scaling - high.to(tl.float64)).to(tl.float32)
    value = tl.fma(tl.broadcast_to(high, update.shape), update, weight)
    return tl.fma(tl.broadcast_to(low, update.shape), update, value)


@triton.jit
def row_squares_kernel(
    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
    a_ptr, b_ptr, squares_ptr, most_ptr, N, K, r, stride_n, stride_k, scaling: tl.float64, split_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """squares [splits, N] of the rows, in fp64; and, by the first r programs, most [r] = max|A_i|."""
    if tl.program_id(0) < r:
        _store_largest(a_ptr, most_ptr, tl.program_id(0), K, COLUMNS * 16)
        return
    base = (weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr)
    program, row_blocks = tl.program_id(0) - r, tl.cdiv(N, ROWS)
    split = program // row_blocks
    rows = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    inside, row = rows < N, rows.to(tl.int64)
    table = code_table(SHUFFLE) if BLOCKSIZE else 0.0
    # Each sum is of a thread's own squares, and carries along what its roundings lost (Kahan).
    total = tl.zeros((ROWS, COLUMNS // 4), tl.float32)
    lost = tl.zeros((ROWS, COLUMNS // 4), tl.float32)
    for k0 in range(split * split_columns, tl.minimum(K, (split + 1) * split_columns), COLUMNS):
        columns = k0 + tl.arange(0, COLUMNS)
        update = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i0 in range(0, r, RANK):
            i = i0 + tl.arange(0, RANK)
            b_mask, a_mask = inside[:, None] & (i < r)[None, :], (i < r)[:, None] & (columns < K)[None, :]
            b = tl.load(b_ptr + row[:, None] * r + i[None, :], mask=b_mask, other=0.0)
            a = tl.load(a_ptr + i[:, None].to(tl.int64) * K + columns[None, :], mask=a_mask, other=0.0)
            update = tl.dot(b.to(tl.float32), a.to(tl.float32), update, input_precision="ieee")
        weight = _weight_tile(
            base, row, inside, k0, K, stride_n, stride_k, table, COLUMNS, BLOCKSIZE, NESTED, ALIGNED, SHUFFLE
        )
        value = _scaled_sum(weight, update, scaling)
        square = tl.sum(tl.reshape(value * value, (ROWS, COLUMNS // 4, 4)), 2) - lost
        larger = total + square
        lost = (larger - total) - square
        total = larger
    sums = tl.sum(total.to(tl.float64) - lost.to(tl.float64), 1)
    tl.store(squares_ptr + split.to(tl.int64) * N + rows, sums, mask=inside)


@triton.jit
def _store_largest(a_ptr, most_ptr, i, K, COLUMNS: tl.constexpr):
    """most[i] = max|A_i|."""
    most = tl.zeros((COLUMNS,), tl.float32)
    for k0 in range(0, K, COLUMNS):
        columns = k0 + tl.arange(0, COLUMNS)
        a = tl.load(a_ptr + i.to(tl.int64) * K + columns, mask=columns < K, other=0.0)
        most = tl.maximum(most, tl.abs(a.to(tl.float32)))
    tl.store(most_ptr + i, tl.max(most, 0))


@triton.jit
def finish_norms_kernel(
    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
    a_ptr, b_ptr, squares_ptr, most_ptr, norm_ptr, N, K, r, stride_n, stride_k, scaling: tl.float64,
    rounding: tl.float64, splits, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """norm [N]: from the sums of squares where they are accurate, otherwise from rows in fp64.

    `rounding` bounds the error of an element of the product, relative to |s| sum_i |B_i| max|A_i|.
    """
    base = (weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr)
    index = tl.arange(0, ROWS)
    rows = tl.program_id(0) * ROWS + index
    inside, row = rows < N, rows.to(tl.int64)
    sums = tl.zeros((ROWS,), tl.float64)
    for split in range(splits):
        sums += tl.load(squares_ptr + tl.cast(split, tl.int64) * N + rows, mask=inside, other=1.0)
    norm = tl.sqrt(sums)

    reach = tl.zeros((ROWS,), tl.float64)
    for i0 in range(0, r, RANK):
        i = i0 + tl.arange(0, RANK)
        b_mask = inside[:, None] & (i < r)[None, :]
        b = tl.load(b_ptr + row[:, None] * r + i[None, :], mask=b_mask, other=0.0).to(tl.float64)
        most = tl.load(most_ptr + i, mask=i < r, other=0.0).to(tl.float64)
        reach += tl.sum(tl.abs(b) * most[None, :], 1)
    element = rounding * tl.abs(scaling) * reach
    # d + K d^2 / 2 <= 4e-7 with d = element / norm, without the division.
    small = element * norm + 0.5 * element * element * K <= _MOST_ERROR * sums
    accurate = small & (sums > _LEAST_SQUARE) & (sums < _MOST_SQUARE)
    tl.store(norm_ptr + rows, norm.to(tl.float32), mask=inside & accurate)

    again = (inside & ~accurate).to(tl.int32)
    if tl.sum(again) > 0:
        for one in range(ROWS):
            if tl.sum(tl.where(index == one, again, 0)) > 0:
                _store_norm_in_double(
                    base, a_ptr, b_ptr, norm_ptr, tl.program_id(0) * ROWS + one, K, r, stride_n, stride_k,
                    scaling, COLUMNS, BLOCKSIZE, NESTED, SHUFFLE,
                )  # fmt: skip


@triton.jit
def _store_norm_in_double(
    base, a_ptr, b_ptr, norm_ptr, n, K, r, stride_n, stride_k, scaling,
    COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """norm[n], every step in fp64."""
    row = n + tl.zeros((1,), tl.int64)
    table = code_table(SHUFFLE) if BLOCKSIZE else 0.0
    sums = tl.zeros((1, COLUMNS), tl.float64)
    for k0 in range(0, K, COLUMNS):
        columns = k0 + tl.arange(0, COLUMNS)[None, :]
        weight = _weight_tile(
            base, row, row >= 0, k0, K, stride_n, stride_k, table, COLUMNS, BLOCKSIZE, NESTED, False, SHUFFLE
        )
        update = tl.zeros((1, COLUMNS), tl.float64)
        for i in range(r):
            a = tl.load(a_ptr + tl.cast(i, tl.int64) * K + columns, mask=columns < K, other=0.0)
            b = tl.load(b_ptr + n.to(tl.int64) * r + i)
            update += b.to(tl.float64) * a.to(tl.float64)
        value = weight.to(tl.float64) + scaling * update
        sums += value * value
    tl.store(norm_ptr + row, tl.sqrt(tl.sum(sums, 1)).to(tl.float32))


def dora_norm(*args: Any) -> torch.Tensor:
    """Launch the kernels; see `reference.dora_norm`.

    Raises:
        ValueError: besides what the contract says, an adapter in float64.
    """
    a = NormArgs(*args)
    check_dora_norm(a)
    check_kernel_dtype("lora_a", a.lora_a)
    base, dense = BaseWeight(*args[:7]), a.absmax is None
    stride_n, stride_k = a.weight.stride() if dense else (0, 0)
    base = base if dense else contiguous(base)
    lora_a, lora_b = a.lora_a.contiguous(), a.lora_b.contiguous()
    rank, in_features = lora_a.shape
    plan = norm_plan(a.out_features, in_features, rank, not dense, gpu().multiprocessors)
    squares = lora_a.new_empty((plan.splits, a.out_features), dtype=torch.float64)
    most = lora_a.new_empty(rank, dtype=torch.float32)
    norm = lora_a.new_empty(a.out_features, dtype=torch.float32)
    tensors = (*base[:5], lora_a, lora_b, squares, most)
    shape = (a.out_features, in_features, rank, stride_n, stride_k, a.scaling)
    nf4 = {"BLOCKSIZE": a.blocksize, "NESTED": nested_blocksize(base), "SHUFFLE": has_shuffle()}
    row_squares_kernel[(rank + triton.cdiv(a.out_features, plan.rows) * plan.splits,)](
        *tensors, *shape, plan.split_columns, ROWS=plan.rows, COLUMNS=plan.columns, RANK=_RANK,
        ALIGNED=plan.aligned, **nf4, **launch_options(_WARPS, plan.stages, plan.registers),
    )  # fmt: skip
    rounding = min(rank + 2.0, 3 * math.sqrt(rank + 1)) * 2.0**-24  # README.md, "Error"
    finish_norms_kernel[(triton.cdiv(a.out_features, _FINISH_ROWS),)](
        *tensors, norm, *shape, rounding, plan.splits, ROWS=_FINISH_ROWS, COLUMNS=_FINISH_COLUMNS,
        RANK=_FINISH_RANK, **nf4, **launch_options(_WARPS, registers=_FINISH_REGISTERS),
    )  # fmt: skip
    return norm
