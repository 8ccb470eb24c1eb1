"""Linear layers: frozen dense or NF4 weight [N, K], with or without LoRA of rank r; forward and gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import NF4Weight, functional
from peft_kernels.core.library import native_library
from peft_kernels.core.plan import Product, method

from . import baselines
from .case import NO_DROPOUT, OURS, PLAIN_SCALES, Case, Family, Oracle, Prepared, Program, differentiated
from .cases_nf4 import BLOCKSIZE, quantized_bytes, quantized_weight
from .machine import weight_copies
from .oracle import LinearTerms, keep_scale, linear_oracle, unit_roundoff

SCALING = 2.0
NF4 = partial(Case, "linear", "nf4_linear", weight="nf4")
QLORA = partial(Case, "linear", "nf4_lora_linear", weight="nf4_double", direction="both")
LORA = partial(Case, "linear", "lora_linear", weight="dense", direction="both")
_SMOKE, _QUICK = ("smoke",), ("quick", "full")

CASES = (
    NF4(3, 128, 64, suites=_SMOKE),
    QLORA(3, 128, 64, r=4, dropout=0.25, suites=_SMOKE),
    # A 4096 x 4096 projection, from one token to a small batch
    NF4(1, 4096, 4096, suites=_QUICK),
    NF4(16, 4096, 4096, suites=_QUICK),
    NF4(64, 4096, 4096, suites=_QUICK),
    NF4(1, 4096, 4096, direction="backward", suites=_QUICK),
    NF4(64, 4096, 4096, direction="backward", suites=_QUICK),
    QLORA(64, 4096, 4096, r=16, dropout=0.05, suites=_QUICK),
    # MiniLM: attention and feed-forward
    NF4(64, 384, 384, suites=_QUICK),
    NF4(64, 384, 1536, suites=_QUICK),
    QLORA(128, 384, 384, r=8, suites=_QUICK),
    *(QLORA(128, 384, 1536, r=r, dropout=0.05, suites=_QUICK) for r in (8, 64)),
    LORA(128, 384, 1536, r=8, suites=_QUICK),
    # The rest of the grid
    NF4(256, 4096, 4096),
    NF4(512, 4096, 4096, direction="backward"),
    *(NF4(m, 4096, 11008) for m in (1, 16, 64, 256)),
    *(NF4(m, 11008, 4096) for m in (1, 16, 64, 256)),
    *(NF4(m, 4096, 4096, dtype="bfloat16") for m in (1, 16, 64, 256)),
    *(NF4(m, 4096, 4096, dtype="bfloat16", direction="backward") for m in (1, 64, 512)),
    QLORA(1, 4096, 4096, r=16),
    QLORA(1, 4096, 4096, r=16, dropout=0.05),
    *(QLORA(64, 4096, 4096, r=r) for r in (4, 16, 64)),
    QLORA(512, 4096, 4096, r=16),
    QLORA(512, 4096, 4096, r=16, dropout=0.05),
    QLORA(64, 4096, 4096, r=16, dtype="bfloat16"),
    *(LORA(m, 4096, 4096, r=16) for m in (1, 64, 512)),
    LORA(64, 4096, 4096, r=16, dropout=0.05),
)

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Layer:
    """Tensors of a case: x [M, K], copies of the weight [N, K], A [r, K], B [N, r] (if r), dL/dy [M, N]."""

    case: Case
    x: Tensor
    weights: list[Any]
    lora_a: Tensor | None
    lora_b: Tensor | None
    grad: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Result name -> input it is the gradient of."""
        leaves = {"dx": self.x}
        if self.lora_a is not None and self.lora_b is not None:
            leaves |= {"dlora_a": self.lora_a, "dlora_b": self.lora_b}
        return leaves

    def programs(self, forwards: list[Forward], frozen: list[Tensor], leaves: Any = None) -> list[Program]:
        """Programs of this case's direction; `leaves` where a contestant has parameters of its own."""
        constant = (*frozen, *(t for t in (self.lora_a, self.lora_b) if t is not None))
        return [
            differentiated(self.case.direction, forward, leaves or self.leaves, self.grad, constant)
            for forward in forwards
        ]


def baselines_of(case: Case) -> tuple[str, ...]:
    """PEFT is bitsandbytes' layer plus LoRA; a dense weight has no dequantised one to compare with."""
    variants = [NO_DROPOUT] if case.dropout else []
    if case.weight == "dense":
        return ("eager", "compile", "peft", "peft-tuned", *variants)
    variants += [PLAIN_SCALES] if case.weight == "nf4_double" else []
    if case.r:
        # unsloth computes gradients and no dropout, of doubly quantised weights
        unsloth = case.weight == "nf4_double" and case.direction == "both" and not case.dropout
        return (
            *("eager", "compile", "peft", "peft-tuned", "dense", *variants),
            *(("unsloth",) if unsloth else ()),
        )
    repacked = ("bitsandbytes-repacked",) if case.direction == "forward" else ()
    return ("eager", "compile", "bitsandbytes", "bitsandbytes-tuned", *repacked, "dense", *variants)


