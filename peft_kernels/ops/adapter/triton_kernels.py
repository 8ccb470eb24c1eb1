"""Triton kernels of the bottleneck adapter: the steps that its two ops are made of; README.md says which.

Names: h hidden [M, d], W_d [r, d], W_u [N, r]; z = h W_dᵀ + b_d, down = f(z); e = D'(dL/dout) [M, N]. Rows
of a matrix are contiguous, and their stride is an argument. Weights have two strides where the same code
multiplies by one and by the transpose of the other. An argument may be None: what needs it is compiled away.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from peft_kernels.ops.adapter.schema import ACTIVATIONS, LEAKY_SLOPE
from peft_kernels.ops.dropout.triton import keep_tile

_IDENTITY, _RELU, _LEAKY_RELU, _GELU, _GELU_TANH, _SILU, _TANH = map(tl.constexpr, range(len(ACTIVATIONS)))
_LEAKY_SLOPE = tl.constexpr(LEAKY_SLOPE)
_GELU_SCALE, _GELU_CUBIC = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)  # 2 sqrt(2/pi), c


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """f(z), fp32; NaN stays NaN."""
    if ACTIVATION == _RELU:
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == _LEAKY_RELU:
        z = tl.where(z > 0.0, z, z * _LEAKY_SLOPE)
    elif ACTIVATION == _GELU:
        z = z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == _GELU_TANH:  # 0.5 z (1 + tanh u) is z sigmoid(2 u)
        z = z / (1.0 + tl.exp(-_GELU_SCALE * (z + _GELU_CUBIC * (z * z * z))))
    elif ACTIVATION == _SILU:
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == _TANH:
        z = libdevice.tanh(z)
    return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """f'(z), fp32; at a kink the slope to its left."""
    if ACTIVATION == _RELU:
        result = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == _LEAKY_RELU:
        result = tl.where(z > 0.0, 1.0, _LEAKY_SLOPE)
    elif ACTIVATION == _GELU:
        result = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif ACTIVATION == _GELU_TANH:
        x = tl.where(z > 12.0, 12.0, tl.where(z < -12.0, -12.0, z))  # the sigmoid is 0 or 1 beyond
        e = tl.exp(-_GELU_SCALE * (x + _GELU_CUBIC * (x * x * x)))
        sigmoid = 1.0 / (1.0 + e)
        du = _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBIC * (x * x))
        result = sigmoid + x * du * (e * sigmoid * sigmoid)
    elif ACTIVATION == _SILU:
        x = tl.where(z < -80.0, -80.0, z)  # where e is finite
        e = tl.exp(-x)
        sigmoid = 1.0 / (1.0 + e)
        result = sigmoid + x * (e * sigmoid * sigmoid)
    elif ACTIVATION == _TANH:
        t = libdevice.tanh(z)
        result = 1.0 - t * t
    else:
        result = tl.full(z.shape, 1.0, tl.float32)
    return result


@triton.jit
def load_tile(ptr, rows, stride, columns, M, N):
    """[rows, columns] of a matrix [M, N]; 0 outside it."""
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(ptr + offsets, mask=(rows < M)[:, None] & (columns < N)[None, :], other=0.0)


@triton.jit
def load_weight(ptr, inner, inner_stride, outer, outer_stride, K, N):
    """[inner, outer] of the transpose of a weight [N, K]; 0 outside it."""
    offsets = inner.to(tl.int64)[:, None] * inner_stride + outer.to(tl.int64)[None, :] * outer_stride
    return tl.load(ptr + offsets, mask=(inner < K)[:, None] & (outer < N)[None, :], other=0.0)


