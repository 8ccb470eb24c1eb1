"""Layers: parameters and a forward; the maths is in `peft_kernels.functional`."""

from peft_kernels.nn.bottleneck_adapter import BottleneckAdapter
from peft_kernels.nn.dora_linear import DoRALinear
from peft_kernels.nn.dropout import PhiloxDropout
from peft_kernels.nn.ia3_linear import IA3Linear
from peft_kernels.nn.lora_linear import LoRALinear
from peft_kernels.nn.nf4_linear import NF4Linear

__all__ = [
    "BottleneckAdapter",
    "DoRALinear",
    "IA3Linear",
    "LoRALinear",
    "NF4Linear",
    "PhiloxDropout",
]
