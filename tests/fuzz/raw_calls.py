"""The ops themselves, `torch.ops.peft_kernels.*`, past the checks of the public functions."""

from collections.abc import Callable
from typing import Any

import torch

from peft_kernels.core.backend import op_names
from peft_kernels.ops.nf4.reference import dequantize_absmax, nf4_code, unpack
from peft_kernels.ops.nf4.schema import BaseWeight

from .calls import Arguments, Entry
from .odd import Draw
from .problems import Maker

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def overload(op_name: str, name: str) -> Callable[..., Any]:
    """An overload of an op, called with keywords in the order of its schema."""
    function = getattr(getattr(torch.ops.peft_kernels, op_name), name)
    return lambda **arguments: function(*arguments.values())


def base(make: Maker, nf4: bool | None = None) -> Arguments:
    """The parts of a weight [N, K]."""
    if make.maybe() if nf4 is None else nf4:
        return make.nf4().base_weight()._asdict()
    return BaseWeight(make.normal(make.n, make.k, dtype=make.dtype), None, None, None, None, 0, 0)._asdict()


def adapter_of(make: Maker) -> Arguments:
    """A, B and scaling, or none."""
    lora = make.lora() if make.maybe() else {"lora_a": None, "lora_b": None}
    return {**lora, "scaling": make.pick((1.0, -1.5))}


def scales(make: Maker) -> Arguments:
    """Column scale and input scale."""
    return {"column_scale": make.optional(make.n), "input_scale": make.optional(make.k)}


def dropout(make: Maker, allowed: bool) -> Arguments:
    """Probability and seed."""
    if not allowed:
        return {"dropout_p": 0.0, "seed": None}
    return {"dropout_p": make.pick((0.0, 0.25)), "seed": torch.tensor(make.pick((0, -5, 2**62)))}


