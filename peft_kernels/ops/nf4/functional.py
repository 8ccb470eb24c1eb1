"""Public calls of the NF4 codec."""

import torch

from peft_kernels.core.backend import resolve
from peft_kernels.core.checks import check_flag
from peft_kernels.ops.nf4.reference import NESTED_BLOCKSIZE, quantize_absmax
from peft_kernels.ops.nf4.schema import check_nf4_quantize
from peft_kernels.ops.nf4.weight import NestedAbsmax, NF4Weight


def nf4_quantize(weight: torch.Tensor, blocksize: int = 64, double_quant: bool = False) -> NF4Weight:
    """Quantise a weight to 4-bit NormalFloat, bit for bit as bitsandbytes does on the CPU.

    absmax_b = max |w| over block b; each element becomes the index of the NF4 code value nearest to
    w / absmax_b, ties to the lower.

    Args:
        weight: any shape, [N, K] for a linear layer; float32, bfloat16 or float16. It is not differentiable
            and `weight` is not changed.
        blocksize: consecutive elements sharing one absmax: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: store absmax in 8 bits, in blocks of 256 around their mean (bitsandbytes'
            `compress_statistics`): 4.127 instead of 4.5 bits an element at blocksize 64.

    Returns:
        The quantised weight; it remembers the dtype of `weight`.

    Raises:
        TypeError: `weight` is not a tensor.
        ValueError: unsupported dtype or blocksize.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """
    check_nf4_quantize(weight, blocksize)
    check_flag("double_quant", double_quant)
    with torch.no_grad():
        packed, absmax = resolve("nf4_quantize", weight)(weight, blocksize)
        nested = None
        if double_quant:
            absmax, nested_absmax, code, offset = quantize_absmax(absmax)
            nested = NestedAbsmax(nested_absmax, code, offset, NESTED_BLOCKSIZE)
    return NF4Weight(packed, absmax, nested, tuple(weight.shape), blocksize, weight.dtype)


def nf4_dequantize(w: NF4Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The dense weight: w[e] = fp32(code[e] * absmax[e // blocksize]), rounded once to `dtype`.

    Args:
        w: quantised weight.
        dtype: float32, bfloat16 or float16; `w.dtype` by default.

    Returns:
        Tensor of `w.shape`, contiguous.

    Raises:
        TypeError: `w` is not an NF4Weight.
        ValueError: unsupported dtype.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """
    return require_nf4_weight("w", w).dequantize(dtype)


def require_nf4_weight(name: str, weight: object) -> NF4Weight:
    """`weight` itself, if it is an NF4Weight."""
    if not isinstance(weight, NF4Weight):
        raise TypeError(
            f"{name} must be an NF4Weight, got {type(weight).__name__}; "
            "make one with nf4_quantize(weight) or NF4Weight.from_bitsandbytes(layer.weight)"
        )
    return weight
