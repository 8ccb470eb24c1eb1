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

    Source: Philox4x32-10 of Salmon et al., SC'11; dropout of Srivastava et al., JMLR 15 (2014).
    """

    def __init__(self, p: float = 0.5) -> None:
        check_probability("p", p)
        super().__init__(p)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Dropout in training mode; the identity in eval mode.

        Args:
            input: any shape; float32, bfloat16, float16 or float64.

        Returns:
            Tensor like `input`; `input` itself in eval mode or with p = 0.
        """
        return philox_dropout(input, self.p) if self.training else input
