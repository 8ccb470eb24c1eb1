"""Contract of `philox_dropout`: schema, argument checks, fake kernel."""

import torch

from peft_kernels.core.backend import define_op, fake_kernel
from peft_kernels.core.checks import check_device, check_dtype, check_probability, check_shape

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

define_op(
    "philox_dropout", "(Tensor x, float p, Tensor seed) -> Tensor", triton="peft_kernels.ops.dropout.triton"
)


def check_seed(seed: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Require a seed as the ops take it."""
    check_dtype("seed", seed, (torch.int64,))
    check_shape("seed", seed, "0-dim", ())
    check_device("seed", seed, other_name, other)


def check_philox_dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> None:
    """Argument contract of `philox_dropout`."""
    check_dtype("x", x, FLOAT_DTYPES)
    check_probability("p", p)
    check_seed(seed, "x", x)


@fake_kernel("philox_dropout")
def _(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    check_philox_dropout(x, p, seed)
    return x.new_empty(x.shape)
