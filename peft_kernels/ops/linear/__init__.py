"""The adapted linear: a frozen dense or NF4 weight, with an optional low-rank part, scales, bias."""

from peft_kernels.ops.linear import reference

__all__ = ["reference"]  # importing it registers the family's ops