def prepare(case: Case) -> Prepared:
    """Prepare any `nf4_linear`, `nf4_lora_linear` or `lora_linear` case."""
    torch.manual_seed(0)
    layer = make_layer(case)
    quantized = case.weight != "dense"
    first = layer.weights[0]
    dense = baselines.eager_dequantize(first.shape, *baselines.eager_operands(first)) if quantized else first

    a, b = (None if tensor is None else tensor.detach() for tensor in (layer.lora_a, layer.lora_b))
    terms = LinearTerms(layer.x.detach(), dense, a, b, SCALING, layer.grad)

    @functools.cache
    def expected(mask_of: str | None) -> Oracle:
        mask = None if mask_of is None else keep_scale(case, mask_of)
        return linear_oracle(case, terms, mask, weight_roundoffs(case))

    def oracle(contestant: str) -> Oracle | None:
        if case.dropout and contestant == "compile":
            return None  # inductor draws masks from a generator of its own
        if not case.dropout or contestant == NO_DROPOUT:
            return expected(None)
        return expected(OURS if contestant in (OURS, PLAIN_SCALES) else "torch")

    read_bytes, write_bytes = linear_bytes(case)
    return Prepared(
        contestants={
            OURS: lambda: _ours(layer),
            "eager": lambda: _eager(layer, lambda function: function),
            "compile": lambda: _eager(layer, baselines.compiled),
            "bitsandbytes": lambda: _bitsandbytes(layer),
            "bitsandbytes-repacked": lambda: _repacked(layer),
            "peft": lambda: _peft(layer),
            "unsloth": lambda: _unsloth(layer),
            "dense": lambda: _dense(layer, dense.to(case.torch_dtype)),
            NO_DROPOUT: lambda: _ours(_without_dropout(layer)),
            PLAIN_SCALES: lambda: _ours(_with_plain_scales(layer)),
        },
        oracle=oracle,
        flops=linear_flops(case),
        read_bytes=read_bytes,
        write_bytes=write_bytes,
        copies=len(layer.weights),
    )


def weight_roundoffs(case: Case) -> dict[str, float]:
    """Result -> unit roundoff of the type to which ours rounds the decoded weight before the product."""
    if case.weight == "dense":
        return {}
    if torch.get_default_device().type != "cpu":  # tensor cores take operands of the dtype of x
        rounded = unit_roundoff(case.torch_dtype)
        return {} if case.dtype == "float32" else {"y": rounded, "dx": rounded}
    if not native_library().loaded:
        return {}
    product = Product(case.k, BLOCKSIZE, case.torch_dtype, torch.device("cpu"))
    methods = {"y": method(product, case.m), "dx": method(product, case.m, backward=True)}
    return {name: unit_roundoff(torch.bfloat16) for name, how in methods.items() if how == "bf16 panels"}


def make_layer(case: Case) -> Layer:
    """Random tensors of a case, with copies of the weight that are too many for the cache."""
    dtype, trained = case.torch_dtype, case.direction != "forward"
    if case.weight == "dense":
        first: Any = (torch.randn(case.n, case.k) / case.k**0.5).to(dtype)
    else:
        first = quantized_weight(case)
    copies = weight_copies(weight_bytes(case))
    return Layer(
        case,
        x=torch.randn(case.m, case.k).to(dtype).requires_grad_(trained),
        weights=[first, *(copy.deepcopy(first) for _ in range(copies - 1))],
        lora_a=(torch.randn(case.r, case.k) / case.k**0.5).to(dtype).requires_grad_(trained)
        if case.r
        else None,
        lora_b=(torch.randn(case.n, case.r) / case.r**0.5).to(dtype).requires_grad_(trained)
        if case.r
        else None,
        grad=torch.randn(case.m, case.n).to(dtype),
    )


def _ours(layer: Layer) -> list[Program]:
    case, x, a, b = layer.case, layer.x, layer.lora_a, layer.lora_b
    if a is None or b is None:
        forwards: list[Forward] = [partial(functional.nf4_linear, x, weight) for weight in layer.weights]
    else:
        function: Callable[..., Tensor] = (
            functional.lora_linear if case.weight == "dense" else functional.nf4_lora_linear
        )
        forwards = [
            partial(function, x, weight, a, b, SCALING, dropout_p=case.dropout) for weight in layer.weights
        ]
    return layer.programs(forwards, _weight_tensors(layer.weights))


def _without_dropout(layer: Layer) -> Layer:
    """The same layer without dropout, on weights of its own: ours must not find them in cache after it."""
    return replace(layer, case=replace(layer.case, dropout=0.0), weights=copy.deepcopy(layer.weights))


def _with_plain_scales(layer: Layer) -> Layer:
    """The same layer, value by value, without double quantisation: its scales decoded to float32."""

    def decoded(weight: NF4Weight) -> NF4Weight:
        _, _, *absmax = baselines.eager_operands(weight)
        return replace(weight, absmax=baselines.eager_absmax(*absmax), nested=None)

    return replace(layer, weights=[decoded(weight) for weight in copy.deepcopy(layer.weights)])


