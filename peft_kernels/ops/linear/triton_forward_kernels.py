"""Triton kernels of the adapted linear's forward: tiles of outputs [BM tokens, BN outputs]."""

import triton
import triton.language as tl

from peft_kernels.ops.dropout.triton import keep_tile
from peft_kernels.ops.nf4.triton import code_table, decode, load_absmax


@triton.jit
def load_weight(
    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
    rows, first_column, N, K, row_scale, column_scale_ptr, table,
    BK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """An NF4 tile [BN rows, BK columns from first_column], decoded to fp32; K is whole blocks, masked beyond.

    row_scale [BN] (or None) goes into absmax, before the code is multiplied: no work per weight.
    """
    BN: tl.constexpr = rows.shape[0]
    PARTS: tl.constexpr = BK // BLOCKSIZE if BK > BLOCKSIZE else 1  # blocks in a row of the tile
    # Four bytes a lane, eight weights: 16 bytes once they are bf16. Wider loads would spread a lane's stores
    # to shared memory so far that banks conflict.
    byte = tl.max_contiguous(tl.multiple_of(first_column // 2 + tl.arange(0, BK // 2), 4), 4)
    packed = tl.load(
        weight_ptr + rows[:, None].to(tl.int64) * (K // 2) + byte[None, :],
        mask=(rows < N)[:, None] & (byte < K // 2)[None, :],
        other=0,
    )
    high, low = decode(packed, table, SHUFFLE)
    block = first_column // BLOCKSIZE + tl.arange(0, PARTS)
    absmax = load_absmax(
        absmax_ptr,
        rows[:, None].to(tl.int64) * (K // BLOCKSIZE) + block[None, :],
        (rows < N)[:, None] & (block < K // BLOCKSIZE)[None, :],
        nested_absmax_ptr,
        nested_code_ptr,
        nested_offset_ptr,
        NESTED,
    )  # [BN, PARTS]
    if row_scale is not None:
        absmax *= row_scale[:, None]
    code = tl.reshape(tl.join(high, low), (BN, PARTS, BK // PARTS))
    weight = tl.reshape(code * absmax[:, :, None], (BN, BK))
    if column_scale_ptr is not None:
        column = first_column + tl.arange(0, BK)
        weight *= tl.load(column_scale_ptr + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
    return weight


@triton.jit
def low_rank(left_ptr, right_ptr, rows, columns, M, N, rank, R: tl.constexpr, PRECISION: tl.constexpr):
    """sum_r left[m, r] right[n, r] in fp32 [BM, BN], R ranks at a time; left [M, rank], right [N, rank]."""
    product = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, rank, R):
        r = first + tl.arange(0, R)
        left = tl.load(
            left_ptr + rows[:, None].to(tl.int64) * rank + r[None, :],
            mask=(rows < M)[:, None] & (r < rank)[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + columns[None, :].to(tl.int64) * rank + r[:, None],
            mask=(columns < N)[None, :] & (r < rank)[:, None],
            other=0.0,
        )
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), product, input_precision=PRECISION)
    return product


@triton.jit
def store_output(
    z, rows, columns, y_ptr, z_ptr, u_ptr, lora_b_ptr, column_scale_ptr, bias_ptr, scaling, M, N, rank,
    R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The epilogue: y = c (z + scaling u B^T) + bias for a tile of fp32 base products z, rounded once."""
    if lora_b_ptr is not None:
        z += scaling * low_rank(u_ptr, lora_b_ptr, rows, columns, M, N, rank, R, PRECISION)
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)
    if column_scale_ptr is not None:
        z *= tl.load(column_scale_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def project_kernel(
    x_ptr, a_ptr, out_ptr, seed_ptr, threshold: tl.uint32, scale, M, K, x_stride, rank, columns_per_split,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of u = D(x) A^T over a range of columns: out [splits, M, rank] fp32."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    r = tl.program_id(2) * R + tl.arange(0, R)
    u = tl.zeros((BM, R), tl.float32)
    for first in range(split * columns_per_split, tl.minimum((split + 1) * columns_per_split, K), BK):
        columns = first + tl.arange(0, BK)
        x = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * x_stride + columns[None, :],
            mask=(rows < M)[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        if seed_ptr is not None:
            keep = keep_tile(rows, first, K, tl.load(seed_ptr), threshold, BK, GROUPED, OPERAND=True)
            x = tl.where(keep, x, 0.0)
        a = tl.load(
            a_ptr + r[None, :].to(tl.int64) * K + columns[:, None],
            mask=(r < rank)[None, :] & (columns < K)[:, None],
            other=0.0,
        )
        if x.dtype != a.dtype:
            x, a = x.to(tl.float32), a.to(tl.float32)
        u = tl.dot(x, a, u, input_precision=PRECISION)
    at = (split * M + rows[:, None]).to(tl.int64) * rank + r[None, :]
    tl.store(out_ptr + at, u * scale, mask=(rows < M)[:, None] & (r < rank)[None, :])


@triton.jit
def decode_kernel(
    x_ptr, weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, input_scale_ptr,
    y_ptr, z_ptr, u_ptr, lora_b_ptr, column_scale_ptr, bias_ptr, scaling, M, N, K, x_stride, rank,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """Few tokens: y for BM >= M tokens and BN outputs, without tensor cores; x stays fp32-exact."""
    rows = tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    PARTS: tl.constexpr = BK // BLOCKSIZE if BK > BLOCKSIZE else 1
    table = code_table(SHUFFLE)
    sums = tl.zeros((BM, BN, BK // 2), tl.float32)
    for first in range(0, K, BK):
        byte = first // 2 + tl.arange(0, BK // 2)
        packed = tl.load(
            weight_ptr + columns[:, None].to(tl.int64) * (K // 2) + byte[None, :],
            mask=(columns < N)[:, None] & (byte < K // 2)[None, :],
            other=0,
        )
        block = first // BLOCKSIZE + tl.arange(0, PARTS)
        absmax = load_absmax(
            absmax_ptr,
            columns[:, None].to(tl.int64) * (K // BLOCKSIZE) + block[None, :],
            (columns < N)[:, None] & (block < K // BLOCKSIZE)[None, :],
            nested_absmax_ptr,
            nested_code_ptr,
            nested_offset_ptr,
            NESTED,
        )  # [BN, PARTS]
        k = first + tl.arange(0, BK)
        x = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * x_stride + k[None, :],
            mask=(rows < M)[:, None] & (k < K)[None, :],
            other=0.0,
        ).to(tl.float32)
        if input_scale_ptr is not None:
            x *= tl.load(input_scale_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        even, odd = tl.split(tl.reshape(x, (BM, BK // 2, 2)))
        high, low = decode(packed, table, SHUFFLE)
        product = tl.fma(high[None, :, :], even[:, None, :], low[None, :, :] * odd[:, None, :])
        scale = tl.broadcast_to(absmax[:, :, None], (BN, PARTS, BK // 2 // PARTS))
        sums = tl.fma(product, tl.reshape(scale, (1, BN, BK // 2)), sums)
    z = tl.sum(sums, 2)  # [BM, BN]
    if lora_b_ptr is not None:
        r = tl.arange(0, R)
        for first_rank in range(0, rank, R):
            ranks = first_rank + r
            u = tl.load(
                u_ptr + rows[:, None] * rank + ranks[None, :],
                mask=(rows < M)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            b = tl.load(
                lora_b_ptr + columns[:, None].to(tl.int64) * rank + ranks[None, :],
                mask=(columns < N)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            ).to(tl.float32)
            z += scaling * tl.sum(u[:, None, :] * b[None, :, :], 2)
    store_output(
        z, rows, columns, y_ptr, z_ptr, None, None, column_scale_ptr, bias_ptr, 1.0, M, N, rank, R, "ieee"
    )


@triton.jit
def matmul_kernel(
    x_ptr, weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, input_scale_ptr,
    partial_ptr, y_ptr, z_ptr, u_ptr, lora_b_ptr, column_scale_ptr, bias_ptr,
    scaling, M, N, K, x_stride, rank, columns_per_split,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """A batch of tokens: decode W tile by tile into tensor-core products.

    Split over K, each split stores its part of z [splits, M, N] and `epilogue_kernel` finishes; otherwise the
    epilogue is here.
    """
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    table = code_table(SHUFFLE)
    z = tl.zeros((BM, BN), tl.float32)
    for first in range(split * columns_per_split, tl.minimum((split + 1) * columns_per_split, K), BK):
        k = first + tl.arange(0, BK)
        x = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * x_stride + k[None, :],
            mask=(rows < M)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        weight = load_weight(
            weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
            columns, first, N, K, None, input_scale_ptr, table, BK, BLOCKSIZE, NESTED, SHUFFLE,
        )  # fmt: skip
        z = tl.dot(x, tl.trans(weight.to(x.dtype)), z)
    if partial_ptr is not None:
        at = (split * M + rows[:, None]).to(tl.int64) * N + columns[None, :]
        tl.store(partial_ptr + at, z, mask=(rows < M)[:, None] & (columns < N)[None, :])
    else:
        store_output(
            z, rows, columns, y_ptr, z_ptr, u_ptr, lora_b_ptr, column_scale_ptr, bias_ptr, scaling,
            M, N, rank, R, PRECISION,
        )  # fmt: skip


@triton.jit
def epilogue_kernel(
    partial_ptr, y_ptr, z_ptr, u_ptr, lora_b_ptr, column_scale_ptr, bias_ptr, scaling,
    M, N, rank, splits, first_token, tokens, first_output, width,
    BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the parts of z [splits, tokens, width] in order, then the epilogue.

    They are tokens first_token and on, outputs first_output and on.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    z = tl.zeros((BM, BN), tl.float32)
    for split in range(splits):
        at = (split * tokens + row[:, None]).to(tl.int64) * width + column[None, :]
        z += tl.load(partial_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rows = tl.where(row < tokens, first_token + row, M)
    columns = tl.where(column < width, first_output + column, N)  # past the end: masked
    store_output(
        z, rows, columns, y_ptr, z_ptr, u_ptr, lora_b_ptr, column_scale_ptr, bias_ptr, scaling,
        M, N, rank, R, PRECISION,
    )  # fmt: skip


@triton.jit
def panel_kernel(
    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, row_scale_ptr,
    column_scale_ptr, out_ptr, N, K, first_row, first_column, height, width,
    BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """Dequantise rows and columns from first_row, first_column on into out [height, width], times the scales.

    WHOLE: rows are whole blocks. Otherwise (a block may run on into the next row, and a byte too) each
    element finds its own nibble and absmax.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * BK + tl.arange(0, BK)
    rows = tl.where(row < height, first_row + row, N)
    inside = (row < height)[:, None] & (column < width)[None, :]
    table = code_table(SHUFFLE)
    row_scale = None
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + rows, mask=row < height, other=0.0).to(tl.float32)
    if WHOLE:
        weight = load_weight(
            weight_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
            rows, first_column + tl.program_id(1) * BK, N, K, row_scale, column_scale_ptr, table,
            BK, BLOCKSIZE, NESTED, SHUFFLE,
        )  # fmt: skip
    else:
        element = rows[:, None].to(tl.int64) * K + (first_column + column)[None, :]
        packed = tl.load(weight_ptr + element // 2, mask=inside, other=0)
        high, low = decode(packed, table, SHUFFLE)
        weight = tl.where(element % 2 == 0, high, low)
        absmax = load_absmax(
            absmax_ptr, element // BLOCKSIZE, inside,
            nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, NESTED,
        )  # fmt: skip
        if row_scale is not None:
            absmax *= row_scale[:, None]
        weight *= absmax
        if column_scale_ptr is not None:
            columns = first_column + column
            scale = tl.load(column_scale_ptr + columns, mask=columns < K, other=0.0)
            weight *= scale.to(tl.float32)[None, :]
    at = row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(out_ptr + at, weight.to(out_ptr.dtype.element_ty), mask=inside)
