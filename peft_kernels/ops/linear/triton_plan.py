"""Which Triton kernels compute an adapted linear, in what tiles: pure functions of the problem and the GPU.

The tables are predictions: made from compiled code (registers, shared memory, instructions: docs/gpu.md) and
the arithmetic there, not from timings.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from peft_kernels.core.gpu import GPU

SCRATCH_BYTES = 32 << 20  # of one call, beyond its results
PANEL_BYTES = 16 << 20  # of dequantised weight: stays in the L2 of every GPU from the A100 on
# Tokens up to which the decode kernel runs, without tensor cores. In 16 bits it takes 5.2 instructions a
# weight for one token, 9.5 for two; the matmul kernel 7.3 for up to 16. In fp32 the alternative is panels.
DECODE_TOKENS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 4}
LARGEST_RANK_TILE = 32  # with 64, epilogues spill


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched.

    Attributes:
        block_m: tokens of a CTA.
        block_n: outputs of a CTA, or the step over them where they are summed over.
        block_k: inputs of a CTA, or the step over them.
        warps: of a CTA.
        stages: of Triton's software pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class Plan:
    """How a product with an NF4 weight is computed.

    Attributes:
        method: "decode", "matmul" (both read 4-bit codes), or "panels" (dequantised, then a vendor GEMM).
        tile: of the kernel; None for panels.
        splits: of the sum, each into partial results which the epilogue adds up in order.
    """

    method: str
    tile: Tile | None = None
    splits: int = 1


class Product(NamedTuple):
    """A product of x [M, K] with an NF4 weight [N, K], or of dz [M, N] with it."""

    tokens: int
    out_features: int
    in_features: int
    blocksize: int
    dtype: torch.dtype


class _Row(NamedTuple):
    most_tokens: int
    tile: Tile


_DECODE = {1: Tile(1, 8, 1024), 2: Tile(2, 8, 512), 4: Tile(4, 4, 512)}  # by most tokens
_FORWARD = (
    _Row(16, Tile(16, 64, 128, stages=3)),
    _Row(32, Tile(32, 128, 64, stages=3)),
    _Row(128, Tile(64, 64, 64, stages=3)),
)
_BACKWARD = (
    _Row(16, Tile(16, 64, 128, stages=3)),
    _Row(32, Tile(32, 64, 128, stages=3)),
    _Row(128, Tile(64, 64, 64, stages=3)),
)
_HIP = (_Row(16, Tile(16, 64, 64, stages=2)), _Row(128, Tile(32, 64, 64, stages=2)))
_WGMMA_FORWARD = Tile(64, 128, 64, stages=3)  # in place of the last: operands come from shared memory
# Most tokens for which decoding in the product's loop is predicted to beat panels: fewer where tensor cores
# are fast beside the decoder.
_MATMUL_TOKENS: dict[int | str, int] = {80: 128, 86: 128, 89: 128, 90: 64, 100: 32, 103: 32, 120: 128}
_MATMUL_TOKENS_DEFAULT = 64


def forward_plan(product: Product, gpu: GPU) -> Plan:
    """How z = x W^T is computed."""
    m, n, k = product.tokens, product.out_features, product.in_features
    if k % product.blocksize:
        return Plan("panels")
    if m <= DECODE_TOKENS[product.dtype]:
        return Plan("decode", next(tile for tokens, tile in _DECODE.items() if m <= tokens))
    return _matmul(_FORWARD, product, gpu, outputs=n, summed=k)


def backward_plan(product: Product, gpu: GPU) -> Plan:
    """How t = dz W is computed."""
    if product.in_features % product.blocksize:
        return Plan("panels")
    return _matmul(_BACKWARD, product, gpu, outputs=product.in_features, summed=product.out_features)


def splits(ctas: int, summed: int, step: int, gpu: GPU, per_multiprocessor: int = 2) -> int:
    """Into how many parts to split a sum, so that multiprocessors have CTAs; at least four steps each."""
    return max(1, min(per_multiprocessor * gpu.multiprocessors // ctas, summed // (4 * step)))


def part(summed: int, splits: int, step: int) -> int:
    """Length of a split, in whole steps."""
    return -(-summed // (splits * step)) * step


def grad_tile(gpu: GPU) -> Tile:
    """Tile of the sums over the gradient."""
    return Tile(gpu.tile_rows, gpu.tile_rows, 64)


def rank_tile(rank: int) -> int:
    """Ranks that a kernel takes at a time: tensor cores need 16."""
    return max(16, min(LARGEST_RANK_TILE, 1 << (rank - 1).bit_length()))


def panel_size(lines: int, line_bytes: int, step: int) -> int:
    """Rows or columns of a weight in a panel, in whole steps; all `lines` where they fit."""
    return min(lines, max(1, PANEL_BYTES // (line_bytes * step)) * step)


def _matmul(rows: tuple[_Row, ...], product: Product, gpu: GPU, outputs: int, summed: int) -> Plan:
    m = max(1, product.tokens)
    if product.dtype == torch.float32 or m > _MATMUL_TOKENS.get(gpu.arch, _MATMUL_TOKENS_DEFAULT):
        return Plan("panels")
    table = _HIP if gpu.backend == "hip" else rows
    tile = next(row.tile for row in table if m <= row.most_tokens)
    if rows is _FORWARD and tile.block_m == 64 and gpu.arch == 90:
        tile = _WGMMA_FORWARD
    # Forward tiles lie along N and step over K, backward tiles the other way round.
    width, step = (tile.block_n, tile.block_k) if rows is _FORWARD else (tile.block_k, tile.block_n)
    ctas = -(-m // tile.block_m) * -(-outputs // width)
    most = max(1, SCRATCH_BYTES // (4 * m * outputs))
    count = min(most, splits(ctas, summed, step, gpu, per_multiprocessor=2 if m <= 16 else 1))
    return Plan("matmul", tile, -(-summed // part(summed, count, step)))
