"""Gradient of `philox_dropout`: the same op applied to the gradient, so it can be differentiated again."""

from typing import Any

import torch

from peft_kernels.core.backend import resolve


class PhiloxDropout(torch.autograd.Function):
    """Dropout that saves the seed, not the mask."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
        """x and its dropout differ by the mask alone, so the seed is all that is saved."""
        ctx.save_for_backward(seed)
        ctx.p = p
        y: torch.Tensor = resolve("philox_dropout", x)(x, p, seed)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient through the same mask."""
        (seed,) = ctx.saved_tensors
        return PhiloxDropout.apply(grad, ctx.p, seed), None, None  # type: ignore[no-untyped-call]
