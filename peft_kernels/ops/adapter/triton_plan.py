"""How the Triton kernels cut a bottleneck adapter up: a pure function of the problem and the GPU.

The figures are predictions, made from compiled code (registers, shared memory: docs/gpu.md) and arithmetic.
"""

from dataclasses import dataclass

import torch

from peft_kernels.core.gpu import GPU

ROW_BYTES = 128  # of a row of a product's operands that a tile has: a cache line
SCRATCH_BYTES = 32 << 20  # of the partial sums of one weight's gradient
CTAS = 2  # a multiprocessor, which splitting aims at
STEPS = 4  # of a sum that a CTA has at least where several share it


@dataclass(frozen=True)
class Plan:
    """How a bottleneck adapter is computed.

    Attributes:
        fused: the forward is one kernel; otherwise down goes through memory.
        block_m: tokens of a tile.
        block_n: columns of a tile of out or dhidden.
        fused_block_n: the same in the fused kernel.
        block_c: columns, of hidden or out, of a tile of a weight's gradient.
        block_k: elements that a step of a sum has.
        block_r: units of a tile; the fused kernel has all of them in one.
        finish: tokens and units of a tile where sums that end in [M, r] become down and dz.
        splits: CTAs that share such a sum, over d or N.
        token_splits: CTAs that share the sums over tokens of dW_d and of dW_u.
        warps: of a CTA.
        stages: of Triton's software pipeline.
        precision: of products of fp32, as tl.dot has it.
    """

    fused: bool
    block_m: int
    block_n: int
    fused_block_n: int
    block_c: int
    block_k: int
    block_r: int
    finish: tuple[int, int]
    splits: int
    token_splits: tuple[int, int]
    warps: int
    stages: int
    precision: str


def make_plan(m: int, d: int, r: int, n: int, dtype: torch.dtype, itemsize: int, gpu: GPU) -> Plan:
    """The plan for hidden [m, d] of `dtype` and weights [r, d] and [n, r].

    Args:
        m: tokens.
        d: columns of hidden.
        r: units.
        n: columns of out.
        dtype: of hidden.
        itemsize: bytes of an element of the widest of hidden and the weights.
        gpu: to run on.
    """
    single = dtype == torch.float32
    # tf32x3 has two tf32 numbers for each of fp32: half the tile, for the registers.
    rows = 32 if single else gpu.tile_rows
    block_m = min(rows, padded(m))
    block_k = ROW_BYTES // itemsize
    block_r = min(64, padded(r))
    wanted = CTAS * gpu.multiprocessors
    # One kernel saves a pass over hidden, but its CTAs have whole rows: there must be enough for the GPU.
    # Below that, hidden tends to stay in the L2 cache, and CTAs can share rows.
    fused = padded(r) * dtype.itemsize <= 256 and tiles(m, rows) >= gpu.multiprocessors
    even = wanted // max(1, tiles(m, block_m) * tiles(r, block_r))
    splits = max(1, min(even, max(d, n) // (STEPS * block_k)))

    def token_splits(columns: int) -> int:
        even = wanted // (tiles(columns, gpu.tile_rows) * tiles(r, block_r))
        return max(1, min(even, tiles(m, STEPS * block_k), SCRATCH_BYTES // (4 * columns * r)))

    return Plan(
        fused=fused,
        block_m=block_m,
        block_n=64,
        fused_block_n=32 if single else 64,
        block_c=gpu.tile_rows,
        block_k=block_k,
        block_r=block_r,
        finish=(16, 16) if splits > 1 else (block_m, block_r),
        splits=splits,
        token_splits=(token_splits(d), token_splits(n)),
        warps=8 if block_m >= 32 and not single and gpu.backend == "cuda" else 4,
        stages=3 if itemsize == dtype.itemsize else 2,
        precision=gpu.fp32_precision if single else "ieee",
    )


def tiles(size: int, tile: int) -> int:
    """How many tiles cover `size`."""
    return -(-size // tile)


def padded(size: int) -> int:
    """The smallest power of two, from the 16 that tensor cores need, that holds `size`."""
    return max(16, 1 << (size - 1).bit_length())


def share(size: int, splits: int, block: int) -> int:
    """What one of `splits` CTAs has of a sum over `size`: whole blocks."""
    return tiles(tiles(size, block), splits) * block