@triton.jit
def product(
    acc, x_ptr, x_stride, rows, M, weight_ptr, inner_stride, outer, outer_stride, N, first, last, K,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x[rows, first:last] @ weight[outer, first:last]ᵀ, its operands in the dtype of x [M, K]."""
    for k in range(first, last, BK):
        inner = k + tl.arange(0, BK)
        x = load_tile(x_ptr, rows, x_stride, inner, M, K)
        weight = load_weight(weight_ptr, inner, inner_stride, outer, outer_stride, K, N).to(x.dtype)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dropped(
    x, rows, first_column, columns, seed_ptr, threshold, keep_scale, GROUPED: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """D(x) of columns from first_column of x [M, columns], fp32; x itself where there is no seed."""
    if seed_ptr is not None:
        BLOCK: tl.constexpr = x.shape[1]
        keep = keep_tile(rows, first_column, columns, tl.load(seed_ptr), threshold, BLOCK, GROUPED, OPERAND)
        x = tl.where(keep, x * keep_scale, 0.0)
    return x


@triton.jit
def factor_of(scale_ptr, scale_stride, scaling, columns, N):
    """fp32 factor of each column: `scale`, of stride 0 where it is one number, or `scaling` without it."""
    if scale_ptr is None:
        factor = tl.zeros(columns.shape, tl.float32) + scaling
    else:
        factor = tl.load(scale_ptr + columns * scale_stride, mask=columns < N, other=0.0).to(tl.float32)
    return factor


@triton.jit
def store_tile(ptr, value, rows, stride, columns, M, N):
    """Write [rows, columns] of a matrix [M, N], rounded to its dtype."""
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_narrow(
    z, q, by_bias, rows, units, tile, chunk, down_bias_ptr, gate_ptr, grad_down_ptr, grad_down_stride,
    down_ptr, dz_ptr, dbias_ptr, dgate_ptr, M, r, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """down [M, r] from z without its bias; and, given q = (scale e) W_u [M, r], all that comes of it.

    dz [M, r]; of ddown_bias a partial sum for every tile of rows [T, r]; of dgate one for every chunk of
    units [chunks, M], the first with `by_bias`, (scale e) b_u [M].
    """
    inside = (units < r)[None, :]
    if down_bias_ptr is not None:
        z += tl.load(down_bias_ptr + units, mask=units < r, other=0.0).to(tl.float32)[None, :]
    down = activate(z, ACTIVATION)
    if down_ptr is not None:
        store_tile(down_ptr, down, rows, r, units, M, r)
    if q is not None:
        if dgate_ptr is not None:
            dgate = tl.sum(tl.where(inside, down * q, 0.0), 1)
            if chunk == 0:
                dgate += by_bias
            tl.store(dgate_ptr + chunk.to(tl.int64) * M + rows, dgate, mask=rows < M)
        ddown = q
        if gate_ptr is not None:
            ddown *= tl.load(gate_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        if grad_down_ptr is not None:
            ddown += load_tile(grad_down_ptr, rows, grad_down_stride, units, M, r).to(tl.float32)
        dz = ddown * slope(z, ACTIVATION)
        if dz_ptr is not None:
            store_tile(dz_ptr, dz, rows, r, units, M, r)
        if dbias_ptr is not None:
            dbias = tl.sum(tl.where((rows < M)[:, None], dz, 0.0), 0)
            tl.store(dbias_ptr + tile.to(tl.int64) * r + units, dbias, mask=units < r)


@triton.jit(do_not_specialize=["threshold"])
def narrow_kernel(
    hidden_ptr, hidden_stride, down_weight_ptr, down_weight_stride,
    grad_ptr, grad_stride, up_weight_ptr, up_weight_stride, up_bias_ptr,
    scale_ptr, scale_stride, scaling, seed_ptr, threshold: tl.uint32, keep_scale,
    down_bias_ptr, gate_ptr, grad_down_ptr, grad_down_stride, down_ptr, dz_ptr, dbias_ptr, dgate_ptr,
    sums_ptr, bias_sums_ptr, M, d, r, N, d_share, n_share, chunks,
    ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, GROUPED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products that end in [M, r], z and, with `grad`, q = (scale e) W_u, and all that comes of them.

    A CTA has a tile of rows and of units. With SPLIT it sums only its share of d and of N, for
    `finish_kernel` to add up: sums [S, 1 or 2, M, r].
    """
    tile, chunk, split = tl.program_id(0) // chunks, tl.program_id(0) % chunks, tl.program_id(1)
    rows, units = tile * BM + tl.arange(0, BM), chunk * BR + tl.arange(0, BR)
    q, by_bias = None, None  # first, since this loop needs the most registers
    if grad_ptr is not None:
        q, by_bias = tl.zeros((BM, BR), tl.float32), tl.zeros((BM,), tl.float32)
        for n in range(split * n_share, tl.minimum(N, (split + 1) * n_share), BK):
            columns = n + tl.arange(0, BK)
            e = load_tile(grad_ptr, rows, grad_stride, columns, M, N).to(tl.float32)
            e = dropped(e, rows, n, N, seed_ptr, threshold, keep_scale, GROUPED, True)
            e *= factor_of(scale_ptr, scale_stride, scaling, columns, N)[None, :]
            if dgate_ptr is not None and up_bias_ptr is not None:
                bias = tl.load(up_bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
                by_bias += tl.sum(e * bias[None, :], 1)
            weight = load_weight(up_weight_ptr, columns, up_weight_stride, units, 1, N, r)
            dtype: tl.constexpr = hidden_ptr.dtype.element_ty
            q = tl.dot(e.to(dtype), weight.to(dtype), q, input_precision=PRECISION)
        if SPLIT:
            here = sums_ptr + tl.cast(2 * split + 1, tl.int64) * M * r
            store_tile(here, q, rows, r, units, M, r)
            if dgate_ptr is not None and chunk == 0:
                tl.store(bias_sums_ptr + split.to(tl.int64) * M + rows, by_bias, mask=rows < M)
    z = product(
        tl.zeros((BM, BR), tl.float32), hidden_ptr, hidden_stride, rows, M,
        down_weight_ptr, 1, units, down_weight_stride, r,
        split * d_share, tl.minimum(d, (split + 1) * d_share), d, BK, PRECISION,
    )  # fmt: skip
    if SPLIT:
        PRODUCTS: tl.constexpr = 1 if grad_ptr is None else 2
        store_tile(sums_ptr + tl.cast(PRODUCTS * split, tl.int64) * M * r, z, rows, r, units, M, r)
    else:
        finish_narrow(
            z, q, by_bias, rows, units, tile, chunk, down_bias_ptr, gate_ptr, grad_down_ptr,
            grad_down_stride, down_ptr, dz_ptr, dbias_ptr, dgate_ptr, M, r, ACTIVATION,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    sums_ptr, bias_sums_ptr, splits, down_bias_ptr, gate_ptr, grad_down_ptr, grad_down_stride,
    down_ptr, dz_ptr, dbias_ptr, dgate_ptr, M, r, chunks,
    ACTIVATION: tl.constexpr, PRODUCTS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What `narrow_kernel` has left to do after SPLIT: add its sums in order, and finish."""
    tile, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    rows, units = tile * BM + tl.arange(0, BM), chunk * BR + tl.arange(0, BR)
    z = tl.zeros((BM, BR), tl.float32)
    q, by_bias = None, None
    if PRODUCTS == 2:
        q, by_bias = tl.zeros((BM, BR), tl.float32), tl.zeros((BM,), tl.float32)
    for split in range(splits):
        here = sums_ptr + tl.cast(split, tl.int64) * PRODUCTS * M * r
        z += load_tile(here, rows, r, units, M, r)
        if PRODUCTS == 2:
            q += load_tile(here + tl.cast(M, tl.int64) * r, rows, r, units, M, r)
            if dgate_ptr is not None:
                by_bias += tl.load(
                    bias_sums_ptr + tl.cast(split, tl.int64) * M + rows, mask=rows < M, other=0.0
                )
    finish_narrow(
        z, q, by_bias, rows, units, tile, chunk, down_bias_ptr, gate_ptr, grad_down_ptr,
        grad_down_stride, down_ptr, dz_ptr, dbias_ptr, dgate_ptr, M, r, ACTIVATION,
    )  # fmt: skip


@triton.jit
def write_up(
    up, rows, first_column, up_bias_ptr, scale_ptr, scale_stride, scaling, gate_ptr,
    seed_ptr, threshold, keep_scale, residual_ptr, residual_stride, out_ptr, up_ptr, M, N,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """gate D(scale up + scale b_u) + residual, rounded once, for a tile of the up product."""
    columns = first_column + tl.arange(0, up.shape[1])
    factor = factor_of(scale_ptr, scale_stride, scaling, columns, N)[None, :]
    up *= factor
    if up_bias_ptr is not None:
        # After the scale, else Triton makes it the product's first accumulator, copied behind wgmma's fence.
        up += tl.load(up_bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :] * factor
    if up_ptr is not None:
        store_tile(up_ptr, up, rows, N, columns, M, N)
    out = dropped(up, rows, first_column, N, seed_ptr, threshold, keep_scale, GROUPED, False)
    if gate_ptr is not None:
        out *= tl.load(gate_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        out += load_tile(residual_ptr, rows, residual_stride, columns, M, N).to(tl.float32)
    store_tile(out_ptr, out, rows, N, columns, M, N)


@triton.jit(do_not_specialize=["threshold"])
def up_kernel(
    down_ptr, up_weight_ptr, inner_stride, outer_stride, up_bias_ptr, scale_ptr, scale_stride, scaling,
    gate_ptr, seed_ptr, threshold: tl.uint32, keep_scale, residual_ptr, residual_stride, out_ptr, up_ptr,
    M, r, N, GROUPED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out from down [M, r], a CTA a tile of it. Also dhidden, from dz, W_dᵀ and no more than a residual."""
    tiles = tl.cdiv(N, BN)
    tile, first_column = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BN
    rows, columns = tile * BM + tl.arange(0, BM), first_column + tl.arange(0, BN)
    up = product(
        tl.zeros((BM, BN), tl.float32), down_ptr, r, rows, M, up_weight_ptr, inner_stride, columns,
        outer_stride, N, 0, r, r, BK, PRECISION,
    )  # fmt: skip
    write_up(
        up, rows, first_column, up_bias_ptr, scale_ptr, scale_stride, scaling, gate_ptr, seed_ptr, threshold,
        keep_scale, residual_ptr, residual_stride, out_ptr, up_ptr, M, N, GROUPED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def fused_kernel(
    hidden_ptr, hidden_stride, down_weight_ptr, down_weight_stride, down_bias_ptr,
    up_weight_ptr, up_weight_stride, up_bias_ptr, scale_ptr, scale_stride, scaling,
    gate_ptr, seed_ptr, threshold: tl.uint32, keep_scale, residual_ptr, residual_stride,
    out_ptr, down_ptr, up_ptr, M, d, r, N,
    ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole forward of a tile of rows: down stays in registers, all BR >= r units of it."""
    rows, units = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BR)
    z = product(
        tl.zeros((BM, BR), tl.float32), hidden_ptr, hidden_stride, rows, M,
        down_weight_ptr, 1, units, down_weight_stride, r, 0, d, d, BK, PRECISION,
    )  # fmt: skip
    if down_bias_ptr is not None:
        z += tl.load(down_bias_ptr + units, mask=units < r, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    # Units beyond r are zeros, not f(0 inf) = NaN.
    down = tl.where((units < r)[None, :], activate(z, ACTIVATION), 0.0).to(dtype)
    if down_ptr is not None:
        store_tile(down_ptr, down, rows, r, units, M, r)
    # From the last columns to the first: where hidden is the residual, its last are still in the L2 cache.
    tiles = tl.cdiv(N, BN)
    for i in range(tiles):
        first_column = (tiles - 1 - i) * BN
        columns = first_column + tl.arange(0, BN)
        weight = load_weight(up_weight_ptr, units, 1, columns, up_weight_stride, r, N).to(dtype)
        up = tl.dot(down, weight, input_precision=PRECISION)
        write_up(
            up, rows, first_column, up_bias_ptr, scale_ptr, scale_stride, scaling, gate_ptr, seed_ptr,
            threshold, keep_scale, residual_ptr, residual_stride, out_ptr, up_ptr, M, N, GROUPED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def token_product_kernel(
    x_ptr, x_stride, gate_ptr, seed_ptr, threshold: tl.uint32, keep_scale, p_ptr, sums_ptr, column_stride,
    unit_stride, column_sums_ptr, M, C, r, share, chunks,
    GROUPED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(gate D'(x))ᵀ p of x [M, C] and p [M, r], summed over shares of the tokens: sums [S, C, r], 2 strides.

    And, into column_sums [S, C], the sums of the columns of gate D'(x).
    """
    tile, chunk, split = tl.program_id(0) // chunks, tl.program_id(0) % chunks, tl.program_id(1)
    columns, units = tile * BC + tl.arange(0, BC), chunk * BR + tl.arange(0, BR)
    total, column_sums = tl.zeros((BC, BR), tl.float32), tl.zeros((BC,), tl.float32)
    # A 16-bit x that goes into the product as it is must not be read into registers too: Triton 3.9 refills
    # its buffer while wgmma still reads it (the emulator found that). Tensor cores sum its columns, 16 times.
    DIRECT: tl.constexpr = (
        gate_ptr is None
        and seed_ptr is None
        and p_ptr is not None
        and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    )
    direct_sums = tl.zeros((BC, 16), tl.float32)
    for t in range(split * share, tl.minimum(M, (split + 1) * share), BT):
        rows = t + tl.arange(0, BT)
        x = load_tile(x_ptr, rows, x_stride, columns, M, C)
        if gate_ptr is not None or seed_ptr is not None:
            x = dropped(x.to(tl.float32), rows, tile * BC, C, seed_ptr, threshold, keep_scale, GROUPED, True)
        if gate_ptr is not None:
            x *= tl.load(gate_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        if column_sums_ptr is not None and not DIRECT:
            column_sums += tl.sum(x.to(tl.float32), 0)
        if p_ptr is not None:
            p = load_tile(p_ptr, rows, r, units, M, r)
            total = tl.dot(tl.trans(x.to(p.dtype)), p, total, input_precision=PRECISION)
            if column_sums_ptr is not None and DIRECT:
                direct_sums = tl.dot(tl.trans(x), tl.full((BT, 16), 1.0, x.dtype), direct_sums)
    if DIRECT:
        column_sums = tl.sum(direct_sums, 1) * 0.0625
    if p_ptr is not None:
        offsets = columns.to(tl.int64)[:, None] * column_stride + units.to(tl.int64)[None, :] * unit_stride
        mask = (columns < C)[:, None] & (units < r)[None, :]
        tl.store(sums_ptr + split.to(tl.int64) * C * r + offsets, total, mask=mask)
    if column_sums_ptr is not None and chunk == 0:
        tl.store(column_sums_ptr + split.to(tl.int64) * C + columns, column_sums, mask=columns < C)


@triton.jit
def up_gradient_kernel(
    sums_ptr, column_sums_ptr, splits, up_weight_ptr, up_weight_stride, up_bias_ptr, scale_ptr, scale_stride,
    scaling, dup_weight_ptr, dup_bias_ptr, dscale_ptr, r, N, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Gradients of up_weight, up_bias and, fp32 for each column, of scale, from G [S, N, r] and γ [S, N]."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = columns < N
    factor = factor_of(scale_ptr, scale_stride, scaling, columns, N)
    dscale = tl.zeros((BN,), tl.float32)
    if sums_ptr is not None:
        for first in range(0, r, BR):
            units = first + tl.arange(0, BR)
            total = tl.zeros((BN, BR), tl.float32)
            for split in range(splits):
                here = sums_ptr + tl.cast(split, tl.int64) * N * r
                total += load_tile(here, columns, r, units, N, r)
            if dup_weight_ptr is not None:
                store_tile(dup_weight_ptr, total * factor[:, None], columns, r, units, N, r)
            if dscale_ptr is not None:
                weight = load_tile(up_weight_ptr, columns, up_weight_stride, units, N, r).to(tl.float32)
                dscale += tl.sum(total * weight, 1)
    if column_sums_ptr is not None:
        column_sum = tl.zeros((BN,), tl.float32)
        for split in range(splits):
            column_sum += tl.load(
                column_sums_ptr + tl.cast(split, tl.int64) * N + columns, mask=inside, other=0.0
            )
        if dup_bias_ptr is not None:
            value = (column_sum * factor).to(dup_bias_ptr.dtype.element_ty)
            tl.store(dup_bias_ptr + columns, value, mask=inside)
        if dscale_ptr is not None and up_bias_ptr is not None:
            dscale += column_sum * tl.load(up_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + columns, dscale, mask=inside)
