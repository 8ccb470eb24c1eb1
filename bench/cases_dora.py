"""DoRA: the norms alone, and the layer, in training (norms in each call) and in evaluation (norms kept)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import NF4Weight, functional
from peft_kernels.nn import DoRALinear, LoRALinear, NF4Linear

from . import baselines
from .case import OURS, OURS_LORA, Case, Family, Oracle, Prepared, Program, Unavailable, differentiated
from .cases_linear import (
    SCALING,
    Forward,
    Layer,
    linear_bytes,
    linear_flops,
    make_layer,
    weight_bytes,
    weight_roundoffs,
)
from .oracle import LinearTerms, keep_scale, linear_oracle, unit_roundoff

NORM = partial(Case, "dora", "dora_norm", 0, r=16)
DORA = partial(Case, "dora", "dora_linear", weight="nf4_double", direction="both")
_SMOKE, _QUICK = ("smoke",), ("quick", "full")

CASES = (
    NORM(128, 64, weight="dense", suites=_SMOKE),
    DORA(3, 128, 64, r=4, dropout=0.25, suites=_SMOKE),
    DORA(3, 128, 64, r=4, direction="forward", suites=_SMOKE),
    NORM(4096, 4096, weight="dense", suites=_QUICK),
    NORM(4096, 4096, weight="nf4_double", suites=_QUICK),
    DORA(64, 4096, 4096, r=16, suites=_QUICK),
    DORA(128, 384, 1536, r=8, dropout=0.05, suites=_QUICK),
    NORM(4096, 11008, weight="dense"),
    NORM(4096, 4096, weight="dense", dtype="bfloat16"),
    *(DORA(m, 4096, 4096, r=16) for m in (1, 512)),
    *(DORA(m, 4096, 4096, r=16, dropout=0.05) for m in (64, 512)),
    *(DORA(m, 4096, 4096, r=16, weight="dense") for m in (64, 512)),
    DORA(512, 4096, 4096, r=16, dtype="bfloat16"),
    *(DORA(m, 4096, 4096, r=16, direction="forward") for m in (1, 64)),
)


@dataclass(frozen=True)
class _DoRA:
    """A LoRA layer, and what DoRA has besides: the magnitude [N], and float64 norms for the oracle."""

    layer: Layer
    magnitude: Tensor
    norm: Tensor

    @property
    def adapter(self) -> tuple[Tensor, Tensor]:
        assert self.layer.lora_a is not None
        assert self.layer.lora_b is not None
        return self.layer.lora_a, self.layer.lora_b


def baselines_of(case: Case) -> tuple[str, ...]:
    """PEFT's layer; plain PyTorch with the norm in its expanded form, as fast as it goes; our LoRA layer."""
    if case.op == "dora_norm":
        return ("eager", "compile", "peft")
    variants = () if case.dropout else (OURS_LORA,)
    return ("eager", "compile", "peft", "peft-tuned", "dorafactors", *variants)


def prepare(case: Case) -> Prepared:
    """Prepare any `dora_norm` or `dora_linear` case."""
    torch.manual_seed(0)
    tokens = replace(case, m=max(case.m, 1))  # of a layer whose norms alone are wanted, too
    layer = make_layer(tokens)
    first = layer.weights[0]
    weight = (
        first
        if case.weight == "dense"
        else baselines.eager_dequantize(first.shape, *baselines.eager_operands(first))
    )
    assert layer.lora_a is not None
    assert layer.lora_b is not None
    update = SCALING * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
    norm = (weight.double() + update).norm(dim=1)
    magnitude = (norm * torch.linspace(0.8, 1.25, case.n)).to(case.torch_dtype)
    dora = _DoRA(layer, magnitude.requires_grad_(case.direction != "forward"), norm)
    return _prepare_norm(case, dora) if case.op == "dora_norm" else _prepare_linear(case, dora, weight)