def _weight_tensors(weights: list[Any]) -> list[Tensor]:
    if isinstance(weights[0], Tensor):
        return list(weights)
    return [tensor for weight in weights for tensor in baselines.eager_operands(weight)]


def _with_lora(
    layer: Layer, base: Callable[..., Tensor], wrap: Callable[[Any], Any]
) -> Callable[..., Tensor]:
    """Base layer plus the low-rank part in plain PyTorch, through `wrap` (torch.compile or nothing)."""
    case, a, b = layer.case, layer.lora_a, layer.lora_b

    def forward(x: Tensor, *operands: Tensor) -> Tensor:
        y = base(x, *operands)
        return y if a is None or b is None else baselines.eager_lora(y, x, a, b, SCALING, case.dropout)

    wrapped: Callable[..., Tensor] = wrap(forward)
    return wrapped


def _eager(layer: Layer, wrap: Callable[[Any], Any]) -> list[Program]:
    if layer.case.weight == "dense":
        return _plain(layer, layer.weights, wrap)
    operands = [baselines.eager_operands(weight) for weight in layer.weights]
    function = _with_lora(layer, lambda x, *ops: baselines.eager_nf4_linear(x, layer.case.n, *ops), wrap)
    forwards: list[Forward] = [partial(function, layer.x, *ops) for ops in operands]
    return layer.programs(forwards, [tensor for ops in operands for tensor in ops])


def _plain(layer: Layer, weights: list[Tensor], wrap: Callable[[Any], Any]) -> list[Program]:
    function = _with_lora(layer, F.linear, wrap)
    return layer.programs([partial(function, layer.x, weight) for weight in weights], weights)


def _dense(layer: Layer, dense: Tensor) -> list[Program]:
    copies = weight_copies(dense.nbytes)
    return _plain(layer, [dense, *(dense.clone() for _ in range(copies - 1))], lambda function: function)


def _bitsandbytes(layer: Layer) -> list[Program]:
    linears = [baselines.bitsandbytes_linear(weight) for weight in layer.weights]
    return layer.programs([partial(linear, layer.x) for linear in linears], _weight_tensors(layer.weights))


def _repacked(layer: Layer) -> list[Program]:
    modules = [baselines.bitsandbytes_repacked(weight, layer.x) for weight in layer.weights]
    return layer.programs([partial(module, layer.x) for module in modules], [])


def _peft(layer: Layer) -> list[Program]:
    case, a, b = layer.case, layer.lora_a, layer.lora_b
    assert a is not None
    assert b is not None
    programs = []
    for weight in layer.weights:
        if isinstance(weight, NF4Weight):
            base: torch.nn.Module = baselines.bitsandbytes_module(weight, case.torch_dtype)
        else:
            base = baselines.dense_module(weight)
        module, own_a, own_b = baselines.peft_layer(base, case.r, SCALING, case.dropout, a, b)
        leaves = {"dx": layer.x, "dlora_a": own_a, "dlora_b": own_b}
        frozen = [*_weight_tensors([weight]), own_a, own_b]
        programs += layer.programs([partial(module, layer.x)], frozen, leaves)
    return programs


def _unsloth(layer: Layer) -> list[Program]:
    assert layer.lora_a is not None
    assert layer.lora_b is not None
    programs = []
    for weight in layer.weights:
        forward = baselines.unsloth_linear(weight, layer.lora_a, layer.lora_b, SCALING)
        programs += layer.programs([partial(forward, layer.x)], _weight_tensors([weight]))
    return programs


def weight_bytes(case: Case) -> int:
    """Of one copy of the weight."""
    return case.n * case.k * case.element_size if case.weight == "dense" else quantized_bytes(case)


def linear_flops(case: Case) -> int:
    """2MNK for a base product, 2Mr(K+N) for the low-rank part, twice that for its gradients."""
    base, low_rank = 2 * case.m * case.n * case.k, 2 * case.m * case.r * (case.k + case.n)
    forward, backward = base + low_rank, base + 2 * low_rank
    return {"forward": forward, "backward": backward, "both": forward + backward}[case.direction]


def linear_bytes(case: Case) -> tuple[int, int]:
    """(read, written): weight, adapters, x and dL/dy once per pass that needs them; y and gradients once."""
    x, y, adapters = case.m * case.k, case.m * case.n, case.r * (case.k + case.n)
    weight, size = weight_bytes(case), case.element_size
    forward = (weight + size * (x + adapters), size * y)
    backward = (weight + size * (y + adapters + (x if case.r else 0)), size * (x + adapters))
    both = (forward[0] + backward[0], forward[1] + backward[1])
    return {"forward": forward, "backward": backward, "both": both}[case.direction]


FAMILY = Family("linear", CASES, baselines_of, prepare)
