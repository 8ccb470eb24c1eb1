"""bitsandbytes' `Linear4bit` as the `adapters` library wraps it, so that it could put LoRA on it."""

from typing import Any

import torch
from torch import nn

from peft_kernels.surgery.bitsandbytes_linear import FusedLinear4bit
from peft_kernels.surgery.registry import Status, handles


@handles("adapters.methods.lora:LoRALinear4bit")
class FusedAdaptersLinear4bit(FusedLinear4bit):
    """A `Linear4bit` with the library's LoRA beside it: fused as long as that has nothing to add.

    `adapters.init` makes such layers of all that LoRA could go to, whichever methods are used then.
    """

    @staticmethod
    def status(layer: nn.Module) -> Status:
        """Fused: as `FusedLinear4bit`, and no active adapter of the library is on this very layer."""
        reason = _reason(layer)
        return Status(False, reason) if reason else FusedLinear4bit.status(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The library's forward, fused where it can be."""
        reason = _reason(self)
        if reason:
            stock: torch.Tensor = self.run_stock(reason, x)
            return stock
        return super().forward(x)


def _reason(layer: Any) -> str:
    """Why the layer's forward is more than the product with its weight, or ""."""
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: the weight is transposed"
    if not layer.merged and layer.get_active_setup() is not None:
        return "a LoRA or IA3 adapter of the adapters library is active on it"
    return ""
