"""Triton kernels of the NF4 codec, and `decode`, with which other families read NF4 weights."""

import itertools
import math
import struct
from typing import Any

import torch
import triton
import triton.language as tl

from peft_kernels.core.gpu import gpu
from peft_kernels.ops.nf4.reference import NF4_CODE
from peft_kernels.ops.nf4.schema import (
    BaseWeight,
    check_nf4_dequantize,
    check_nf4_quantize,
)

TILE = 4096  # elements of a CTA: the largest blocksize
_WARPS = 4
_TINY = tl.constexpr(1e-38)
_MIDPOINTS = tl.constexpr(
    tuple(
        float(torch.tensor(low, dtype=torch.float32).add(high).div(2))
        for low, high in itertools.pairwise(NF4_CODE)
    )
)
_CODE = tl.constexpr(NF4_CODE)


def _bits(value: float) -> str:
    return f"0x{int.from_bytes(struct.pack('<f', value), 'little'):08x}"


def _lane_code_ptx() -> str:
    """PTX that sets $0 to the code of this lane's number, modulo 16: a tree of selections by its four bits.

    With it, a shuffle from lane i looks up code i.
    """
    lines = [".reg .u32 lane, bit; .reg .pred set; .reg .b32 %c<8>; mov.u32 lane, %laneid;"]
    values = [_bits(code) for code in NF4_CODE]
    for level in range(4):
        lines.append(f"and.b32 bit, lane, {1 << level}; setp.ne.u32 set, bit, 0;")
        for i in range(len(values) // 2):
            lines.append(f"selp.b32 %c{i}, {values[2 * i + 1]}, {values[2 * i]}, set;")
        values = [f"%c{i}" for i in range(len(values) // 2)]
    return "{ " + " ".join(lines) + " mov.b32 $0, %c0; }"


_LANE_CODE_PTX = tl.constexpr(_lane_code_ptx())
# Four bytes in $8, so eight codes: $0..$3 of the high nibbles, $4..$7 of the low. A shuffle reads five bits
# of the lane's number, and lanes 16 to 31 repeat the table: nothing needs to be masked.
_SHUFFLE_PTX = tl.constexpr(
    "{ .reg .u32 index; "
    + " ".join(
        f"shr.u32 index, $8, {8 * byte + shift}; shfl.sync.idx.b32 ${byte + output}, $9, index, 31, -1;"
        for byte in range(4)
        for output, shift in ((0, 4), (4, 0))
    )
    + " }"
)


@triton.jit
def code_table(SHUFFLE: tl.constexpr):
    """What `decode` looks up in: with SHUFFLE, the code of a lane's own number; otherwise fp32 [16]."""
    if SHUFFLE:
        table = tl.inline_asm_elementwise(
            _LANE_CODE_PTX, "=r,r", [tl.program_id(0)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        index = tl.arange(0, 16)
        table = tl.zeros((16,), tl.float32)
        for i in tl.static_range(16):
            table = tl.where(index == i, _CODE[i], table)
    return table


@triton.jit
def decode(packed, table, SHUFFLE: tl.constexpr):
    """fp32 codes of the high and of the low nibbles of uint8 `packed`, each of its shape."""
    if SHUFFLE:
        high, low = tl.inline_asm_elementwise(
            _SHUFFLE_PTX,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r",
            [packed, tl.broadcast_to(table, packed.shape)],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        size: tl.constexpr = packed.numel
        high = tl.gather(table, tl.reshape((packed >> 4).to(tl.int32), (size,)), 0).reshape(packed.shape)
        low = tl.gather(table, tl.reshape((packed & 15).to(tl.int32), (size,)), 0).reshape(packed.shape)
    return high, low


@triton.jit
def load_absmax(
    absmax_ptr, index, mask, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, NESTED: tl.constexpr
):
    """fp32 absmax of the blocks `index`, 0 where masked; NESTED is the nested blocksize, or 0.

    A nested absmax is code * absmax2 + offset, rounded twice: compile kernels that call this without fusion.
    """
    absmax = tl.load(absmax_ptr + index, mask=mask, other=0)
    if NESTED:
        code = tl.load(nested_code_ptr + absmax.to(tl.int32), mask=mask, other=0.0)
        scale = tl.load(nested_absmax_ptr + index // NESTED, mask=mask, other=0.0)
        absmax = tl.where(mask, code * scale + tl.load(nested_offset_ptr), 0.0)
    return absmax


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_kernel(
    weight_ptr, packed_ptr, absmax_ptr, n, packed_size, BLOCKSIZE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Codes and absmax of TILE elements, whole blocks of them."""
    blocks: tl.constexpr = TILE // BLOCKSIZE
    first = tl.program_id(0).to(tl.int64) * TILE
    element = first + tl.arange(0, TILE)
    weight = tl.load(weight_ptr + element, mask=element < n, other=0.0).to(tl.float32)
    weight = tl.reshape(weight, (blocks, BLOCKSIZE))
    absmax = tl.reduce(tl.abs(weight), 1, _larger)  # [blocks]
    tiny = tl.full((blocks,), _TINY, tl.float32)  # as a constant fp64 to Triton 3.6: subnormal
    divisor = _larger(absmax, tiny)
    scaled = weight * tl.div_rn(1.0, divisor)[:, None]
    block = first // BLOCKSIZE + tl.arange(0, blocks)
    if first + TILE > n:  # perhaps a partial block, which divides, and stores what it divided by
        partial = (block + 1) * BLOCKSIZE > n
        scaled = tl.where(partial[:, None], tl.div_rn(weight, divisor[:, None]), scaled)
        scaled = tl.where(
            tl.reshape(element, (blocks, BLOCKSIZE)) < n, scaled, 0.0
        )  # of an odd end, even for NaN
        absmax = tl.where(partial, divisor, absmax)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < n)
    index = tl.zeros((blocks, BLOCKSIZE), tl.int32)
    for i in tl.static_range(15):
        index += (~(scaled <= _MIDPOINTS[i])).to(tl.int32)  # NaN takes the highest
    high, low = tl.split(tl.reshape(index, (TILE // 2, 2)))
    byte = first // 2 + tl.arange(0, TILE // 2)
    tl.store(packed_ptr + byte, (high << 4 | low).to(tl.uint8), mask=byte < packed_size)


@triton.jit
def dequantize_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, out_ptr, n, packed_size,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, TILE: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """TILE elements from their codes and absmax, rounded once."""
    blocks: tl.constexpr = TILE // BLOCKSIZE
    first = tl.program_id(0).to(tl.int64) * TILE
    byte = first // 2 + tl.arange(0, TILE // 2)
    packed = tl.load(packed_ptr + byte, mask=byte < packed_size, other=0)
    high, low = decode(packed, code_table(SHUFFLE), SHUFFLE)
    code = tl.reshape(tl.join(high, low), (blocks, BLOCKSIZE))
    block = first // BLOCKSIZE + tl.arange(0, blocks)
    absmax = load_absmax(
        absmax_ptr,
        block,
        block * BLOCKSIZE < n,
        nested_absmax_ptr,
        nested_code_ptr,
        nested_offset_ptr,
        NESTED,
    )
    element = first + tl.arange(0, TILE)
    weight = tl.reshape(code * absmax[:, None], (TILE,))
    tl.store(out_ptr + element, weight.to(out_ptr.dtype.element_ty), mask=element < n)


def nf4_quantize(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the codec; see `reference.nf4_quantize`."""
    check_nf4_quantize(weight, blocksize)
    weight = weight.contiguous()
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(-(-n // blocksize), dtype=torch.float32)
    if n:
        quantize_kernel[(triton.cdiv(n, TILE),)](
            weight,
            packed,
            absmax,
            n,
            packed.numel(),
            BLOCKSIZE=blocksize,
            TILE=TILE,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return packed, absmax


def nf4_dequantize(*args: Any) -> torch.Tensor:
    """Launch the codec; see `reference.nf4_dequantize`."""
    base, shape, dtype = BaseWeight(*args[:7]), args[7], args[8]
    check_nf4_dequantize(base, shape, dtype)
    base = contiguous(base)
    n = math.prod(shape)
    out = base.weight.new_empty(shape, dtype=dtype)
    if n:
        dequantize_kernel[(triton.cdiv(n, TILE),)](
            *base[:5], out, n, base.weight.numel(), BLOCKSIZE=base.blocksize, NESTED=nested_blocksize(base),
            TILE=TILE, SHUFFLE=has_shuffle(), num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def contiguous(base: BaseWeight) -> BaseWeight:
    """The same weight, with parts that kernels can index by one number."""
    parts: list[Any] = [part.contiguous() if isinstance(part, torch.Tensor) else part for part in base]
    return BaseWeight(*parts)


def nested_blocksize(base: BaseWeight) -> int:
    """Blocksize of the doubly quantised absmax; 0 where it is not."""
    return 0 if base.nested_absmax is None else base.nested_blocksize


def has_shuffle() -> bool:
    """Whether `decode` may use NVIDIA's warp shuffle; otherwise it is Triton's gather."""
    return gpu().backend == "cuda"
