"""What the launchers of the adapted linear's forward and backward have in common."""

from typing import Any

import torch
from triton import cdiv

from peft_kernels.core.gpu import gpu, launch_options, with_plain_rows
from peft_kernels.ops.dropout.triton import keep_arguments
from peft_kernels.ops.linear import triton_forward_kernels as kernels
from peft_kernels.ops.linear.schema import ForwardArgs, base_weight
from peft_kernels.ops.linear.triton_plan import Tile
from peft_kernels.ops.nf4.schema import BaseWeight
from peft_kernels.ops.nf4.triton import contiguous, has_shuffle, nested_blocksize

EPILOGUE = Tile(32, 64, 64)
PANEL = Tile(0, 32, 128)
PROJECTION = Tile(32, 0, 64)
LORA_A_GRADIENT = Tile(0, 0, 64)


def with_plain_strides(a: ForwardArgs, read_x: bool = True) -> ForwardArgs:
    """The same arguments: rows of x (if it is read) with plain rows, everything else contiguous."""
    base = contiguous(base_weight(a))

    def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.contiguous()

    return ForwardArgs(
        with_plain_rows(a.x) if read_x else a.x, *base, a.out_features,
        dense(a.lora_a), dense(a.lora_b), a.scaling,
        dense(a.column_scale), dense(a.input_scale), dense(a.bias), a.dropout_p, a.seed,
    )  # fmt: skip


def precision() -> str:
    """For products with fp32 operands."""
    return gpu().fp32_precision


def options(tile: Tile) -> dict[str, Any]:
    """Options of a launch."""
    return launch_options(tile.warps, tile.stages)


def nf4_format(base: BaseWeight) -> dict[str, Any]:
    """What kernels that decode NF4 are compiled for."""
    return {"BLOCKSIZE": base.blocksize, "NESTED": nested_blocksize(base), "SHUFFLE": has_shuffle()}


def dropout(a: ForwardArgs) -> tuple[torch.Tensor | None, int, float]:
    """Seed, threshold and scale of D."""
    return keep_arguments(a.dropout_p, a.seed)


def rank(a: ForwardArgs) -> int:
    """r; 1 where there is no low-rank part."""
    return 1 if a.lora_a is None else a.lora_a.shape[0]


def token_tile(most: int, tokens: int) -> int:
    """A tile's tokens: no more than there are, but 16 at least for tensor cores."""
    return min(most, max(16, 1 << (tokens - 1).bit_length()))


def gemm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right by the vendor's library, unrounded; on AMD a 16-bit product is rounded to 16 bits."""
    if left.dtype == torch.float32 or gpu().backend != "cuda":
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=torch.float32)


def scaled(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """x ⊙ scale, computed in fp32 and rounded once to the dtype of x."""
    if scale is None:
        return x
    return torch.mul(x, scale, out=x.new_empty(x.shape))


def dequantize(
    base: BaseWeight,
    shape: tuple[int, int],
    out: torch.Tensor,
    first: tuple[int, int],
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
) -> None:
    """Part of an NF4 weight of `shape`, from row and column `first` on, times the scales, into `out`."""
    (height, width), tile = out.shape, PANEL
    kernels.panel_kernel[(cdiv(height, tile.block_n), cdiv(width, tile.block_k))](
        *base[:5], row_scale, column_scale, out, *shape, *first, height, width,
        BN=tile.block_n, BK=tile.block_k, WHOLE=shape[1] % base.blocksize == 0,
        **nf4_format(base), **options(tile),
    )  # fmt: skip
