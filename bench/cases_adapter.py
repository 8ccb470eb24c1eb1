"""Bottleneck adapters: hidden [M, d] through relu in rank r and back to d, with the residual; K = N = d."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import functional
from peft_kernels.core.library import native_library

from . import baselines
from .case import OURS, Case, Direction, Family, Oracle, Prepared, Program, differentiated
from .oracle import unit_roundoff

SCALING = 4.0


def adapter(m: int, d: int, r: int, direction: Direction = "both", **options: Any) -> Case:
    """A case of M tokens, d features, rank r."""
    return Case("adapter", "bottleneck_adapter", m, d, d, r=r, direction=direction, **options)


_QUICK = ("quick", "full")
CASES = (
    adapter(5, 48, 6, suites=("smoke",)),
    adapter(512, 4096, 64, "forward", suites=_QUICK),
    adapter(512, 4096, 64, suites=_QUICK),
    adapter(512, 384, 24, suites=_QUICK),  # MiniLM
    *(adapter(m, 4096, 64, "forward") for m in (1, 64, 4096)),
    *(adapter(m, 4096, 64) for m in (1, 64, 4096)),
    adapter(512, 4096, 256),
    adapter(512, 384, 24, "forward"),
    adapter(512, 4096, 64, "forward", dtype="bfloat16"),
    adapter(512, 4096, 64, dtype="bfloat16"),
)

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]  # W_d [r, d], b_d [r], W_u [d, r], b_u [d]
_NAMES = ("ddown_weight", "ddown_bias", "dup_weight", "dup_bias")


def eager(x: Tensor, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor) -> Tensor:
    """The adapter as one writes it in PyTorch."""
    down = torch.relu(F.linear(x, down_weight, down_bias))
    return F.linear(down, up_weight, up_bias) * SCALING + x


def prepare(case: Case) -> Prepared:
    """Prepare any `bottleneck_adapter` case."""
    torch.manual_seed(0)
    m, d, r, dtype, trained = case.m, case.k, case.r, case.torch_dtype, case.direction != "forward"

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * size).to(dtype).requires_grad_(trained)

    x, grad = normal(m, d), normal(m, d).detach()
    parameters = (normal(r, d, size=d**-0.5), normal(r), normal(d, r, size=r**-0.5), normal(d))

    def programs(function: Callable[..., Tensor], own: Parameters = parameters) -> list[Program]:
        leaves = {"dx": x, **dict(zip(_NAMES, own, strict=True))}
        return [differentiated(case.direction, partial(function, x, *own), leaves, grad, own)]

    def ours(x: Tensor, *own: Tensor) -> Tensor:
        return functional.bottleneck_adapter(x, *own, activation="relu", scaling=SCALING, residual=x)

    def library() -> list[Program]:
        module, own = baselines.adapters_module(d, r, SCALING, parameters)
        return programs(lambda x, *_: module(x, x)[0], own)

    @functools.cache
    def oracle(rounded: bool) -> Oracle:
        return _oracle(case, x.detach(), tuple(p.detach() for p in parameters), grad, rounded)

    forward, backward = 4 * m * d * r, 8 * m * d * r
    flops = {"forward": forward, "backward": backward, "both": forward + backward}[case.direction]
    tokens, own_bytes = case.element_size * m * d, sum(p.nbytes for p in parameters)
    passes = {"forward": (1, 0), "backward": (0, 1), "both": (1, 1)}[case.direction]
    return Prepared(
        contestants={
            OURS: lambda: programs(ours),
            "eager": lambda: programs(eager),
            "compile": lambda: programs(baselines.compiled(eager)),
            "adapters": library,
        },
        oracle=lambda contestant: oracle(contestant != OURS or _rounds_operands(case)),
        flops=flops,
        read_bytes=passes[0] * (tokens + own_bytes) + passes[1] * (2 * tokens + own_bytes),
        write_bytes=passes[0] * tokens + passes[1] * (tokens + own_bytes),
    )


def _rounds_operands(case: Case) -> bool:
    """Whether ours rounds the operands of its products to the dtype of x."""
    if torch.get_default_device().type != "cpu":  # tensor cores take no other
        return case.element_size == 2
    return case.dtype == "bfloat16" and native_library().capability == "avx512_bf16"


def _oracle(case: Case, x: Tensor, parameters: tuple[Tensor, ...], grad: Tensor, rounded: bool) -> Oracle:
    """In float64, with the errors that each step passes on and adds.

    Sums of n terms add n roundings to float32; where `rounded`, every intermediate result is one of the data
    type, once for each operation. Where z is closer to 0 than its error, relu's slope may be either.
    """
    h, w_d, b_d, w_u, b_u, g = (t.double() for t in (x, *parameters, grad))
    m, (r, d) = case.m, w_d.shape
    u, step = unit_roundoff(torch.float32), unit_roundoff(case.torch_dtype) if rounded else 0.0

    def added(count: int, size: Tensor) -> Tensor:
        return (count * u + 2 * step) * size

    z = h @ w_d.T + b_d
    z_error = added(d + 2, h.abs() @ w_d.abs().T + b_d.abs())
    f, slope = z.relu(), (z > 0).double()
    f_size = f + z_error
    v = f @ w_u.T + b_u
    v_error = z_error @ w_u.abs().T + added(r + 2, f_size @ w_u.abs().T + b_u.abs())
    e, e_error = SCALING * g, added(1, SCALING * g.abs())
    df = e @ w_u
    df_error = e_error @ w_u.abs() + added(d + 2, e.abs() @ w_u.abs())
    dz = df * slope
    dz_error = df_error + torch.where(z.abs() <= z_error, df.abs(), 0.0)
    dz_size = dz.abs() + dz_error
    e_size = e.abs() + e_error
    values = {
        "y": SCALING * v + h,
        "dx": dz @ w_d + g,
        "ddown_weight": dz.T @ h,
        "ddown_bias": dz.sum(0),
        "dup_weight": e.T @ f,
        "dup_bias": e.sum(0),
    }
    errors = {
        "y": SCALING * v_error + added(2, SCALING * v.abs() + h.abs()),
        "dx": dz_error @ w_d.abs() + added(r + 2, dz_size @ w_d.abs() + g.abs()),
        "ddown_weight": dz_error.T @ h.abs() + added(m + 2, dz_size.T @ h.abs()),
        "ddown_bias": dz_error.sum(0) + added(m, dz_size.sum(0)),
        "dup_weight": e_error.T @ f_size + e.abs().T @ z_error + added(m + 2, e_size.T @ f_size),
        "dup_bias": e_error.sum(0) + added(m, e_size.sum(0)),
    }
    gradients = tuple(name for name in values if name != "y")
    wanted = {"forward": ("y",), "backward": gradients, "both": tuple(values)}[case.direction]
    last = unit_roundoff(case.torch_dtype)
    return Oracle(
        {name: values[name] for name in wanted},
        {name: errors[name] + last * (values[name].abs() + errors[name]) for name in wanted},
    )


FAMILY = Family("adapter", CASES, lambda _: ("eager", "compile", "adapters"), prepare)
