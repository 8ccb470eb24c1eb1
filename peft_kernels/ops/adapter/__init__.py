"""The bottleneck adapter: two products, activation, scale, dropout, gate and residual in one op."""

from peft_kernels.ops.adapter import reference

__all__ = ["reference"]  # importing it registers the family's ops
