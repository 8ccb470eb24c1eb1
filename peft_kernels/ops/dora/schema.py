"""Contract of `dora_norm`: schema, argument checks (shared by the eager and the fake path), fake kernel."""

from typing import Any, NamedTuple

import torch

from peft_kernels.core.backend import define_op, fake_kernel
from peft_kernels.core.checks import check_dtype, check_finite, check_shape
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES
from peft_kernels.ops.linear.schema import BASE_SCHEMA, accumulate_dtype, check_lora
from peft_kernels.ops.nf4.schema import WEIGHT_DTYPES, BaseWeight, check_nf4_format

define_op(
    "dora_norm",
    f"({BASE_SCHEMA}, SymInt out_features, Tensor lora_a, Tensor lora_b, float scaling) -> Tensor",
    triton="peft_kernels.ops.dora.triton",
)


class NormArgs(NamedTuple):
    """Arguments of `dora_norm` in the order of its schema."""

    weight: torch.Tensor  # dense [N, K]; or, with absmax, NF4 bytes: see NF4Weight
    absmax: torch.Tensor | None
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None
    nested_blocksize: int  # 0 where not double-quantised
    blocksize: int  # 0 where dense
    out_features: int  # N
    lora_a: torch.Tensor  # [r, K], of any float dtype; float64 over a float64 or an NF4 weight only
    lora_b: torch.Tensor  # [N, r], dtype of lora_a
    scaling: float


def check_dora_norm(args: NormArgs) -> None:
    """Argument contract of `dora_norm`."""
    weight, n = args.weight, args.out_features
    k = args.lora_a.shape[-1] if args.lora_a.dim() == 2 else 0  # what check_lora says of it comes first
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    if args.absmax is None:
        check_dtype("weight", weight, FLOAT_DTYPES)
        check_shape("weight", weight, "[N, K]", (n, None))
        k = weight.shape[1]
        dtypes = (weight.dtype,) if weight.dtype == torch.float64 else WEIGHT_DTYPES
    check_lora(args.lora_a, args.lora_b, (n, k), dtypes, "weight", weight)
    if n < 1 or k < 1:
        raise ValueError(f"weight must be [N, K] with N, K > 0, got [{n}, {k}]")
    if args.absmax is not None:
        check_nf4_format(BaseWeight(*args[:7]), (n, k))
    check_finite("scaling", args.scaling)


@fake_kernel("dora_norm")
def _(*args: Any) -> torch.Tensor:
    a = NormArgs(*args)
    check_dora_norm(a)
    return a.lora_a.new_empty([a.out_features], dtype=accumulate_dtype(a.lora_a.dtype))
