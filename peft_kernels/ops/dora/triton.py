"""Triton kernels of `dora_norm`: rows of W + s B A are formed in registers, squared and summed; see README.md.

Two launches, no host in between. The first writes a sum of squares for every row and split of K; the second adds
a row's sums, tests them, and makes rows that fail again in fp64.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from peft_kernels.core.checks import check_dtype
from peft_kernels.core.gpu import gpu
from peft_kernels.ops.dora.schema import NormArgs, check_dora_norm
from peft_kernels.ops.nf4.schema import WEIGHT_DTYPES, BaseWeight
from peft_kernels.ops.nf4.triton import (
    code_table,
    contiguous,
    decode,
    has_shuffle,
    load_absmax,
    nested_blocksize,
)

_ROWS, _COLUMNS, _RANK = 64, 64, 16  # of a tile: 32 sums a thread
_WARPS = 4
_CTAS_PER_SM = 4  # wanted: three fit at a time, and their ends should not coincide
_LEAST_COLUMNS = 256  # of a split
_FINISH_ROWS, _FINISH_COLUMNS = 8, 512

_KNOWN = 32  # elements that share an absmax, whatever the blocksize, where K is a multiple of it
_GROUP = tl.constexpr(_KNOWN)
_MOST_ERROR = tl.constexpr(4e-7)
_LEAST_NORM = tl.constexpr(1e-12)
_MOST_NORM = tl.constexpr(1e19)


@dataclass(frozen=True)
class NormPlan:
    """How the rows' inputs are shared out.

    Attributes:
        splits: parts of K, of which every row has its own sums.
        columns: of a part, a multiple of the tile's.
    """

    splits: int
    columns: int


def norm_plan(out_features: int, in_features: int, multiprocessors: int) -> NormPlan:
    """As many splits as give every multiprocessor its CTAs; a function of shapes and device alone."""
    wanted = triton.cdiv(_CTAS_PER_SM * multiprocessors, triton.cdiv(out_features, _ROWS))
    splits = max(1, min(wanted, in_features // _LEAST_COLUMNS))
    columns = triton.cdiv(triton.cdiv(in_features, splits), _COLUMNS) * _COLUMNS
    return NormPlan(triton.cdiv(in_features, columns), columns)


@triton.jit
def _load_tile(
    base, row, inside, k0, K, stride_n, stride_k,
    COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """W[row, k0 : k0 + COLUMNS] as it is stored, and its absmax; `_decode_tile` makes fp32 of them.

    A dense tile [rows, COLUMNS]; with ALIGNED, K a multiple of 32, bytes [rows, COLUMNS/2] and an absmax for 32
    columns; otherwise a byte and an absmax for every element, as rows begin in the middle of blocks and bytes.
    """
    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr = base
    columns = k0 + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (columns < K)[None, :]
    if BLOCKSIZE == 0:
        element = row[:, None] * stride_n + columns[None, :].to(tl.int64) * stride_k
        stored = tl.load(weight_ptr + element, mask=mask, other=0.0)
        absmax = tl.zeros((1, 1), tl.float32)
    else:
        if ALIGNED:
            byte = k0 // 2 + tl.arange(0, COLUMNS // 2)
            group = k0 + _GROUP * tl.arange(0, COLUMNS // _GROUP)
            byte_mask = inside[:, None] & (byte < K // 2)[None, :]
            stored = tl.load(weight_ptr + row[:, None] * (K // 2) + byte[None, :], mask=byte_mask, other=0)
            block = (row[:, None] * K + group[None, :]) // BLOCKSIZE
            mask = inside[:, None] & (group < K)[None, :]
        else:
            element = row[:, None] * K + columns[None, :]
            stored = tl.load(weight_ptr + element // 2, mask=mask, other=0)
            block = element // BLOCKSIZE
        absmax = load_absmax(
            absmax_ptr, block, mask, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, NESTED
        )
    return stored, absmax


@triton.jit
def _decode_tile(
    stored, absmax, table, row, k0, K,
    COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """fp32 [rows, COLUMNS] of what `_load_tile` loaded; zero where it was masked."""
    ROWS: tl.constexpr = row.shape[0]
    if BLOCKSIZE == 0:
        weight = stored.to(tl.float32)
    else:
        high, low = decode(stored, table, SHUFFLE)
        if ALIGNED:
            code = tl.reshape(tl.join(high, low), (ROWS, COLUMNS // _GROUP, _GROUP))
            weight = tl.reshape(code * absmax[:, :, None], (ROWS, COLUMNS))
        else:
            element = row[:, None] * K + k0 + tl.arange(0, COLUMNS)[None, :]
            weight = tl.where(element % 2 == 0, high, low) * absmax
    return weight


@triton.jit
def _scaled_sum(weight, update, scaling):
    """weight + scaling * update, scaling in two fp32 numbers: its rounding would be the same for all of a row."""
    high = scaling.to(tl.float32)
    low = (scaling - high.to(tl.float64)).to(tl.float32)
    value = tl.fma(tl.broadcast_to(low, update.shape), update, weight)
    return tl.fma(tl.broadcast_to(high, update.shape), update, value)


@triton.jit
def _squares_kernel(
    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
    a_ptr, b_ptr, squares_ptr, most_ptr, N, K, r, stride_n, stride_k, scaling: tl.float64,
    split_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr, ALIGNED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """squares [splits, N] of the rows, in fp64; and, by the first r programs, most [r] = max|A_i|."""
    base = (weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr)
    if tl.program_id(0) < r:
        _store_largest(a_ptr, most_ptr, tl.program_id(0), K, COLUMNS * 16)
        return
    program = tl.program_id(0) - r
    row_blocks = tl.cdiv(N, ROWS)
    split = program // row_blocks
    rows = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    inside, row = rows < N, rows.to(tl.int64)
    table = code_table(SHUFFLE) if BLOCKSIZE else 0.0
    # Four squares of a thread are added to a sum of its own; each sum carries along what its roundings lost (Kahan).
    total = tl.zeros((ROWS, COLUMNS // 4), tl.float32)
    lost = tl.zeros((ROWS, COLUMNS // 4), tl.float32)
    for k0 in range(split * split_columns, tl.minimum(K, (split + 1) * split_columns), COLUMNS):
        stored, absmax = _load_tile(
            base, row, inside, k0, K, stride_n, stride_k, COLUMNS, BLOCKSIZE, NESTED, ALIGNED
        )
        columns = k0 + tl.arange(0, COLUMNS)
        update = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i0 in range(0, r, RANK):
            i = i0 + tl.arange(0, RANK)
            b_mask, a_mask = inside[:, None] & (i < r)[None, :], (i < r)[:, None] & (columns < K)[None, :]
            b = tl.load(b_ptr + row[:, None] * r + i[None, :], mask=b_mask, other=0.0)
            a = tl.load(a_ptr + i[:, None].to(tl.int64) * K + columns[None, :], mask=a_mask, other=0.0)
            update = tl.dot(b.to(tl.float32), a.to(tl.float32), update, input_precision="ieee")
        weight = _decode_tile(stored, absmax, table, row, k0, K, COLUMNS, BLOCKSIZE, ALIGNED, SHUFFLE)
        value = _scaled_sum(weight, update, scaling)
        square = tl.sum(tl.reshape(value * value, (ROWS, COLUMNS // 4, 4)), 2) - lost
        sum_ = total + square
        lost = (sum_ - total) - square
        total = sum_
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
def _finish_kernel(
    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
    a_ptr, b_ptr, squares_ptr, most_ptr, norm_ptr, N, K, r, stride_n, stride_k, scaling: tl.float64,
    rounding: tl.float64, splits, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """norm [N]: from the sums of squares where that is accurate, otherwise from the row in fp64; RANK >= r."""
    base = (weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr)
    index = tl.arange(0, ROWS)
    rows = tl.program_id(0) * ROWS + index
    inside, row = rows < N, rows.to(tl.int64)
    sums = tl.zeros((ROWS,), tl.float64)
    for split in range(splits):
        sums += tl.load(squares_ptr + split.to(tl.int64) * N + rows, mask=inside, other=1.0)
    norm = tl.sqrt(sums)

    i = tl.arange(0, RANK)
    b = tl.load(b_ptr + row[:, None] * r + i[None, :], mask=inside[:, None] & (i < r)[None, :], other=0.0)
    most = tl.load(most_ptr + i, mask=i < r, other=0.0).to(tl.float64)
    reach = tl.abs(scaling) * tl.sum(tl.abs(b.to(tl.float64)) * most[None, :], 1)
    element = reach * rounding
    small = element * norm + 0.5 * element * element * K <= _MOST_ERROR * sums
    accurate = small & (sums > _LEAST_NORM * _LEAST_NORM) & (sums < _MOST_NORM * _MOST_NORM)
    tl.store(norm_ptr + rows, norm.to(tl.float32), mask=inside & accurate)

    again = (inside & ~accurate).to(tl.int32)
    if tl.sum(again) > 0:
        for one in range(ROWS):
            if tl.sum(tl.where(index == one, again, 0)) > 0:
                n = tl.program_id(0) * ROWS + one
                _store_norm_in_double(
                    base, a_ptr, b_ptr, norm_ptr, n, K, r, stride_n, stride_k, scaling,
                    COLUMNS, BLOCKSIZE, NESTED, SHUFFLE,
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
        stored, absmax = _load_tile(
            base, row, row >= 0, k0, K, stride_n, stride_k, COLUMNS, BLOCKSIZE, NESTED, False
        )
        weight = _decode_tile(stored, absmax, table, row, k0, K, COLUMNS, BLOCKSIZE, False, SHUFFLE)
        update = tl.zeros((1, COLUMNS), tl.float64)
        for i in range(r):
            a = tl.load(a_ptr + i.to(tl.int64) * K + columns, mask=columns < K, other=0.0)
            b = tl.load(b_ptr + n.to(tl.int64) * r + i)
            update += b.to(tl.float64) * a.to(tl.float64)
        value = weight.to(tl.float64) + scaling * update
        sums += value * value
    norm = tl.sqrt(tl.sum(sums, 1))
    tl.store(norm_ptr + row, norm.to(tl.float32))


def dora_norm(*args: Any) -> torch.Tensor:
    """Launch the kernels; see `reference.dora_norm`.

    Raises:
        ValueError: besides what the contract says, an adapter or a dense weight in float64.
    """
    a = NormArgs(*args)
    check_dora_norm(a)
    check_dtype("lora_a", a.lora_a, WEIGHT_DTYPES, "or leave use_backend('triton') for this call")
    base, dense = BaseWeight(*args[:7]), a.absmax is None
    stride_n, stride_k = a.weight.stride() if dense else (0, 0)
    base = base if dense else contiguous(base)
    lora_a, lora_b = a.lora_a.contiguous(), a.lora_b.contiguous()
    rank, in_features = lora_a.shape
    plan = norm_plan(a.out_features, in_features, gpu().multiprocessors)
    squares = lora_a.new_empty((plan.splits, a.out_features), dtype=torch.float64)
    most = lora_a.new_empty(rank, dtype=torch.float32)
    norm = lora_a.new_empty(a.out_features, dtype=torch.float32)
    rounding = min(rank + 2.0, 3 * math.sqrt(rank + 1)) * 2.0**-24  # of an element: README.md
    shape = (a.out_features, in_features, rank, stride_n, stride_k, a.scaling)
    options = {
        "BLOCKSIZE": a.blocksize, "NESTED": nested_blocksize(base), "SHUFFLE": has_shuffle(),
        "num_warps": _WARPS, "enable_fp_fusion": False,
    }  # fmt: skip
    _squares_kernel[(rank + triton.cdiv(a.out_features, _ROWS) * plan.splits,)](
        *base[:5], lora_a, lora_b, squares, most, *shape, plan.columns,
        ROWS=_ROWS, COLUMNS=_COLUMNS, RANK=_RANK, ALIGNED=in_features % _KNOWN == 0, **options,
    )  # fmt: skip
    _finish_kernel[(triton.cdiv(a.out_features, _FINISH_ROWS),)](
        *base[:5], lora_a, lora_b, squares, most, norm, *shape, rounding, plan.splits,
        ROWS=_FINISH_ROWS, COLUMNS=_FINISH_COLUMNS, RANK=triton.next_power_of_2(rank), **options,
    )  # fmt: skip
    return norm
