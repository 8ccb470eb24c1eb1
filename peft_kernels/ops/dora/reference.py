"""Meaning of `dora_norm` in plain PyTorch: specification, fallback and benchmark baseline in one."""

from typing import Any

import torch

from peft_kernels.core.backend import reference_kernel
from peft_kernels.ops.dora.schema import NormArgs, check_dora_norm
from peft_kernels.ops.linear.schema import accumulate_dtype
from peft_kernels.ops.nf4.reference import nf4_dequantize
from peft_kernels.ops.nf4.schema import BaseWeight

_ROWS = 256  # of W + scaling * B A that are formed at a time


@reference_kernel("dora_norm")
def dora_norm(*args: Any) -> torch.Tensor:
    """norm_n = ||W_n + scaling * (B A)_n||, over the K inputs of output n, in fp64, rounded once.

    Args:
        *args: `NormArgs`.

    Returns:
        norm [N], fp32 (fp64 for an fp64 adapter); 0 for a row of zeros.
    """
    a = NormArgs(*args)
    check_dora_norm(a)
    weight, lora_a, lora_b = a.weight, a.lora_a.double(), a.lora_b.double()
    if a.absmax is not None:
        weight = nf4_dequantize(*BaseWeight(*args[:7]), (a.out_features, lora_a.shape[1]), torch.float32)
    norms = [
        torch.linalg.vector_norm(rows.double() + a.scaling * (b @ lora_a), dim=1)
        for rows, b in zip(torch.split(weight, _ROWS), torch.split(lora_b, _ROWS), strict=True)
    ]
    return torch.cat(norms).to(accumulate_dtype(a.lora_a.dtype))
