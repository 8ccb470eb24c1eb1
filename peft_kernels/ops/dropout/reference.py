"""Meaning of `philox_dropout` in plain PyTorch: Philox4x32-10 and the dropout mask made from it."""

import math
from collections.abc import Sequence

import torch

from peft_kernels.core.backend import reference_kernel
from peft_kernels.ops.dropout.schema import check_philox_dropout

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_ROUNDS = 10

Words = tuple[torch.Tensor, ...]


def philox4x32(counter: Words, key: Words) -> Words:
    """Philox4x32-10: four random 32-bit words for each 128-bit counter under a 64-bit key.

    Args:
        counter: four int64 tensors of one shape, each holding values in [0, 2^32).
        key: two int64 tensors in [0, 2^32), broadcastable to that shape.

    Returns:
        Four int64 tensors with values in [0, 2^32).

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK32
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of constant * word, by 16-bit halves, which never overflow int64."""
    low_product = (constant & 0xFFFF) * word
    high_product = (constant >> 16) * word + (low_product >> 16)
    return high_product >> 16, (high_product << 16 | low_product & 0xFFFF) & _MASK32


def keep_mask(shape: Sequence[int], p: float, seed: torch.Tensor) -> torch.Tensor:
    """Which elements of a tensor of `shape` dropout keeps, bool; see README.md for the counter layout."""
    n = math.prod(shape)
    index = torch.arange((n + 3) // 4, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(index)
    words = philox4x32((index & _MASK32, index >> 32, zero, zero), (seed & _MASK32, seed >> 32 & _MASK32))
    threshold = math.floor(p * 2**32)
    return (torch.stack(words, dim=1).reshape(-1)[:n] >= threshold).reshape(tuple(shape))


@reference_kernel("philox_dropout")
def philox_dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """x * keep * fp32(1/(1-p)), computed in fp32 (fp64 for fp64) and rounded once."""
    check_philox_dropout(x, p, seed)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    return dropped(x.to(accumulate), p, seed).to(x.dtype)


def dropped(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """D(x) without a final rounding; a dropped element is +0 even where x is negative, infinite or NaN."""
    scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32)
    return torch.where(keep_mask(x.shape, p, seed), x * scale, 0.0)
