"""DoRA: the norms of the rows of W + scaling * B A, and the linear layer that they rescale."""

from peft_kernels.ops.dora import reference

__all__ = ["reference"]  # importing it registers the family's ops
