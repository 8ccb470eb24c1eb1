"""Model surgery: run a model's PEFT, adapters and bitsandbytes layers on the fused kernels, and back."""

from peft_kernels.surgery import (  # noqa: F401 (they register their handlers)
    adapters_bottleneck,
    adapters_linear,
    bitsandbytes_linear,
    peft_ia3,
    peft_lora,
)
from peft_kernels.surgery.replace import explain, replace_layers, restore_layers
from peft_kernels.surgery.report import Report, Row

__all__ = ["Report", "Row", "explain", "replace_layers", "restore_layers"]
