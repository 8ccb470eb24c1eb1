"""One folder per op family: contract, meaning, gradient, public call. Importing it registers every op."""

from peft_kernels.core.backend import serve_gpus
from peft_kernels.core.library import native_library
from peft_kernels.ops import adapter, dora, dropout, linear, nf4

__all__ = ["adapter", "dora", "dropout", "linear", "nf4"]

# The families have registered their schemas and default kernels: the native library's come on top.
native_library()
serve_gpus()
