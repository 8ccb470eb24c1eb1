"""Dropout whose mask is recomputed, against PyTorch's, which stores it; x [M, K]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import functional

from . import baselines
from .case import OURS, Case, Family, Oracle, Prepared, Program, differentiated
from .oracle import keep_scale, unit_roundoff

DROPOUT = partial(Case, "dropout", "philox_dropout", n=0)

CASES = (
    DROPOUT(m=4, k=64, direction="both", dropout=0.25, suites=("smoke",)),
    DROPOUT(m=512, k=4096, direction="both", dropout=0.05, suites=("quick", "full")),
    DROPOUT(m=512, k=4096, direction="forward", dropout=0.05),
    DROPOUT(m=512, k=4096, direction="both", dropout=0.05, dtype="bfloat16"),
)


def prepare(case: Case) -> Prepared:
    """Prepare any `philox_dropout` case."""
    torch.manual_seed(0)
    x = torch.randn(case.m, case.k).to(case.torch_dtype).requires_grad_(case.direction != "forward")
    grad = torch.randn(case.m, case.k).to(case.torch_dtype)

    def programs(function: Callable[[Tensor, float], Tensor]) -> list[Program]:
        return [differentiated(case.direction, partial(function, x, case.dropout), {"dx": x}, grad)]

    def oracle(contestant: str) -> Oracle | None:
        if contestant == "compile":
            return None  # inductor draws masks from a generator of its own
        factors = keep_scale(case, contestant)
        assert factors is not None
        values = {"y": x.detach().double() * factors, "dx": grad.double() * factors}
        wanted = {"forward": ("y",), "backward": ("dx",), "both": ("y", "dx")}[case.direction]
        # Rounded to float32, then to the data type. PyTorch rounds 1 / (1 - p) to the data type as well.
        rounded = unit_roundoff(torch.float32) + unit_roundoff(case.torch_dtype)
        return Oracle(
            {name: values[name] for name in wanted}, {name: rounded * values[name].abs() for name in wanted}
        )

    passes = 2 if case.direction == "both" else 1
    moved = passes * case.m * case.k * case.element_size
    return Prepared(
        contestants={
            OURS: lambda: programs(functional.philox_dropout),
            "eager": lambda: programs(F.dropout),
            "compile": lambda: programs(baselines.compiled(F.dropout)),
        },
        oracle=oracle,
        flops=0,
        read_bytes=moved,
        write_bytes=moved,
    )


FAMILY = Family("dropout", CASES, lambda _: ("eager", "compile"), prepare)
