"""Dropout whose mask is a function of a seed: recomputed where it is needed, never stored."""

from peft_kernels.ops.dropout import reference

__all__ = ["reference"]  # importing it registers the family's ops
