"""What a benchmark case is: plain data that names a problem, and the ready-to-run form a family gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward", "both"]
WeightKind = Literal["none", "dense", "nf4", "nf4_double"]

OURS = "peft_kernels"
NO_DROPOUT, PLAIN_SCALES, OURS_LORA = "ours-no-dropout", "ours-plain-scales", "ours-lora"
OWN_VARIANTS = (NO_DROPOUT, PLAIN_SCALES, OURS_LORA)  # ours on an easier problem: what a part costs
EXACT = "ours-exact"  # ours without rounding activations to int8
TUNED_SUFFIX = "-tuned"  # "<baseline>-tuned" is that baseline in a process whose allocator keeps freed pages
GPU_BASELINES = ("unsloth", "dorafactors")  # that run on GPUs only
BASELINES = (
    "eager",
    "compile",
    "bitsandbytes",
    "bitsandbytes" + TUNED_SUFFIX,
    "bitsandbytes-repacked",
    "peft",
    "peft" + TUNED_SUFFIX,
    "adapters",
    "dense",
    *OWN_VARIANTS,
    EXACT,
    *GPU_BASELINES,
)
GATE_BASELINES = ("eager", "bitsandbytes", "peft")  # what a user has today, at stock settings
CHECK_SEED = 20240522


class Unavailable(Exception):
    """A contestant cannot run here; the message says why and is printed in its row."""


@dataclass(frozen=True)
class Case:
    """One problem: M tokens x K inputs x N outputs, rank r. Plain data, so that it travels to workers."""

    family: str
    op: str
    m: int
    k: int
    n: int
    r: int = 0
    dtype: str = "float32"
    direction: Direction = "forward"
    weight: WeightKind = "none"
    dropout: float = 0.0
    suites: tuple[str, ...] = ("full",)
    against: tuple[str, ...] = ()  # the baselines that its suite asks for; empty: all that apply
    label: str = ""  # whose shape it is, "llama-3.1-8b:q,o", or which whole model

    @property
    def name(self) -> str:
        """`op/direction/shape/weight/dtype[/p][@label]`, what `--filter` matches."""
        sizes = {"M": self.m, "K": self.k, "N": self.n, "r": self.r}
        shape = "-".join(f"{axis}{size}" for axis, size in sizes.items() if size)
        parts = [self.op, self.direction, shape]
        parts += [self.weight] if self.weight != "none" else []
        parts += [self.dtype]
        parts += [f"p{self.dropout}"] if self.dropout else []
        return "/".join(parts) + (f"@{self.label.replace(' ', '-')}" if self.label else "")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Data type of activations, outputs and adapters."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]

    @property
    def element_size(self) -> int:
        """Bytes of one element of `dtype`."""
        return self.torch_dtype.itemsize


@dataclass(frozen=True)
class Program:
    """One contestant on one copy of the weight.

    Attributes:
        call: what is timed; takes nothing, returns its results.
        outputs: names the results of `call` (float tensors) for the check; never timed.
        forward: the differentiable forward, for counting what it saves; None if nothing is differentiated.
        frozen: weights and parameters, which do not count as saved for backward.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Tensor]]
    forward: Callable[[], Tensor] | None = None
    frozen: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Oracle:
    """Results in float64 and, element by element, the rounding error that is allowed.

    Attributes:
        values: result name -> expected values.
        tolerances: result name -> allowed errors.
        rows: result name -> mask of the rows that `values` and `tolerances` hold; a result not named has all.
    """

    values: dict[str, Tensor]
    tolerances: dict[str, Tensor]
    rows: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A case with its tensors made.

    Attributes:
        contestants: name -> builder of one program per weight copy, for ours and every baseline that is not
            tuned; a builder may raise `Unavailable`.
        oracle: contestant -> expected results, None where they cannot be known (a mask of unknown origin).
        flops: multiplications and additions of the mathematics (0 where that is no useful measure).
        read_bytes: every input once per pass (a forward+backward reads the weight twice).
        write_bytes: every result once; these are the bytes that are not scratch.
        copies: copies of the weight that calls rotate over.
    """

    contestants: Mapping[str, Callable[[], list[Program]]]
    oracle: Callable[[str], Oracle | None]
    flops: int
    read_bytes: int
    write_bytes: int
    copies: int = 1


@dataclass(frozen=True)
class Family:
    """Cases of one family of ops.

    Attributes:
        name: of the family.
        cases: what the suites run.
        baselines: case -> names of the baselines that apply to it (tuned ones included).
        prepare: makes the tensors of any case of the family's ops, in `cases` or not.
    """

    name: str
    cases: tuple[Case, ...]
    baselines: Callable[[Case], tuple[str, ...]]
    prepare: Callable[[Case], Prepared]


def differentiated(
    direction: Direction,
    forward: Callable[[], Tensor],
    leaves: Mapping[str, Tensor],
    grad: Tensor,
    frozen: tuple[Tensor, ...] = (),
) -> Program:
    """Turn a forward y = f(leaves) into the program of one direction.

    Args:
        direction: "forward" runs without autograd; "backward" times the gradient alone, on a graph that is
            kept; "both" times the two together.
        forward: the computation, reading the tensors in `leaves`.
        leaves: result name -> input that requires grad, such as `{"dx": x}`.
        grad: dL/dy.
        frozen: weights and parameters behind `forward`.
    """
    inputs = tuple(leaves.values())

    def named_gradients(gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(leaves, gradients, strict=True))

    if direction == "forward":

        def without_grad() -> Tensor:
            with torch.no_grad():
                return forward()

        return Program(without_grad, lambda y: {"y": y})
    if direction == "backward":
        torch.manual_seed(CHECK_SEED)  # its dropout mask is drawn here, not when the program is called
        y = forward()
        return Program(
            lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True), named_gradients, forward, frozen
        )

    def forward_backward() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = forward()
        return y.detach(), torch.autograd.grad(y, inputs, grad)

    return Program(forward_backward, lambda out: {"y": out[0], **named_gradients(out[1])}, forward, frozen)
