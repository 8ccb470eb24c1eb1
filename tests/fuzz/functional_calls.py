"""Every function of `peft_kernels.functional`."""

import functools
from typing import Any

import torch
from hypothesis import strategies as st

import peft_kernels as pk

from . import properties
from .calls import Arguments, Entry, in_float64
from .odd import Draw
from .problems import FLOAT_DTYPES, Maker

F = pk.functional
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def linear_arguments(draw: Draw) -> Arguments:
    make = Maker(draw)
    lora = make.lora() if make.maybe() else {"lora_a": None, "lora_b": None}
    with_lora = lora["lora_a"] is not None
    return {
        "x": make.x(),
        "weight": make.weight(),
        **lora,
        "scaling": make.scaling() if with_lora else 1.0,
        "column_scale": make.optional(make.n),
        "input_scale": make.optional(make.k),
        "bias": make.optional(make.n),
        **(make.dropout() if with_lora else {"dropout_p": 0.0, "seed": None}),
    }


def lora_arguments(draw: Draw, nf4: bool) -> Arguments:
    make = Maker(draw)
    weight = {"w": make.nf4()} if nf4 else {"weight": make.normal(make.n, make.k, dtype=make.dtype)}
    scaling, bias = make.scaling(), make.optional(make.n)
    return {"x": make.x(), **weight, **make.lora(), "scaling": scaling, "bias": bias, **make.dropout()}


def nf4_linear_arguments(draw: Draw) -> Arguments:
    make = Maker(draw)
    return {"x": make.x(), "w": make.nf4(), "bias": make.optional(make.n), "activation": None}


