"""IA3 layers: frozen dense or NF4 weight [N, K], outputs or inputs scaled by a trained vector.

`ia3_linear` scales the outputs, `ia3_linear_feedforward` the inputs. `ia3_linear_dl` has a frozen x: what is
left of the backward pass is the gradient of the scale.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import NF4Weight, functional

from . import baselines
from .case import OURS, Case, Family, Oracle, Prepared, Program, differentiated
from .cases_linear import weight_roundoffs
from .cases_nf4 import quantized_bytes, quantized_weight
from .machine import weight_copies
from .oracle import unit_roundoff

FEEDFORWARD, SCALE_ONLY = "ia3_linear_feedforward", "ia3_linear_dl"
_DEVIATIONS = 7  # by more, an element is off with probability 2 exp(-7^2 / 2) = 5e-11
IA3 = partial(Case, "ia3", weight="nf4", direction="both")
_DENSE = partial(Case, "ia3", weight="dense", direction="both")
_SMOKE, _QUICK = ("smoke",), ("quick", "full")

CASES = (
    IA3("ia3_linear", 3, 128, 64, suites=_SMOKE),
    IA3(FEEDFORWARD, 3, 128, 64, suites=_SMOKE),
    _DENSE(SCALE_ONLY, 3, 64, 64, direction="backward", suites=_SMOKE),
    IA3("ia3_linear", 512, 4096, 4096, suites=_QUICK),
    IA3(FEEDFORWARD, 512, 4096, 4096, suites=_QUICK),
    # The scale alone: no product in one, in the other one with few inputs
    _DENSE(SCALE_ONLY, 4096, 64, 4096, direction="backward", suites=_QUICK),
    _DENSE("ia3_linear", 4096, 64, 4096, direction="backward", suites=_QUICK),
    *(IA3(op, m, 4096, 4096) for op in ("ia3_linear", FEEDFORWARD) for m in (1, 64)),
    *(IA3(op, 512, 4096, 4096, dtype="bfloat16") for op in ("ia3_linear", FEEDFORWARD)),
    *(_DENSE(op, 512, 4096, 4096) for op in ("ia3_linear", FEEDFORWARD)),
)


@dataclass(frozen=True)
class Layer:
    """Tensors of a case: x [M, K], copies of the weight [N, K], l [N] or [K], dL/dy [M, N]."""

    case: Case
    x: Tensor
    weights: list[Any]
    vector: Tensor
    grad: Tensor

    def program(self, forward: Callable[[], Tensor], frozen: tuple[Tensor, ...], vector: Tensor) -> Program:
        """The program of this case's direction; `vector` is the contestant's own l."""
        leaves = {"dl": vector} if self.case.op == SCALE_ONLY else {"dx": self.x, "dl": vector}
        program = differentiated(self.case.direction, forward, leaves, self.grad, (*frozen, vector))

        def outputs(results: Any) -> dict[str, Tensor]:
            return {
                name: value.flatten() if name == "dl" else value
                for name, value in program.outputs(results).items()
            }

        return Program(program.call, outputs, program.forward, program.frozen)


def prepare(case: Case) -> Prepared:
    """Prepare any case of the three ops."""
    torch.manual_seed(0)
    layer = _layer(case)
    first = layer.weights[0]
    if isinstance(first, NF4Weight):
        dense = baselines.eager_dequantize(first.shape, *baselines.eager_operands(first))
    else:
        dense = first
    oracle = functools.cache(lambda: _oracle(layer, dense))
    read_bytes, write_bytes = _bytes(case)
    return Prepared(
        contestants={
            OURS: lambda: _ours(layer),
            "eager": lambda: _eager(layer, lambda function: function),
            "compile": lambda: _eager(layer, baselines.compiled),
            "peft": lambda: _peft(layer),
        },
        oracle=lambda contestant: oracle(),
        flops=_flops(case),
        read_bytes=read_bytes,
        write_bytes=write_bytes,
        copies=len(layer.weights),
    )


def _layer(case: Case) -> Layer:
    dtype, trained = case.torch_dtype, case.direction != "forward"
    if case.weight == "dense":
        first: Any = (torch.randn(case.n, case.k) / case.k**0.5).to(dtype)
    else:
        first = quantized_weight(case)
    # In a backward case every copy has a graph of its own, and what that saved is read too.
    saved = case.m * case.n * case.element_size if case.direction == "backward" else 0
    copies = weight_copies(_weight_bytes(case) + saved)
    vector = 1 + 0.2 * torch.randn(case.k if case.op == FEEDFORWARD else case.n)
    return Layer(
        case,
        x=torch.randn(case.m, case.k).to(dtype).requires_grad_(trained and case.op != SCALE_ONLY),
        weights=[first, *(copy.deepcopy(first) for _ in range(copies - 1))],
        vector=vector.to(dtype).requires_grad_(trained),
        grad=torch.randn(case.m, case.n).to(dtype),
    )


def _ours(layer: Layer) -> list[Program]:
    feedforward = layer.case.op == FEEDFORWARD
    function = partial(functional.ia3_linear, feedforward=feedforward)
    return [
        layer.program(partial(function, layer.x, weight, layer.vector), _tensors(weight), layer.vector)
        for weight in layer.weights
    ]


def _eager(layer: Layer, wrap: Callable[[Any], Any]) -> list[Program]:
    case = layer.case

    def base(x: Tensor, *operands: Tensor) -> Tensor:
        dense = case.weight == "dense"
        return F.linear(x, *operands) if dense else baselines.eager_nf4_linear(x, case.n, *operands)

    def forward(x: Tensor, vector: Tensor, *operands: Tensor) -> Tensor:
        if case.op == FEEDFORWARD:
            return base(x * vector, *operands)
        return base(x, *operands) * vector

    function = wrap(forward)
    programs = []
    for weight in layer.weights:
        operands = _tensors(weight)
        programs.append(
            layer.program(partial(function, layer.x, layer.vector, *operands), operands, layer.vector)
        )
    return programs


def _peft(layer: Layer) -> list[Program]:
    case = layer.case
    programs = []
    for weight in layer.weights:
        if isinstance(weight, NF4Weight):
            base: torch.nn.Module = baselines.bitsandbytes_module(weight, case.torch_dtype)
        else:
            base = baselines.dense_module(weight)
        module, own = baselines.peft_ia3_layer(base, case.op == FEEDFORWARD, layer.vector)
        # Over 4 bits PEFT returns float32 for a 16-bit x.
        forward = partial(lambda module, x: module(x).to(x.dtype), module, layer.x)
        programs.append(layer.program(forward, _tensors(weight), own))
    return programs


def _tensors(weight: Any) -> tuple[Tensor, ...]:
    return baselines.eager_operands(weight) if isinstance(weight, NF4Weight) else (weight,)


def _oracle(layer: Layer, weight: Tensor) -> Oracle:
    """Results in float64, and what rounding may do to them.

    The bound of `oracle.linear_oracle` with lambda = 1, n being the length of the long reduction and, for dl,
    of the one behind it. In 16 bits products lie between roundings of random signs: of the weight where bf16
    panels are planned, of z, and of an operand and the result of a dense product. They are as many more terms
    u_w |x_i w_i|, with lambda = 7; `weight_roundoffs` says where in NF4.
    """
    case = layer.case
    x, vector, grad = (tensor.detach().double() for tensor in (layer.x, layer.vector, layer.grad))
    names = {"forward": ("y",), "backward": ("dx", "dl"), "both": ("y", "dx", "dl")}[case.direction]
    names = ("dl",) if case.op == SCALE_ONLY else names

    def evaluate(x: Tensor, w: Tensor, vector: Tensor, grad: Tensor) -> dict[str, Tensor]:
        if case.op == FEEDFORWARD:
            through = grad @ w
            return {"y": (x * vector) @ w.T, "dx": through * vector, "dl": (x * through).sum(0)}
        z = x @ w.T
        dx = (grad * vector) @ w if "dx" in names else grad.new_empty(0)
        return {"y": z * vector, "dx": dx, "dl": (grad * z).sum(0)}

    w = weight.double()
    values = evaluate(x, w, vector, grad)
    sizes = evaluate(x.abs(), w.abs(), vector.abs(), grad.abs())
    squares = evaluate(*(tensor.square() for tensor in (x, w, vector, grad)))
    m, k, n = (math.sqrt(size) for size in (case.m, case.k, case.n))
    lengths = {"y": k, "dx": n, "dl": m + (n if case.op == FEEDFORWARD else k)}
    rounded, inner = unit_roundoff(case.torch_dtype), weight_roundoffs(case)
    of_product = {"y": inner.get("y", 0.0), "dx": inner.get("dx", 0.0)}
    of_product["dl"] = max(of_product.values()) if inner else 0.0
    if case.element_size == 2:
        of_product["dl"] += rounded  # of z
    return Oracle(
        {name: values[name] for name in names},
        {
            name: unit_roundoff(torch.float32) * lengths[name] * sizes[name]
            + rounded * values[name].abs()
            + _DEVIATIONS * of_product[name] * squares[name].sqrt()
            for name in names
        },
    )


def _weight_bytes(case: Case) -> int:
    return case.n * case.k * case.element_size if case.weight == "dense" else quantized_bytes(case)


def _flops(case: Case) -> int:
    """2MNK for each product."""
    product = 2 * case.m * case.n * case.k
    if case.op == SCALE_ONLY:
        return 2 * case.m * case.n
    return {"forward": product, "backward": product, "both": 2 * product}[case.direction]


def _bytes(case: Case) -> tuple[int, int]:
    """(read, written): weight, x, l and dL/dy once per pass that needs them, results once.

    z, which the gradient of l needs, is written in a forward that has a backward, and read in that.
    """
    size, weight = case.element_size, _weight_bytes(case)
    x, y, scales = (size * count for count in (case.m * case.k, case.m * case.n, case.n))
    if case.op == SCALE_ONLY:
        return 2 * y, scales  # dL/dy and z
    z = y
    if case.op == FEEDFORWARD:  # scales x, and reads that again
        scales, z = size * case.k, 0
    forward = (weight + x + scales, y)
    backward = (weight + y + (z or x) + scales, x + scales)
    both = (forward[0] + backward[0], forward[1] + z + backward[1])
    return {"forward": forward, "backward": backward, "both": both}[case.direction]


def _baselines(case: Case) -> tuple[str, ...]:
    return ("eager", "compile", "peft", "peft-tuned")


FAMILY = Family("ia3", CASES, _baselines, prepare)