def forward(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    x, lora = make.normal(make.m, make.k, dtype=make.dtype), adapter_of(make)
    return {
        "x": x,
        **base(make),
        "out_features": make.n,
        **lora,
        **scales(make),
        "bias": make.optional(make.n),
        **dropout(make, lora["lora_a"] is not None),
        "save_preactivation": make.maybe(),
    }


def backward(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    lora, scale = adapter_of(make), scales(make)
    has = {name: value is not None for name, value in (lora | scale).items()}
    return {
        "grad": make.normal(make.m, make.n, dtype=make.dtype),
        "x": make.normal(make.m, make.k, dtype=make.dtype),
        **base(make),
        **lora,
        **scale,
        **dropout(make, has["lora_a"]),
        "u": make.normal(make.m, make.r, dtype=torch.promote_types(make.dtype, torch.float32)),
        "z": make.normal(make.m, make.n, dtype=make.dtype),
        "need_x": make.maybe(),
        **{
            f"need_{name}": has[name] and make.maybe()
            for name in ("lora_a", "lora_b", "column_scale", "input_scale")
        },
        "need_bias": make.maybe(),
    }


def backward_input(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    low_rank = make.maybe()
    wide = torch.promote_types(make.dtype, torch.float32)
    return {
        "grad": make.normal(make.m, make.n, dtype=make.dtype),
        **base(make, nf4=True),
        "in_features": make.k,
        "column_scale": make.optional(make.n),
        "du": make.normal(make.m, make.r, dtype=wide) if low_rank else None,
        "lora_a": make.normal(make.r, make.k) if low_rank else None,
        "input_scale": make.optional(make.k),
        **dropout(make, low_rank),
    }


def int8(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    x = make.normal(make.m, make.k, dtype=make.dtype)
    return {"x": x, **base(make, nf4=True), "out_features": make.n, "bias": make.optional(make.n)}


def norm(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    return {**base(make), "out_features": make.n, **make.lora(), "scaling": make.pick((1.0, -0.5))}


def operands(make: Maker, n: int) -> Arguments:
    """What both ops of the bottleneck adapter take."""
    return {
        "down_weight": make.normal(make.r, make.k),
        "down_bias": make.optional(make.r),
        "up_weight": make.normal(n, make.r),
        "up_bias": make.optional(n),
        "activation": make.pick(range(7)),
        "scaling": make.pick((1.0, -2.0)),
        "scale": make.pick((None, make.normal(1), make.normal(n))),
        "gate": make.optional(make.m),
        **dropout(make, True),
    }


def adapter(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    hidden = make.normal(make.m, make.k, dtype=make.dtype)
    needs = {"need_down": make.maybe(), "need_up": make.maybe()}
    return {"hidden": hidden, "residual": make.optional(make.m, make.n), **operands(make, make.n), **needs}


def adapter_backward(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    same = make.maybe()
    n = make.k if same else make.n
    both = operands(make, n)
    return {
        "grad": make.normal(make.m, n),
        "grad_down": make.optional(make.m, make.r, dtype=make.dtype),
        "hidden": make.normal(make.m, make.k, dtype=make.dtype),
        **both,
        "residual_is_hidden": same,
        **{f"need_{name}": make.maybe() for name in ("hidden", "down_weight")},
        "need_down_bias": both["down_bias"] is not None and make.maybe(),
        "need_up_weight": make.maybe(),
        **{f"need_{name}": both[name] is not None and make.maybe() for name in ("up_bias", "scale", "gate")},
    }


def quantize(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    return {"weight": make.x(), "blocksize": make.pick((32, 64, 4096))}


def dequantize(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    parts = make.nf4().base_weight()._asdict()
    return {"packed": parts.pop("weight"), **parts, "shape": (make.n, make.k), "dtype": make.dtype}


def philox(draw: Draw) -> Arguments:
    make = Maker(draw, HALF_AND_SINGLE)
    return {"x": make.x(), "p": make.pick((0.0, 0.1, 0.99)), "seed": torch.tensor(make.pick((0, -1, 2**40)))}


def in_float64(op_name: str) -> Callable[[Arguments], Any]:
    """Judges by the reference, with the weight dense and everything in float64."""
    reference = overload(op_name, "reference")

    def dense(a: Arguments, absolute: bool) -> Arguments:
        if a["absmax"] is None:
            return a
        n = a["out_features"] if "out_features" in a else a["grad"].shape[1]
        k = (a["x"] if "x" in a else a["lora_a"]).shape[1]
        parts = BaseWeight(*(a[name] for name in BaseWeight._fields))
        parts = parts._replace(nested_blocksize=int(parts.nested_blocksize), blocksize=int(parts.blocksize))
        code = nf4_code(torch.device("cpu")).double()[unpack(parts.weight, n * k)]
        weight = code * dequantize_absmax(parts).repeat_interleave(parts.blocksize)[: n * k]
        parts = BaseWeight((weight.abs() if absolute else weight).reshape(n, k), None, None, None, None, 0, 0)
        return {**a, **parts._asdict()}

    def formulas(original: Arguments) -> Any:
        if "activation" not in original:
            return tuple(
                lambda a, absolute=absolute: reference(**dense(a, absolute)) for absolute in (False, True)
            )
        if op_name.endswith("backward") and original["activation"] != 0:
            return None
        return lambda a: reference(**a), lambda a: [1.28 * t for t in reference(**{**a, "activation": 0})]

    return formulas


def roundings(a: Arguments) -> int:
    """All dimensions together: no term passes through more, and a few factors."""
    return 64 + sum(sum(t.shape) for t in a.values() if isinstance(t, torch.Tensor) and t.dim() == 2)


def _entry(
    op_name: str, build: Callable[[Draw], Arguments], bits: bool = False, in_halves: bool = True
) -> Entry:
    exact = None if bits else in_float64(op_name)
    functions = [overload(op_name, name) for name in ("default", "reference")]
    roundings_of = roundings if in_halves else lambda a: 20  # dora_norm's error is relative to itself
    return Entry(
        functions[0], build, exact, roundings_of, in_halves, reference=functions[1], same_words=False
    )


RAW = {
    "adapted_linear": _entry("adapted_linear", forward),
    "adapted_linear_backward": _entry("adapted_linear_backward", backward),
    "nf4_linear_backward_input": _entry("nf4_linear_backward_input", backward_input, bits=True),
    "nf4_linear_int8": _entry("nf4_linear_int8", int8, bits=True),
    "dora_norm": _entry("dora_norm", norm, in_halves=False),
    "bottleneck_adapter": _entry("bottleneck_adapter", adapter),
    "bottleneck_adapter_backward": _entry("bottleneck_adapter_backward", adapter_backward),
    "nf4_quantize": _entry("nf4_quantize", quantize, bits=True),
    "nf4_dequantize": _entry("nf4_dequantize", dequantize, bits=True),
    "philox_dropout": _entry("philox_dropout", philox, bits=True),
}
assert sorted(RAW) == op_names(), "an op without an entry"
