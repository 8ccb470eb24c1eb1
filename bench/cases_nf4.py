"""The NF4 codec: quantise and dequantise a weight [N, K]."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_kernels import NF4Weight, functional
from peft_kernels.ops.nf4.reference import NF4_CODE

from . import baselines
from .case import OURS, Case, Family, Oracle, Prepared, Program
from .machine import weight_copies
from .oracle import unit_roundoff

BLOCKSIZE = 64


def _case(op: str, k: int, n: int, dtype: str, suites: tuple[str, ...], weight: Any = "nf4") -> Case:
    return Case("nf4", op, 0, k, n, dtype=dtype, weight=weight, suites=suites)


CASES = (
    _case("nf4_quantize", 128, 64, "float32", ("smoke",)),
    _case("nf4_dequantize", 128, 64, "float32", ("smoke",), "nf4_double"),
    # A key or value projection: small enough to be quick for the baselines
    _case("nf4_quantize", 4096, 1024, "float32", ("quick",)),
    _case("nf4_quantize", 4096, 4096, "float32", ("full",)),
    _case("nf4_quantize", 4096, 4096, "bfloat16", ("full",)),
    _case("nf4_dequantize", 4096, 4096, "float32", ("full",)),
    _case("nf4_dequantize", 4096, 4096, "bfloat16", ("full",)),
    _case("nf4_dequantize", 4096, 4096, "float32", ("full",), "nf4_double"),
)


def quantized_bytes(case: Case) -> int:
    """Bytes of an NF4 weight [N, K]: nibbles, and a float32, or 8 bits and a nested float32, a block."""
    blocks = -(-case.n * case.k // BLOCKSIZE)
    per_block = blocks * 4 if case.weight == "nf4" else blocks + 4 * -(-blocks // 256)
    return (case.n * case.k + 1) // 2 + per_block


def quantized_weight(case: Case) -> NF4Weight:
    """A random weight [N, K] of entries of variance 1 / K, quantised as the case says."""
    dense = torch.randn(case.n, case.k) / case.k**0.5
    return functional.nf4_quantize(
        dense.to(case.torch_dtype), BLOCKSIZE, double_quant=case.weight == "nf4_double"
    )


def prepare(case: Case) -> Prepared:
    """Prepare any `nf4_quantize` or `nf4_dequantize` case."""
    torch.manual_seed(0)
    return {"nf4_quantize": _prepare_quantize, "nf4_dequantize": _prepare_dequantize}[case.op](case)


def _programs(
    call: Callable[..., Any], arguments: list[tuple[Any, ...]], outputs: Callable[[Any], Any]
) -> list[Program]:
    return [Program(partial(call, *copy), outputs) for copy in arguments]


def _prepare_quantize(case: Case) -> Prepared:
    dense_bytes = case.n * case.k * case.element_size
    dense = (torch.randn(case.n, case.k) / case.k**0.5).to(case.torch_dtype)
    copies = [(dense.clone(),) for _ in range(weight_copies(dense_bytes))]
    code = torch.tensor(NF4_CODE)
    edges = (code[:-1] + code[1:]) / 2

    def named(packed: Tensor, absmax: Tensor) -> dict[str, Tensor]:
        weight = NF4Weight(packed.view(-1), absmax, None, (case.n, case.k), BLOCKSIZE, case.torch_dtype)
        dequantized = baselines.eager_dequantize(weight.shape, *baselines.eager_operands(weight))
        return {"distance": (dequantized.double() - dense.double()).abs()}

    def eager(weight: Tensor) -> tuple[Tensor, Tensor]:
        blocks = weight.float().view(-1, BLOCKSIZE)
        absmax = blocks.abs().amax(dim=1)
        codes = torch.bucketize(blocks / absmax[:, None], edges, out_int32=True).view(-1)
        return (codes[::2] << 4 | codes[1::2]).to(torch.uint8), absmax

    def bitsandbytes() -> list[Program]:
        quantize = baselines.require("bitsandbytes.functional").quantize_4bit
        call = partial(quantize, blocksize=BLOCKSIZE, quant_type="nf4")
        return _programs(call, copies, lambda out: named(out[0], out[1].absmax))

    def oracle(_: str) -> Oracle:
        """Distance of every element from the nearest code value: no choice of codes does better."""
        blocks, values = dense.double().view(-1, BLOCKSIZE), code.double()
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        # An element lies between the code values below and below + 1.
        below = torch.bucketize(blocks / absmax, values[1:-1])
        distance = torch.minimum(*((blocks - values[below + i] * absmax).abs() for i in (0, 1)))
        tolerance = (4 * unit_roundoff(torch.float32) * absmax).expand_as(distance)
        return Oracle({"distance": distance.view_as(dense)}, {"distance": tolerance.reshape_as(dense)})

    return Prepared(
        contestants={
            OURS: lambda: _programs(
                partial(functional.nf4_quantize, blocksize=BLOCKSIZE),
                copies,
                lambda q: named(q.packed, q.absmax),
            ),
            "eager": lambda: _programs(eager, copies, lambda out: named(*out)),
            "compile": lambda: _programs(baselines.compiled(eager), copies, lambda out: named(*out)),
            "bitsandbytes": bitsandbytes,
        },
        oracle=oracle,
        flops=0,
        read_bytes=dense_bytes,
        write_bytes=quantized_bytes(case),
        copies=len(copies),
    )


def _prepare_dequantize(case: Case) -> Prepared:
    first = quantized_weight(case)
    weights = [copy.deepcopy(first) for _ in range(weight_copies(quantized_bytes(case)))]
    operands = [baselines.eager_operands(weight) for weight in weights]

    def eager(*operands: Tensor) -> Tensor:
        return baselines.eager_dequantize((case.n, case.k), *operands).to(case.torch_dtype)

    def named(weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def bitsandbytes() -> list[Program]:
        dequantize = baselines.require("bitsandbytes.functional").dequantize_4bit
        return _programs(dequantize, [weight.to_bitsandbytes() for weight in weights], named)

    def oracle(_: str) -> Oracle:
        packed, pairs, *absmax = baselines.eager_operands(first)
        scale = baselines.eager_absmax(*absmax).double()  # its float32 rounding is part of the format
        weight = baselines.eager_dequantize((case.n, case.k), packed, pairs.double(), scale)
        rounded = unit_roundoff(torch.float32) + unit_roundoff(case.torch_dtype)
        return Oracle({"weight": weight}, {"weight": rounded * weight.abs()})

    return Prepared(
        contestants={
            OURS: lambda: _programs(functional.nf4_dequantize, [(weight,) for weight in weights], named),
            "eager": lambda: _programs(eager, operands, named),
            "compile": lambda: _programs(baselines.compiled(eager), operands, named),
            "bitsandbytes": bitsandbytes,
        },
        oracle=oracle,
        flops=0,
        read_bytes=quantized_bytes(case),
        write_bytes=case.n * case.k * case.element_size,
        copies=len(weights),
    )


FAMILY = Family("nf4", CASES, lambda _: ("eager", "compile", "bitsandbytes", "bitsandbytes-tuned"), prepare)