def _prepare_norm(case: Case, dora: _DoRA) -> Prepared:
    a, b = (tensor.detach() for tensor in dora.adapter)
    weights = dora.layer.weights
    unit = 1e-6 if case.dtype == "float32" else unit_roundoff(case.torch_dtype)
    # PEFT forms W + scaling * B A, a sum of r products, and its norm in the dtype of the weight.
    theirs = 4 * (case.r + case.k**0.5) * unit_roundoff(case.torch_dtype)

    def ours() -> list[Program]:
        return [_named(partial(functional.dora_norm, weight, a, b, SCALING)) for weight in weights]

    def eager(wrap: Callable[[Any], Any]) -> list[Program]:
        wrapped = wrap(_expanded_norm)
        return [
            _named(partial(wrapped, _dense(weight), _squares(_dense(weight)), a, b)) for weight in weights
        ]

    def peft() -> list[Program]:
        return [_named(partial(_peft_norm, _base_module(case, weight), a, b)) for weight in weights]

    def oracle(contestant: str) -> Oracle | None:
        return Oracle({"norm": dora.norm}, {"norm": (unit if contestant == OURS else theirs) * dora.norm})

    return Prepared(
        contestants={
            OURS: ours,
            "eager": lambda: eager(lambda function: function),
            "compile": lambda: eager(baselines.compiled),
            "peft": peft,
        },
        oracle=oracle,
        flops=2 * case.n * case.k * (case.r + 1),
        read_bytes=weight_bytes(case) + case.element_size * case.r * (case.k + case.n),
        write_bytes=4 * case.n,
        copies=len(weights),
    )


def _named(call: Callable[[], Tensor]) -> Program:
    return Program(call, lambda norm: {"norm": norm.float()})


def _dense(weight: Any) -> Tensor:
    """A quantised weight, dequantised: plain PyTorch has nothing better than to keep it."""
    if isinstance(weight, NF4Weight):
        return baselines.eager_dequantize(weight.shape, *baselines.eager_operands(weight))
    assert isinstance(weight, Tensor)
    return weight


def _squares(weight: Tensor) -> Tensor:
    """||W||^2 by rows, which plain PyTorch may keep, as W is frozen."""
    return weight.float().square().sum(1)


