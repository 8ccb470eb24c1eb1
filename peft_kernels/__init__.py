"""Fused kernels for parameter-efficient fine-tuning: LoRA and QLoRA layers, faster and in less memory.

>>> import peft_kernels as pk
>>> report = pk.replace_layers(model)  # a model with PEFT, adapters or bitsandbytes layers: same numbers
>>> print(report)  # per layer: fused or left alone, and why
2 of 2 PEFT, adapters and bitsandbytes layers fused
...

`pk.functional` has the ops, `pk.nn` the layers, `pk.optim` parameter groups for optimisers;
`python -m peft_kernels` says what runs on this machine.
"""

from peft_kernels import functional, io, nn, optim
from peft_kernels.core.backend import use_backend
from peft_kernels.nn.scale_cache import invalidate_norms
from peft_kernels.ops.nf4.weight import NF4Weight
from peft_kernels.parameters import trainable_parameters
from peft_kernels.surgery import explain, replace_layers, restore_layers

__version__ = "0.1.0"

__all__ = [
    "NF4Weight",
    "__version__",
    "explain",
    "functional",
    "invalidate_norms",
    "io",
    "nn",
    "optim",
    "replace_layers",
    "restore_layers",
    "trainable_parameters",
    "use_backend",
]
