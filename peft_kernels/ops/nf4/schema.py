"""Contract of the NF4 ops: schemas, argument checks (shared by the eager and the fake path), fake kernels."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from peft_kernels.core.backend import define_op, fake_kernel
from peft_kernels.core.checks import (
    check_device,
    check_dtype,
    check_integer,
    check_shape,
    check_sizes,
    check_tensor,
)

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_BLOCKSIZES_TEXT = ", ".join(map(str, BLOCKSIZES))
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

define_op(
    "nf4_quantize",
    "(Tensor weight, int blocksize) -> (Tensor packed, Tensor absmax)",
    triton="peft_kernels.ops.nf4.triton",
)
define_op(
    "nf4_dequantize",
    "(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, "
    "int nested_blocksize, int blocksize, SymInt[] shape, ScalarType dtype) -> Tensor",
    triton="peft_kernels.ops.nf4.triton",
)


class BaseWeight(NamedTuple):
    """A frozen weight as the ops take it: NF4, or dense with `absmax` None and both blocksizes 0."""

    weight: torch.Tensor
    absmax: torch.Tensor | None
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None
    nested_blocksize: int
    blocksize: int


def check_blocksize(blocksize: int) -> None:
    """Require a blocksize that the format knows."""
    check_integer("blocksize", blocksize)
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {_BLOCKSIZES_TEXT}, got {blocksize}")


def check_nf4_quantize(weight: torch.Tensor, blocksize: int) -> None:
    """Argument contract of `nf4_quantize`."""
    check_tensor("weight", weight)
    check_dtype("weight", weight, WEIGHT_DTYPES, "convert it with .to(torch.float32)")
    check_blocksize(blocksize)


def check_nf4_types(base: BaseWeight) -> None:
    """What the dispatcher sees to for an op's arguments, and an `NF4Weight` when it is made."""
    check_tensor("packed", base.weight)
    for name in ("absmax", "nested_absmax", "nested_code", "nested_offset"):
        if (tensor := getattr(base, name)) is not None:
            check_tensor(name, tensor)
    check_integer("nested_blocksize", base.nested_blocksize)


def check_nf4_format(base: BaseWeight, shape: Sequence[int]) -> None:
    """The NF4 format as tensors, for a weight of `shape`; `NF4Weight` says what they mean."""
    packed, absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize = base
    if absmax is None:
        raise ValueError("absmax must be given for an NF4 weight, got None")
    check_blocksize(blocksize)
    n = math.prod(shape)
    blocks = -(-n // blocksize)
    check_dtype("packed", packed, (torch.uint8,), "view its bytes with .view(torch.uint8)")
    check_shape("packed", packed, "[(n+1)//2]", ((n + 1) // 2,), "flatten it with .reshape(-1)")
    check_shape("absmax", absmax, "[ceil(n/blocksize)]", (blocks,))
    check_device("absmax", absmax, "packed", packed)
    if nested_absmax is None or nested_code is None or nested_offset is None:
        if not (nested_absmax is nested_code is nested_offset):
            raise ValueError("nested_absmax, nested_code and nested_offset must be given together, got some")
        check_dtype(
            "absmax", absmax, (torch.float32,), "uint8 needs nested_absmax, nested_code, nested_offset"
        )
        return
    check_dtype("absmax", absmax, (torch.uint8,), "an fp32 absmax takes no nested_absmax")
    if nested_blocksize not in BLOCKSIZES:
        raise ValueError(f"nested_blocksize must be one of {_BLOCKSIZES_TEXT}, got {nested_blocksize}")
    nested_shape = (-(-blocks // nested_blocksize),)
    check_shape("nested_absmax", nested_absmax, "[ceil(blocks/nested_blocksize)]", nested_shape)
    check_shape("nested_code", nested_code, "[256]", (256,))
    check_shape("nested_offset", nested_offset, "0-dim", ())
    for name in ("nested_absmax", "nested_code", "nested_offset"):
        tensor = getattr(base, name)
        check_dtype(name, tensor, (torch.float32,))
        check_device(name, tensor, "packed", packed)


def check_nf4_dequantize(base: BaseWeight, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Argument contract of `nf4_dequantize`."""
    check_sizes("shape", shape)
    check_nf4_format(base, shape)
    if not isinstance(dtype, torch.dtype) or dtype not in WEIGHT_DTYPES:
        got = str(dtype).removeprefix("torch.")
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {got}; convert the result")


@fake_kernel("nf4_quantize")
def _(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_nf4_quantize(weight, blocksize)
    n = weight.numel()
    packed = weight.new_empty([(n + 1) // 2], dtype=torch.uint8)
    absmax = weight.new_empty([(n + blocksize - 1) // blocksize], dtype=torch.float32)
    return packed, absmax


@fake_kernel("nf4_dequantize")
def _(*args: Any) -> torch.Tensor:
    base, shape, dtype = BaseWeight(*args[:7]), args[7], args[8]
    check_nf4_dequantize(base, shape, dtype)
    return base.weight.new_empty(shape, dtype=dtype)