def _expanded_norm(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sqrt(||W||^2 + 2 s <W, B A> + s^2 ||B A||^2) by rows: no N x K matrix is made."""
    cross = ((weight @ a.t()).float() * b).sum(1)
    own = ((b @ (a @ a.t())).float() * b).sum(1)
    return (squares + 2 * SCALING * cross + SCALING**2 * own).clamp_min(0).sqrt()


def _peft_norm(base: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """As PEFT's DoraLinearLayer.forward computes it, by PEFT's own methods."""
    dora = baselines.require("peft.tuners.lora.dora").DoraLinearLayer(fan_in_fan_out=False)
    dequantize: Callable[[nn.Module], Tensor] = baselines.require(
        "peft.utils.integrations"
    ).dequantize_module_weight
    linear_a, linear_b = baselines.dense_module(a), baselines.dense_module(b)
    with torch.no_grad():
        update = dora.get_lora_weight(linear_a, linear_b)
        norm: Tensor = dora.get_weight_norm(dequantize(base), update, SCALING)
    return norm


def _base_module(case: Case, weight: Any) -> nn.Linear:
    if isinstance(weight, NF4Weight):
        module: nn.Linear = baselines.bitsandbytes_module(weight, case.torch_dtype)
        return module
    return baselines.dense_module(weight)


def _prepare_linear(case: Case, dora: _DoRA, weight: Tensor) -> Prepared:
    layer = dora.layer

    def oracle(contestant: str) -> Oracle | None:
        if case.dropout and contestant == "compile":
            return None  # inductor draws masks from a generator of its own
        return _oracle(
            case, dora, weight, keep_scale(case, OURS if contestant == OURS else "torch"), contestant
        )

    read_bytes, write_bytes = linear_bytes(case)
    saved = (
        case.element_size * case.m * case.n if case.direction == "both" else 0
    )  # z, written and read again
    return Prepared(
        contestants={
            OURS: lambda: _ours(dora) if case.direction == "both" else _modules(dora, DoRALinear),
            "eager": lambda: _eager(dora, lambda function: function),
            "compile": lambda: _eager(dora, baselines.compiled),
            "peft": lambda: _peft(dora, fused=False),
            "dorafactors": lambda: _peft(dora, fused=True),
            OURS_LORA: lambda: _lora(dora) if case.direction == "both" else _modules(dora, LoRALinear),
        },
        oracle=oracle,
        flops=linear_flops(case) + (2 * case.n * case.k * case.r if case.direction == "both" else 0),
        read_bytes=read_bytes + saved,
        write_bytes=write_bytes + saved,
        copies=len(layer.weights),
    )


def _oracle(case: Case, dora: _DoRA, weight: Tensor, keep: Tensor | None, contestant: str) -> Oracle:
    layer, (a, b) = dora.layer, (tensor.detach() for tensor in dora.adapter)
    terms = LinearTerms(layer.x.detach(), weight, a, b, SCALING, layer.grad)
    if contestant == OURS_LORA:
        return linear_oracle(case, terms, None, weight_roundoffs(case))
    factors = torch.ones((), dtype=torch.float64) if keep is None else keep
    g = dora.magnitude.detach().double() / dora.norm
    values = _evaluate(terms, factors, 1 - factors, g, dora.norm)
    sizes = _evaluate(terms.magnitudes(), factors, (1 - factors).abs(), g, dora.norm)
    m, k, n, r = (size**0.5 for size in (case.m, case.k, case.n, case.r))
    lengths = {"y": k + r, "dx": n + r, "dlora_a": n + m, "dlora_b": k + m, "dmagnitude": k + r + m}
    # Rounded to the dtype of x besides the result: z, and with dropout D(x), x - D(x) and both products; a
    # 16-bit weight in bf16 panels, or the operands and the result of a 16-bit GEMM. The norm is good to 1e-6.
    kept = (
        8 * unit_roundoff(case.torch_dtype) if case.dtype != "float32" else 4 * unit_roundoff(torch.float32)
    )
    tolerances = {
        name: (unit_roundoff(torch.float32) * lengths[name] + kept + 1e-6) * sizes[name]
        + unit_roundoff(case.torch_dtype) * value.abs()
        for name, value in values.items()
    }
    names = ("y",) if case.direction == "forward" else tuple(values)
    return Oracle({name: values[name] for name in names}, {name: tolerances[name] for name in names})


def _evaluate(terms: LinearTerms, kept: Tensor, rest: Tensor, g: Tensor, norm: Tensor) -> dict[str, Tensor]:
    """y = g * z + (x * rest) W^T with z = (x * kept) (W + s B A)^T, and its gradients, in float64."""
    grad = terms.grad.double()
    through = replace(terms, x=terms.x.double() * kept, grad=grad * g)
    results = through.evaluate(None, forward=True, backward=True)
    results["dmagnitude"] = (grad * results["y"]).sum(0) / norm
    results["y"] = results["y"] * g
    results["dx"] = results["dx"] * kept
    if rest.dim():
        beside = replace(terms, x=terms.x.double() * rest, lora_a=None, lora_b=None)
        base = beside.evaluate(None, forward=True, backward=True)
        results["y"] += base["y"]
        results["dx"] += base["dx"] * rest
    return results


def _ours(dora: _DoRA) -> list[Program]:
    layer, p = dora.layer, dora.layer.case.dropout
    forwards = [
        partial(functional.dora_linear, layer.x, weight, *dora.adapter, dora.magnitude, SCALING, dropout_p=p)
        for weight in layer.weights
    ]
    return _programs(dora, forwards)


def _programs(dora: _DoRA, forwards: Sequence[Forward], leaves: Any = None) -> list[Program]:
    layer = dora.layer
    frozen = [tensor for weight in layer.weights for tensor in _tensors(weight)]
    leaves = leaves or {**layer.leaves, "dmagnitude": dora.magnitude}
    return layer.programs(list(forwards), [*frozen, dora.magnitude], leaves)


def _tensors(weight: Any) -> tuple[Tensor, ...]:
    return baselines.eager_operands(weight) if isinstance(weight, NF4Weight) else (weight,)


def _modules(dora: _DoRA, kind: type[LoRALinear]) -> list[Program]:
    """Our layers in evaluation mode."""
    case, programs = dora.layer.case, []
    for weight in copy.deepcopy(dora.layer.weights):  # ours and our LoRA must not find each other's in cache
        nf4 = isinstance(weight, NF4Weight)
        base = NF4Linear.from_weight(weight) if nf4 else baselines.dense_module(weight)
        module = kind.from_linear(base, r=case.r, lora_alpha=SCALING * case.r).eval()
        with torch.no_grad():
            for parameter, value in zip(module.adapter, dora.adapter, strict=True):
                parameter.copy_(value)
            if isinstance(module, DoRALinear):
                module.magnitude.copy_(dora.magnitude)
            module(dora.layer.x)  # a DoRA layer keeps its norms from here on
        programs.append(differentiated(case.direction, partial(module, dora.layer.x), {}, dora.layer.grad))
    return programs


def _lora(dora: _DoRA) -> list[Program]:
    """LoRA on copies of the weights: ours must not find them in cache after it."""
    layer, (a, b) = replace(dora.layer, weights=copy.deepcopy(dora.layer.weights)), dora.adapter
    forwards = [
        partial(functional.adapted_linear, layer.x, weight, lora_a=a, lora_b=b, scaling=SCALING)
        for weight in layer.weights
    ]
    return _programs(replace(dora, layer=layer), forwards, layer.leaves)


def _eager(dora: _DoRA, wrap: Callable[[Any], Any]) -> list[Program]:
    """DoRA written by hand for speed: expanded norm, kept ||W||^2, one product where nothing is dropped."""
    layer, p, (a, b) = dora.layer, dora.layer.case.dropout, dora.adapter

    def forward(x: Tensor, squares: Tensor, *operands: Tensor) -> Tensor:
        if len(operands) > 1:
            weight = baselines.eager_dequantize((b.shape[0], x.shape[1]), *operands).to(x.dtype)
        else:
            (weight,) = operands

        def product(t: Tensor) -> Tensor:
            if len(operands) > 1:
                return baselines.eager_nf4_linear(t, b.shape[0], *operands)
            return F.linear(t, weight)

        with torch.no_grad():
            norm = _expanded_norm(weight, squares, a, b)
        g, dropped = (dora.magnitude / norm).to(x.dtype), F.dropout(x, p)
        low = SCALING * F.linear(F.linear(dropped, a), b)
        return product(x) + (g - 1) * product(dropped) + g * low if p else g * (product(x) + low)

    wrapped = wrap(forward)
    forwards = [
        partial(wrapped, layer.x, _squares(_dense(weight)), *_tensors(weight)) for weight in layer.weights
    ]
    return _programs(dora, forwards)


def _peft(dora: _DoRA, fused: bool) -> list[Program]:
    """PEFT's layer; `fused`: that of dorafactors, which is installed in PEFT's place."""
    if fused and not baselines.has_dorafactors():
        raise Unavailable("dorafactors is not installed")
    if not fused and baselines.has_dorafactors():
        raise Unavailable("the installed PEFT is that of dorafactors")
    layer, case = dora.layer, dora.layer.case
    programs = []
    for weight in layer.weights:
        module, own_a, own_b = baselines.peft_layer(
            _base_module(case, weight), case.r, SCALING, case.dropout, *dora.adapter, use_dora=True
        )
        vector: Any = module.lora_magnitude_vector
        magnitude = vector["default"].weight = nn.Parameter(dora.magnitude.detach().clone())
        leaves = {"dx": layer.x, "dlora_a": own_a, "dlora_b": own_b, "dmagnitude": magnitude}
        programs += _programs(dora, [partial(module, layer.x)], leaves)
    return programs


FAMILY = Family("dora", CASES, baselines_of, prepare)
