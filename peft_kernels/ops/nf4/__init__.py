"""The NF4 codec: 4-bit NormalFloat weights in bitsandbytes' format."""

from peft_kernels.ops.nf4 import reference

__all__ = ["reference"]  # importing it registers the family's ops
