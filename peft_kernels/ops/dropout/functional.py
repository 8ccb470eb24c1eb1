"""Public calls of the counter-based dropout."""

from collections.abc import Sequence

import torch

from peft_kernels.core.backend import resolve
from peft_kernels.core.checks import check_integer, check_memory, check_probability, check_sizes, check_tensor
from peft_kernels.core.transforms import refuse_transforms
from peft_kernels.ops.dropout.autograd import PhiloxDropout
from peft_kernels.ops.dropout.reference import keep_mask
from peft_kernels.ops.dropout.schema import check_philox_dropout, check_seed


def philox_dropout(x: torch.Tensor, p: float, seed: int | torch.Tensor | None = None) -> torch.Tensor:
    """Dropout with a mask that is recomputed from a seed in the backward pass instead of being stored.

    y[e] = keep[e] * x[e] / (1 - p), with keep as `philox_dropout_mask` gives it, element e counted in
    row-major order whatever the strides of `x`.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        p: probability that an element is dropped, in [0, 1). With 0, `x` itself is returned.
        seed: an int, or an int64 0-dim tensor on the device of `x`; drawn from torch's default generator
            when None, so that torch.manual_seed makes it reproducible.

    Returns:
        Tensor like `x`; dropped elements are +0.

    Raises:
        TypeError: `x` is not a tensor, or `seed` neither an int nor a tensor.
        ValueError: `p` is out of range, or `seed` is not an int64 scalar on the device of `x`.
        NotImplementedError: called inside a torch.func transform or under forward-mode differentiation.

    Source: Philox4x32-10 of Salmon et al., SC'11; dropout of Srivastava et al., JMLR 15 (2014).
    """
    check_tensor("x", x)
    check_probability("p", p)
    if p == 0.0:
        return x
    refuse_transforms("philox_dropout", "x * philox_dropout_mask(x.shape, p, seed) / (1 - p)")
    seed = as_seed(seed, x.device)
    check_philox_dropout(x, p, seed)
    if torch.is_grad_enabled() and x.requires_grad:
        y: torch.Tensor = PhiloxDropout.apply(x, p, seed)  # type: ignore[no-untyped-call]
    else:
        y = resolve("philox_dropout", x)(x, p, seed)
    return y


def philox_dropout_mask(shape: Sequence[int], p: float, seed: int | torch.Tensor) -> torch.Tensor:
    """The mask of `philox_dropout`: True where an element is kept.

    keep[e] = (word[e % 4] >= floor(p * 2^32)), of the four words that Philox4x32-10 gives for counter e // 4
    and key `seed`; e counts the elements in row-major order.

    Args:
        shape: shape of the tensor to which dropout is applied.
        p: probability that an element is dropped, in [0, 1).
        seed: an int (the mask is then on the CPU), or an int64 0-dim tensor on the device wanted.

    Returns:
        bool tensor of `shape`.

    Raises:
        TypeError: `seed` is neither an int nor a tensor, or `shape` no sequence of ints.
        ValueError: `p` or a size is out of range, or `seed` is not an int64 scalar.

    Source: Philox4x32-10 of Salmon et al., SC'11.
    """
    check_sizes("shape", shape)
    check_probability("p", p)
    device = seed.device if isinstance(seed, torch.Tensor) else torch.device("cpu")
    if not isinstance(seed, torch.Tensor):
        check_integer("seed", seed)  # None, too, is none
    seed = as_seed(seed, device)
    check_seed(seed, "seed", seed)
    check_memory("seed", seed)
    return keep_mask(shape, p, seed)


def as_seed(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The seed as the ops take it: int64 0-dim. None draws one from the default generator of `device`."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        check_tensor("seed", seed)
        return seed
    check_integer("seed", seed)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in int64, got {seed}")
    return torch.tensor(seed, dtype=torch.int64, device=device)
