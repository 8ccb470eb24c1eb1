"""The ops as functions, without modules or model surgery."""

from peft_kernels.ops.adapter.functional import bottleneck_adapter, bottleneck_adapter_with_intermediates
from peft_kernels.ops.dora.functional import dora_linear, dora_norm
from peft_kernels.ops.dropout.functional import philox_dropout, philox_dropout_mask
from peft_kernels.ops.linear.functional import adapted_linear, lora_linear, nf4_linear, nf4_lora_linear
from peft_kernels.ops.linear.ia3 import ia3_linear
from peft_kernels.ops.nf4.functional import nf4_dequantize, nf4_quantize

__all__ = [
    "adapted_linear",
    "bottleneck_adapter",
    "bottleneck_adapter_with_intermediates",
    "dora_linear",
    "dora_norm",
    "ia3_linear",
    "lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_lora_linear",
    "nf4_quantize",
    "philox_dropout",
    "philox_dropout_mask",
]
