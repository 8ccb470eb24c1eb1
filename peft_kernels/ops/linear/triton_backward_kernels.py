"""Triton kernels of the adapted linear's backward: partial sums, added up in a fixed order; no atomics."""

import triton
import triton.language as tl

from peft_kernels.ops.dropout.triton import keep_tile
from peft_kernels.ops.linear.triton_forward_kernels import load_weight
from peft_kernels.ops.nf4.triton import code_table


@triton.jit
def store_input_gradient(
    t, rows, block, columns, first_column, dx_ptr, du_ptr, lora_a_ptr, input_scale_ptr, x_ptr, partial_ptr,
    seed_ptr, threshold, keep_scale, M, K, x_stride, rank,
    R: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The epilogue: dx = l_in t + D'(du A) for a tile of t = dz W, rounded once; sum_m x t into partials."""
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    if partial_ptr is not None:
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_stride + columns[None, :], mask=inside, other=0.0)
        part = tl.sum(tl.where(inside, x.to(tl.float32) * t, 0.0), 0)
        tl.store(partial_ptr + block.to(tl.int64) * K + columns, part, mask=columns < K)
    if dx_ptr is not None:
        if input_scale_ptr is not None:
            t *= tl.load(input_scale_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
        if lora_a_ptr is not None:
            low = tl.zeros(t.shape, tl.float32)
            for first in range(0, rank, R):
                r = first + tl.arange(0, R)
                du = tl.load(
                    du_ptr + rows[:, None].to(tl.int64) * rank + r[None, :],
                    mask=(rows < M)[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
                a = tl.load(
                    lora_a_ptr + r[:, None].to(tl.int64) * K + columns[None, :],
                    mask=(r < rank)[:, None] & (columns < K)[None, :],
                    other=0.0,
                )
                low = tl.dot(du, a.to(tl.float32), low, input_precision=PRECISION)
            if seed_ptr is not None:
                BK: tl.constexpr = columns.shape[0]
                keep = keep_tile(rows, first_column, K, tl.load(seed_ptr), threshold, BK, GROUPED)
                low = tl.where(keep, low * keep_scale, 0.0)
            t += low
        at = rows[:, None].to(tl.int64) * K + columns[None, :]
        tl.store(dx_ptr + at, t.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def input_gradient_kernel(
    grad_ptr, weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, column_scale_ptr,
    partial_ptr, dx_ptr, du_ptr, lora_a_ptr, input_scale_ptr, x_ptr, input_scale_partial_ptr,
    seed_ptr, threshold: tl.uint32, keep_scale, M, N, K, grad_stride, x_stride, rank, rows_per_split,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUPED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """A batch of tokens: t = (c g) W, W decoded tile by tile, c in its absmax. Splits are over W's rows."""
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    first_column = tl.program_id(0) * BK
    columns = first_column + tl.arange(0, BK)
    split = tl.program_id(2)
    table = code_table(SHUFFLE)
    t = tl.zeros((BM, BK), tl.float32)
    for first in range(split * rows_per_split, tl.minimum((split + 1) * rows_per_split, N), BN):
        n = first + tl.arange(0, BN)
        grad = tl.load(
            grad_ptr + rows[:, None].to(tl.int64) * grad_stride + n[None, :],
            mask=(rows < M)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        row_scale = None
        if column_scale_ptr is not None:
            row_scale = tl.load(column_scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        weight = load_weight(
            weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
            n, first_column, N, K, row_scale, None, table, BK, BLOCKSIZE, NESTED, SHUFFLE,
        )  # fmt: skip
        t = tl.dot(grad, weight.to(grad.dtype), t)
    if partial_ptr is not None:
        at = (split * M + rows[:, None]).to(tl.int64) * K + columns[None, :]
        tl.store(partial_ptr + at, t, mask=(rows < M)[:, None] & (columns < K)[None, :])
    else:
        store_input_gradient(
            t, rows, tl.program_id(1), columns, first_column, dx_ptr, du_ptr, lora_a_ptr, input_scale_ptr,
            x_ptr, input_scale_partial_ptr, seed_ptr, threshold, keep_scale, M, K, x_stride, rank,
            R, GROUPED, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def input_gradient_epilogue_kernel(
    partial_ptr, dx_ptr, du_ptr, lora_a_ptr, input_scale_ptr, x_ptr, input_scale_partial_ptr,
    seed_ptr, threshold: tl.uint32, keep_scale,
    M, K, x_stride, rank, splits, first_token, tokens, first_input, width,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the parts of t [splits, tokens, width] in order, then the epilogue.

    They are tokens first_token and on (a multiple of BM), inputs first_input and on.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    column = first + tl.arange(0, BK)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    t = tl.zeros((BM, BK), tl.float32)
    for split in range(splits):
        at = (split * tokens + row[:, None]).to(tl.int64) * width + column[None, :]
        t += tl.load(partial_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rows = first_token + row  # past `tokens` they are past M: only the last chunk is ragged
    columns = tl.where(column < width, first_input + column, K)  # past the end: masked
    store_input_gradient(
        t, rows, first_token // BM + tl.program_id(0), columns, first_input + first, dx_ptr, du_ptr,
        lora_a_ptr, input_scale_ptr, x_ptr, input_scale_partial_ptr, seed_ptr, threshold, keep_scale,
        M, K, x_stride, rank, R, GROUPED, PRECISION,
    )  # fmt: skip


@triton.jit
def output_gradients_kernel(
    grad_ptr, z_ptr, u_ptr, lora_b_ptr, column_scale_ptr,
    du_ptr, dlora_b_ptr, dcolumn_scale_ptr, dbias_ptr,
    first_token, M, N, grad_stride, rank, columns_per_split, scaling,
    BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All that is summed from g, in one pass over it.

    With dz = c g: du [splits, M, rank] = scaling dz B, over each split's columns; and over each block of BM
    tokens from first_token on dlora_b [blocks, N, rank] = scaling dz^T u, dcolumn_scale [blocks, N] = sum g z
    and dbias [blocks, N] = sum g. Ranks beyond R are other programs' (the third index), sums without a rank
    the first's.
    """
    token_block, split = tl.program_id(0), tl.program_id(1)
    rows = first_token + token_block * BM + tl.arange(0, BM)
    r = tl.program_id(2) * R + tl.arange(0, R)
    at_u = rows[:, None].to(tl.int64) * rank + r[None, :]
    u_inside = (rows < M)[:, None] & (r < rank)[None, :]
    if dlora_b_ptr is not None:
        u = tl.load(u_ptr + at_u, mask=u_inside, other=0.0)
    if du_ptr is not None:
        du = tl.zeros((BM, R), tl.float32)
    for first in range(split * columns_per_split, tl.minimum((split + 1) * columns_per_split, N), BN):
        columns = first + tl.arange(0, BN)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        grad = tl.load(
            grad_ptr + rows[:, None].to(tl.int64) * grad_stride + columns[None, :], mask=inside, other=0.0
        )
        block_at = token_block.to(tl.int64) * N + columns
        if column_scale_ptr is not None:
            column_scale = tl.load(column_scale_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        if du_ptr is not None:
            b = tl.load(
                lora_b_ptr + columns[:, None].to(tl.int64) * rank + r[None, :],
                mask=(columns < N)[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            if column_scale_ptr is not None:
                b = b.to(tl.float32) * column_scale[:, None]
            if b.dtype == grad.dtype:
                du = tl.dot(grad, b, du, input_precision=PRECISION)
            else:
                du = tl.dot(grad.to(tl.float32), b.to(tl.float32), du, input_precision=PRECISION)
        if dlora_b_ptr is not None:
            db = scaling * tl.dot(tl.trans(grad.to(tl.float32)), u, input_precision=PRECISION)
            if column_scale_ptr is not None:
                db *= column_scale[:, None]
            at = (token_block.to(tl.int64) * N + columns[:, None]) * rank + r[None, :]
            tl.store(dlora_b_ptr + at, db, mask=(columns < N)[:, None] & (r < rank)[None, :])
        if tl.program_id(2) == 0:
            if dcolumn_scale_ptr is not None:
                z = tl.load(z_ptr + rows[:, None].to(tl.int64) * N + columns[None, :], mask=inside, other=0.0)
                part = tl.sum(grad.to(tl.float32) * z.to(tl.float32), 0)
                tl.store(dcolumn_scale_ptr + block_at, part, mask=columns < N)
            if dbias_ptr is not None:
                tl.store(dbias_ptr + block_at, tl.sum(grad.to(tl.float32), 0), mask=columns < N)
    if du_ptr is not None:
        tl.store(du_ptr + split.to(tl.int64) * M * rank + at_u, du * scaling, mask=u_inside)


@triton.jit(do_not_specialize=["threshold"])
def lora_a_gradient_kernel(
    x_ptr, du_ptr, out_ptr, seed_ptr, threshold: tl.uint32, keep_scale, M, K, x_stride, rank, rows_per_split,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dlora_a = du^T D(x), summed over each split's tokens: out [splits, rank, K]."""
    first_column = tl.program_id(0) * BK
    columns = first_column + tl.arange(0, BK)
    split = tl.program_id(1)
    r = tl.program_id(2) * R + tl.arange(0, R)
    da = tl.zeros((R, BK), tl.float32)
    for first in range(split * rows_per_split, tl.minimum((split + 1) * rows_per_split, M), BM):
        rows = first + tl.arange(0, BM)
        x = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * x_stride + columns[None, :],
            mask=(rows < M)[:, None] & (columns < K)[None, :],
            other=0.0,
        ).to(tl.float32)
        if seed_ptr is not None:
            keep = keep_tile(rows, first_column, K, tl.load(seed_ptr), threshold, BK, GROUPED, OPERAND=True)
            x = tl.where(keep, x, 0.0)
        du = tl.load(
            du_ptr + rows[None, :].to(tl.int64) * rank + r[:, None],
            mask=(rows < M)[None, :] & (r < rank)[:, None],
            other=0.0,
        )
        da = tl.dot(du, x, da, input_precision=PRECISION)
    at = (split * rank + r[:, None]).to(tl.int64) * K + columns[None, :]
    tl.store(out_ptr + at, da * keep_scale, mask=(r < rank)[:, None] & (columns < K)[None, :])
