"""`PhiloxDropout`: counter-based dropout as a module."""

import torch
from torch import nn

from peft_kernels.core.checks import check_probability
from peft_kernels.functional import philox_dropout


class PhiloxDropout(nn.Dropout):
    """Drop-in for `torch.nn.Dropout` with the masks of the fused layers: y = mask * x / (1 - p) in training.

    The seed is drawn from torch's default generator as `functional.lora_linear` draws it. After the same
    `torch.manual_seed`, a stock model with this for its dropout modules therefore sees the masks of the fused
    model. The mask is never stored.

    Args:
        p: probability that an element is dropped, in [0, 1).

    Raises:
        ValueError: `p` is out of range.
    """

    def __init__(self, p: float = 0.5) -> None:
        check_probability("p", p)
        super().__init__(p)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape in, the same out; the identity in eval mode."""
        return philox_dropout(input, self.p) if self.training else input
