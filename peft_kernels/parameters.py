"""How many parameters of a model are trained, and what they are."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import nn

from peft_kernels.core.checks import check_module, check_sizes
from peft_kernels.core.text import as_text
from peft_kernels.nn import NF4Linear

# A parameter is of the first kind whose pattern is found in its dotted name, in PEFT, adapters or pk.nn.
_KINDS = {
    "LoRA A": r"lora_(embedding_)?A\b",
    "LoRA B": r"lora_(embedding_)?B\b",
    "DoRA magnitude": r"lora_magnitude_vector\b",
    "IA3 vector": r"ia3_l\b",
    "bottleneck adapter": r"\badapter_(down|up|norm_before|norm_after)\b|\badapters\.",
    "prompt or prefix": r"\bprompt_(encoder|embeddings)\b|\bprefix_tunings\b|\badaption_(prompt|gate)\b",
    "head or saved module": r"\bmodules_to_save\b|\b(heads|classifier|score|qa_outputs|lm_head)\.",
    "other": "",
}
_ADAPTERS_IA3 = "adapters.methods.lora.IA3"  # it calls its vector lora_B


@dataclass(frozen=True)
class Kind:
    """The trainable parameters of one kind.

    Attributes:
        name: "LoRA A", "LoRA B", "DoRA magnitude", "IA3 vector", "bottleneck adapter", "prompt or prefix",
            "head or saved module" or "other".
        tensors: how many tensors.
        parameters: how many numbers they hold.
        nbytes: the memory of the tensors. Their gradients take as much again, Adam's state twice as much.
    """

    name: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, repr=False)
class TrainableParameters:
    """What of a model is trained. Its text is a table, in a notebook too.

    Attributes:
        kinds: the trainable parameters by kind; kinds that do not occur are left out.
        total: all parameters of the model, trainable or frozen.
    """

    kinds: tuple[Kind, ...]
    total: int

    @property
    def trainable(self) -> int:
        """How many parameters are trained."""
        return sum(kind.parameters for kind in self.kinds)

    @property
    def nbytes(self) -> int:
        """The memory of the trainable parameters."""
        return sum(kind.nbytes for kind in self.kinds)

    @property
    def share(self) -> float:
        """`trainable` over `total`; 0 for a model without parameters."""
        return self.trainable / self.total if self.total else 0.0

    def __rich__(self) -> Group | str:
        summary = (
            f"{self.trainable:,} of {self.total:,} parameters are trained ({self.share:.3%}), "
            f"{self.nbytes / 2**20:.2f} MiB"
        )
        if not self.kinds:
            return summary
        table = Table("trained")
        for heading in ("tensors", "parameters", "of the model", "MiB"):
            table.add_column(heading, justify="right")
        for kind in self.kinds:
            share, mebibytes = f"{kind.parameters / self.total:.3%}", f"{kind.nbytes / 2**20:.2f}"
            table.add_row(kind.name, f"{kind.tensors:,}", f"{kind.parameters:,}", share, mebibytes)
        return Group(summary, table)

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Count the parameters of `model` that require a gradient, by kind, and all of them.

    A parameter that several modules share counts once. Weights in 4 bits count by their logical shape: a byte
    holds two, and bitsandbytes' scales are none of the model's parameters. The totals are those of PEFT's
    `get_nb_trainable_parameters`, except for weights it gets wrong: bitsandbytes' before they are quantised,
    and those with an odd number of elements. What other formats keep in buffers (GPTQ, AWQ) is not counted.

    To count before there is a model, make it on the meta device, which takes no memory:

        >>> with torch.device("meta"):
        ...     layers = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 11008))
        ...     model = peft.get_peft_model(layers, peft.LoraConfig(r=16, target_modules=["0", "1"]))
        >>> pk.trainable_parameters(model).trainable
        372736

    Args:
        model: any module, of PEFT, adapters, `pk.nn` or none of them.

    Returns:
        `trainable`, `total`, `share`, `nbytes` and the `kinds`. `print` it.

    Raises:
        TypeError: `model` is not a module.
    """
    check_module("model", model, "pass the loaded model itself")
    tensors: dict[str, list[nn.Parameter]] = {}
    sizes: dict[nn.Parameter, int] = {}
    for name, module, parameter in _named_parameters(model):
        if parameter in sizes:
            continue
        sizes[parameter] = _size(module, parameter)
        if parameter.requires_grad:
            tensors.setdefault(_kind(name, module), []).append(parameter)
    kinds = (
        Kind(
            kind,
            len(tensors[kind]),
            sum(sizes[parameter] for parameter in tensors[kind]),
            sum(parameter.numel() * parameter.element_size() for parameter in tensors[kind]),
        )
        for kind in _KINDS
        if kind in tensors
    )
    return TrainableParameters(tuple(kinds), sum(sizes.values()))


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every parameter with its name and its owner; a shared one several times."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield name, module, parameter


def _size(module: nn.Module, parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for."""
    if isinstance(module, NF4Linear) and parameter is module._parameters.get("weight"):
        return module.out_features * module.in_features
    quant_state = getattr(parameter, "quant_state", None)  # of bitsandbytes, once it is quantised
    if quant_state is None and parameter is module._parameters.get("weight"):
        quant_state = getattr(module, "quant_state", None)  # FSDP's shards have none
    if quant_state is not None:
        shape: Any = getattr(quant_state, "shape", None)
        check_sizes("quant_state.shape", shape)
        return math.prod(shape)
    zero3: int = getattr(parameter, "ds_numel", 0)  # DeepSpeed's ZeRO-3 leaves an empty tensor on each worker
    return parameter.numel() or zero3


def _kind(name: str, module: nn.Module) -> str:
    if f"{type(module).__module__}.{type(module).__qualname__}" == _ADAPTERS_IA3:
        return "IA3 vector"
    return next(kind for kind, pattern in _KINDS.items() if re.search(pattern, name))
