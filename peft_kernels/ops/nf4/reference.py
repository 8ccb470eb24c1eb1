"""Meaning of the NF4 ops in plain PyTorch: specification, fallback and benchmark baseline in one.

Bit-identical with bitsandbytes' CPU `quantize_4bit` and `dequantize_4bit`; README.md has the fine print.
"""

import math
from typing import Any

import torch

from peft_kernels.core.backend import reference_kernel
from peft_kernels.ops.nf4.schema import BaseWeight, check_nf4_dequantize, check_nf4_quantize

# NormalFloat4: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero (arXiv 2305.14314, appendix E).
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

NESTED_BLOCKSIZE = 256
# Smallest divisor of a block. Of the last, partial block the clamped value is also what is stored.
_TINY = 1e-38


def nf4_code(device: torch.device) -> torch.Tensor:
    """The 16 NF4 code values, ascending, fp32 [16]."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


def dynamic_code(device: torch.device) -> torch.Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending, fp32 [256].

    Seven decades 10^-6 … 10^0; decade i divides [0.1, 1] linearly into 2^i intervals and holds their
    midpoints with both signs; 0 and 1 complete it.

    Source: Dettmers, arXiv 1511.04561, section 2.1; the same values as bitsandbytes' `create_dynamic_map`.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        magnitudes = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [magnitudes, -magnitudes]
    return torch.cat(values).sort().values.to(device)


@reference_kernel("nf4_quantize")
def nf4_quantize(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n elements of any shape as packed uint8 [(n+1)//2] and absmax fp32 [ceil(n/blocksize)]."""
    check_nf4_quantize(weight, blocksize)
    values = weight.reshape(-1).to(torch.float32)
    n = values.numel()
    full = n - n % blocksize
    blocks = values[:full].reshape(-1, blocksize)  # [full blocks, blocksize]
    absmax = blocks.abs().amax(dim=1)
    # A full block multiplies by the reciprocal and the partial one divides: the two differ in the last bit.
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).reshape(-1)
    if full < n:
        last_absmax = values[full:].abs().amax().clamp(min=_TINY)
        absmax = torch.cat([absmax, last_absmax[None]])
        scaled = torch.cat([scaled, values[full:] / last_absmax])
    if n % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    code = nf4_code(weight.device)
    # Nearest code value; a tie goes to the lower one, NaN to the highest.
    index = torch.bucketize(scaled.clamp(-1, 1), (code[:-1] + code[1:]) / 2).to(torch.uint8)
    return index[0::2] << 4 | index[1::2], absmax


@reference_kernel("nf4_dequantize")
def nf4_dequantize(*args: Any) -> torch.Tensor:
    """fp32 code times fp32 absmax, rounded once to `dtype`.

    Args:
        *args: the parts of a `BaseWeight`, shape (of n elements), dtype.

    Returns:
        The dense weight, of that shape and dtype.
    """
    base, shape, dtype = BaseWeight(*args[:7]), args[7], args[8]
    check_nf4_dequantize(base, shape, dtype)
    n = math.prod(shape)
    values = nf4_code(base.weight.device)[unpack(base.weight, n)]
    absmax = dequantize_absmax(base).repeat_interleave(base.blocksize)[:n]
    return (values * absmax).to(dtype).reshape(tuple(shape))


def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The indices of n elements into the code, int64 [n]."""
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:n].to(torch.int64)  # high nibble first


def quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantisation: absmax fp32 [blocks] as 8-bit codes around its mean.

    Returns:
        absmax uint8 [blocks], nested_absmax fp32 [ceil(blocks/256)], nested_code fp32 [256], and
        nested_offset fp32 0-dim (the mean), with which `dequantize_absmax` undoes it.

    Source: QLoRA, arXiv 2305.14314, section 3 ("Double Quantization").
    """
    code = dynamic_code(absmax.device)
    offset = absmax.mean()
    # A NaN counts as 0 in the maximum and takes the lowest code, as in bitsandbytes.
    centred = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCKSIZE))
    blocks = centred.reshape(-1, NESTED_BLOCKSIZE)
    nested_absmax = blocks.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(dim=1)
    scaled = (blocks * (1.0 / nested_absmax)[:, None]).clamp(-1, 1)
    # bitsandbytes rounds to a grid of 2^16 points first and looks up the code nearest to the grid point.
    grid_index = ((scaled + 1) * 0.5 * 65535 + 0.5).nan_to_num(nan=0.0).to(torch.int64)
    grid = -1.0 + 2.0 * torch.arange(65536, dtype=torch.float32, device=absmax.device) / 65535
    nearest = torch.bucketize(grid, 0.5 * (code[:-1] + code[1:])).to(torch.uint8)
    index = nearest[grid_index].where((nested_absmax > 0)[:, None], 0)
    return index.reshape(-1)[: absmax.numel()].contiguous(), nested_absmax, code, offset


def dequantize_absmax(base: BaseWeight) -> torch.Tensor:
    """The fp32 absmax of an NF4 weight, [blocks]: its own, or code * absmax + offset, rounded twice."""
    assert base.absmax is not None
    if base.nested_absmax is None or base.nested_code is None or base.nested_offset is None:
        return base.absmax
    scale = base.nested_absmax.repeat_interleave(base.nested_blocksize)[: base.absmax.numel()]
    return base.nested_code[base.absmax.to(torch.int64)] * scale + base.nested_offset