def int8_arguments(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    return {"x": make.x(), "w": make.nf4(), "bias": make.optional(make.n)}


def ia3_arguments(draw: Draw) -> Arguments:
    make = Maker(draw)
    feedforward = make.maybe()
    size = make.k if feedforward else make.n
    shape = make.pick(((size,), (1, size) if feedforward else (size, 1)))
    vector = {"ia3_l": make.normal(*shape), "bias": make.optional(make.n), "feedforward": feedforward}
    return {"x": make.x(), "weight": make.weight(), **vector}


def dora_arguments(draw: Draw) -> Arguments:
    make = Maker(draw)
    return {
        "x": make.x(),
        "weight": make.weight(),
        **make.lora(),
        "magnitude": make.normal(make.n),
        "scaling": make.scaling(),
        "bias": make.optional(make.n),
        **make.dropout(),
        "norm": make.normal(make.n).abs() + 0.5 if make.maybe() else None,
    }


def dora_norm_arguments(draw: Draw) -> Arguments:
    make = Maker(draw)
    dtype = make.pick((None, *FLOAT_DTYPES))
    return {"weight": make.weight(), **make.lora(), "scaling": make.scaling(), "dtype": dtype}


def adapter_arguments(draw: Draw) -> Arguments:
    make = Maker(draw)
    hidden = make.x()
    n = make.pick((make.n, make.k))
    norms = {"ln_before": make.k, "ln_after": n}
    return {
        "hidden": hidden,
        "down_weight": make.normal(make.r, make.k),
        "down_bias": make.optional(make.r),
        "up_weight": make.normal(n, make.r),
        "up_bias": make.optional(n),
        "activation": make.pick(
            ("relu", "gelu", "gelu_new", "silu", "tanh", "leaky_relu", "identity", torch.sin)
        ),
        "scaling": make.pick((1.0, -2.0, make.normal(1), make.normal(n), make.normal())),
        "residual": make.pick((None, make.normal(*hidden.shape[:-1], n), hidden if n == make.k else None)),
        **{name: make.pick((None, None, None, _norm(make, size))) for name, size in norms.items()},
        "adapter_residual_before_ln": make.maybe(),
        **make.dropout(),
        "gate": make.pick((None, make.normal(*hidden.shape[:-1], 1), make.normal(*([1] * hidden.dim())))),
    }


def _norm(make: Maker, size: int) -> Any:
    wide = torch.promote_types(make.dtype, torch.float32)
    return make.optional(size, dtype=wide), make.optional(size, dtype=wide), make.pick((1e-5, 1e-12))


def dropout_arguments(draw: Draw) -> Arguments:
    make = Maker(draw)
    return {"x": make.x(), "p": make.pick((0.0, 0.1, 0.9999)), "seed": make.pick((0, -3, torch.tensor(5)))}


def mask_arguments(draw: Draw) -> Arguments:
    make = Maker(draw)
    return {
        "shape": tuple(make.x().shape),
        "p": make.pick((0.0, 0.3)),
        "seed": make.pick((0, torch.tensor(5))),
    }


def quantize_arguments(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    return {"weight": make.x(), "blocksize": make.pick((32, 64, 4096)), "double_quant": make.maybe()}


def dequantize_arguments(draw: Draw) -> Arguments:
    make = Maker(draw)
    return {"w": make.nf4(), "dtype": make.pick((None, *HALF_AND_SINGLE))}


def roundings(a: Arguments) -> int:
    """Of a term of y: K or d, r, and the factors and the norm on the way."""
    lora_a = a.get("lora_a", a.get("down_weight"))
    rank = 0 if lora_a is None else lora_a.shape[0]
    return int(a["hidden" if "hidden" in a else "x"].shape[-1] + rank + 48)


def polynomial(function: Any) -> Any:
    """Of a polynomial in its arguments: the sum of magnitudes is its value for magnitudes."""

    def formula(a: Arguments) -> Any:
        return function(**a)

    return lambda arguments: (formula, formula)


def linear(x: Any, weight: Any = None, w: Any = None, activation: None = None, **rest: Any) -> torch.Tensor:
    """Any of the linear layers."""
    return F.adapted_linear(x, w if weight is None else weight, **rest)


def dora(original: Arguments) -> Any:
    """`dora_linear` with its norm, the constant of its gradient, and as sums of magnitudes."""
    norm = original["norm"]
    if norm is None:
        names = ("weight", "lora_a", "lora_b", "scaling")
        norm = F.dora_norm(**{name: in_float64(original)[name] for name in names})
    norm = norm.detach().double()

    def formula(a: Arguments) -> Any:
        return F.dora_linear(**{**a, "norm": norm})

    def magnitude(a: Arguments) -> Any:
        """The layer of D(x), and (x - D(x)) W^T."""
        a = {name: value for name, value in a.items() if name != "norm"}
        x, weight, p, seed = (a.pop(name) for name in ("x", "weight", "dropout_p", "seed"))
        scale = a.pop("magnitude") / norm.abs().masked_fill(norm == 0, torch.inf)
        dropped = F.philox_dropout(x, p, seed)
        return F.adapted_linear(dropped, weight, column_scale=scale, **a) + F.adapted_linear(
            x + dropped, weight
        )

    return formula, formula if original["dropout_p"] == 0.0 and bool((norm >= 0).all()) else magnitude


def norm_of(original: Arguments) -> Any:
    """`dora_norm`: its error is relative to the result. A scaling tensor is multiplied into B first."""
    if isinstance(original["scaling"], torch.Tensor):
        return None

    def formula(a: Arguments) -> Any:
        return F.dora_norm(**{**a, "dtype": None})

    return formula, lambda a: formula(in_float64(original))


def adapter(function: Any) -> Any:
    """What runs fused; the rest is PyTorch's own operations."""

    def formulas(original: Arguments) -> Any:
        norms = original["ln_before"] is not None or original["ln_after"] is not None
        if norms or not isinstance(original["activation"], str):
            return None

        def magnitude(a: Arguments) -> Any:
            """|f(z)| is at most 1.13 |z| for every activation that has a name, and its slope at most 1.13."""
            results = properties.tensors_in(function(**{**a, "activation": "identity"}))
            return [1.28 * t for t in results]

        def formula(a: Arguments) -> Any:
            return function(**a)

        return formula, formula if original["activation"] == "identity" else magnitude

    return formulas


FUNCTIONAL = {
    "adapted_linear": Entry(F.adapted_linear, linear_arguments, polynomial(linear), roundings),
    "lora_linear": Entry(
        F.lora_linear, lambda d: lora_arguments(d, nf4=False), polynomial(linear), roundings
    ),
    "nf4_lora_linear": Entry(
        F.nf4_lora_linear, lambda d: lora_arguments(d, nf4=True), polynomial(linear), roundings
    ),
    "nf4_linear": Entry(
        F.nf4_linear,
        nf4_linear_arguments,
        lambda a: None if a["activation"] else polynomial(linear)(a),
        roundings,
    ),
    "nf4_linear (int8)": Entry(functools.partial(F.nf4_linear, activation="int8"), int8_arguments),
    "ia3_linear": Entry(F.ia3_linear, ia3_arguments, polynomial(F.ia3_linear), roundings),
    "dora_linear": Entry(F.dora_linear, dora_arguments, dora, roundings),
    "dora_norm": Entry(F.dora_norm, dora_norm_arguments, norm_of, lambda a: 20, in_halves=False),
    "bottleneck_adapter": Entry(
        F.bottleneck_adapter, adapter_arguments, adapter(F.bottleneck_adapter), roundings
    ),
    "bottleneck_adapter_with_intermediates": Entry(
        F.bottleneck_adapter_with_intermediates,
        lambda d: {**adapter_arguments(d), "need_down": d(st.booleans()), "need_up": d(st.booleans())},
        adapter(F.bottleneck_adapter_with_intermediates),
        roundings,
    ),
    "philox_dropout": Entry(F.philox_dropout, dropout_arguments, may_return_input=lambda a: a["p"] == 0.0),
    "philox_dropout_mask": Entry(F.philox_dropout_mask, mask_arguments),
    "nf4_quantize": Entry(F.nf4_quantize, quantize_arguments),
    "nf4_dequantize": Entry(F.nf4_dequantize, dequantize_arguments),
}
