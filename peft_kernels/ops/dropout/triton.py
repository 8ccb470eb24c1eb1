"""Triton kernel of `philox_dropout`, and `keep_tile`, with which other families draw the same mask."""

import math

import torch
import triton
import triton.language as tl

from peft_kernels.core.gpu import check_kernel_dtype
from peft_kernels.ops.dropout.schema import check_philox_dropout

TILE = 2048  # elements of a CTA: 16 a thread
_WARPS = 4


@triton.jit
def keep_tile(
    rows, first_column, columns, seed, threshold, BLOCK: tl.constexpr, GROUPED: tl.constexpr,
    OPERAND: tl.constexpr = False,
):  # fmt: skip
    """Which elements of a row-major tensor dropout keeps, bool [BM, BLOCK]; counter layout: README.md.

    Elements (rows[m], first_column + i) for i < BLOCK, whether or not the tensor has them; `seed` int64,
    `threshold` from `keep_threshold`. GROUPED needs `columns` and `first_column` to be multiples of 4 and
    takes all four words of a call of Philox; otherwise every element pays for a whole call. OPERAND says that
    the tile that is masked goes into tl.dot: the same bits in a form that costs its operands nothing.
    """
    if GROUPED:
        group = rows.to(tl.int64) * (columns // 4) + first_column // 4
        word0, word1, word2, word3 = tl.randint4x(seed, group[:, None] + tl.arange(0, BLOCK // 4)[None, :])
        if (
            OPERAND
        ):  # for a tl.join on the way to tl.dot Triton halves the vectors of operands: bank conflicts
            i = tl.arange(0, 4)[None, None, :]
            low = tl.where(i == 0, word0[:, :, None], word1[:, :, None])
            high = tl.where(i == 2, word2[:, :, None], word3[:, :, None])
            words = tl.reshape(tl.where(i < 2, low, high), (rows.shape[0], BLOCK))
        else:
            words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    else:
        element = (rows.to(tl.int64) * columns + first_column)[:, None] + tl.arange(0, BLOCK)[None, :]
        word0, word1, word2, word3 = tl.randint4x(seed, element >> 2)
        low, high = tl.where(element & 1 == 0, word0, word1), tl.where(element & 1 == 0, word2, word3)
        words = tl.where(element & 2 == 0, low, high)
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit(do_not_specialize=["threshold"])
def dropout_kernel(x_ptr, out_ptr, n, seed_ptr, threshold: tl.uint32, scale, TILE: tl.constexpr):
    """D(x) of n contiguous elements."""
    first = tl.program_id(0).to(tl.int64) * TILE
    element = first + tl.arange(0, TILE)[None, :]  # as one row [1, n], whose columns may be counted in groups
    x = tl.load(x_ptr + element, mask=element < n).to(tl.float32)
    keep = keep_tile(tl.zeros((1,), tl.int32), first, 0, tl.load(seed_ptr), threshold, TILE, True)
    y = tl.where(keep, x * scale, 0.0)
    tl.store(out_ptr + element, y.to(out_ptr.dtype.element_ty), mask=element < n)


def philox_dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Launch the kernel; see `reference.philox_dropout`."""
    check_philox_dropout(x, p, seed)
    check_kernel_dtype("x", x)
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        dropout_kernel[(triton.cdiv(x.numel(), TILE),)](
            x, out, x.numel(), seed, keep_threshold(p), keep_scale(p),
            TILE=TILE, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def keep_threshold(p: float) -> int:
    """An element is kept where its word is not below this."""
    return math.floor(p * 2**32)


def keep_scale(p: float) -> float:
    """Factor of the elements that are kept; as an argument of a kernel it is rounded to fp32."""
    return 1.0 / (1.0 - p)


def keep_arguments(p: float, seed: torch.Tensor | None) -> tuple[torch.Tensor | None, int, float]:
    """Seed, threshold and scale of D as kernels take them; no seed where nothing is dropped."""
    if p == 0.0:
        return None, 0, 1.0
    return seed, keep_threshold(p), keep_scale(p)
