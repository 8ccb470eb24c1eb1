"""The adapted linear as torch ops: opcheck, and refusal of bad input by every path."""

import math
import re
from typing import Any

import numpy
import pytest
import torch
from torch._subclasses import FakeTensorMode

import peft_kernels as pk
from factories import WEIGHTS, Problem, make_problem
from peft_kernels.core.backend import resolve
from peft_kernels.ops.linear.schema import BackwardArgs, ForwardArgs
from peft_kernels.ops.nf4.schema import BaseWeight

FORWARD = torch.ops.peft_kernels.adapted_linear
BACKWARD = torch.ops.peft_kernels.adapted_linear_backward
EACH_WEIGHT = pytest.mark.parametrize("weight", WEIGHTS)


def forward_args(problem: Problem) -> ForwardArgs:
    t, weight = problem.tensors, problem.weight
    dense = isinstance(weight, torch.Tensor)
    base = BaseWeight(weight, None, None, None, None, 0, 0) if dense else weight.base_weight()
    n, seed = problem.exact_weight.shape[0], torch.tensor(problem.seed)
    lora = (t.get("lora_a"), t.get("lora_b"), problem.scaling)
    vectors = (t.get("column_scale"), t.get("input_scale"), t.get("bias"))
    return ForwardArgs(t["x"], *base, n, *lora, *vectors, problem.dropout_p, seed)


def backward_args(problem: Problem, need: bool = True) -> BackwardArgs:
    a = forward_args(problem)
    _, u, z = FORWARD.default(*a, True)
    trained = (a.lora_a, a.lora_b, a.column_scale, a.input_scale)
    needs = (True, *(need and tensor is not None for tensor in trained), need)
    return BackwardArgs(
        *(problem.grad, *a[:8], a.lora_a, a.lora_b, a.scaling, a.column_scale, a.input_scale),
        *(a.dropout_p, a.seed, u, z, *needs),
    )


@EACH_WEIGHT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "variant", ["contiguous", "transposed", "stride 0", "scales", "no parts", "no tokens"]
)
@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(weight: str, dtype: torch.dtype, variant: str, overload: str) -> None:
    forward, backward = getattr(FORWARD, overload), getattr(BACKWARD, overload)
    only = {"no parts": [], "scales": ["column_scale", "input_scale", "bias"]}
    parts: dict[str, Any] = {"parts": only[variant]} if variant in only else {"dropout_p": 0.3}
    problem = make_problem(0 if variant == "no tokens" else 4, 9, 34, weight=weight, dtype=dtype, **parts)
    if variant == "transposed":
        problem.tensors["x"] = problem.tensors["x"].t().contiguous().t()
        problem.grad = problem.grad.t().contiguous().t()
    elif variant == "stride 0":
        problem.tensors["x"] = problem.tensors["x"][:1].expand(4, 34)
        problem.grad = problem.grad[:1, :1].expand(4, 9)
    torch.library.opcheck(forward, (*forward_args(problem), variant != "no parts"))
    torch.library.opcheck(backward, backward_args(problem))
    torch.library.opcheck(backward, backward_args(problem, need=False))


def test_outputs_share_no_memory(backend: str) -> None:
    problem = make_problem(4, 8, 64, parts=["lora"])
    outputs = resolve("adapted_linear", problem.grad)(*forward_args(problem), True)
    inputs = [t for t in forward_args(problem) if isinstance(t, torch.Tensor)]
    pointers = [t.data_ptr() for t in (*outputs, *inputs)]
    assert len(set(pointers)) == len(pointers)


meta = {"device": "meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 65)}, "x must be [..., K] = [..., 64], got [4, 65]"),
        ({"x": torch.zeros(())}, "x must be [..., K] = [..., 64], got []"),
        (
            {"x": torch.zeros(4, 64, dtype=torch.int32)},
            "x must be float32 or bfloat16 or float16 or float64, got int32",
        ),
        ({"lora_a": None}, "lora_a and lora_b must be given together, got no lora_a"),
        ({"lora_b": None}, "lora_a and lora_b must be given together, got no lora_b"),
        (
            {"lora_a": torch.zeros(3, 63)},
            "lora_a must be [r, K] = [*, 64], got [3, 63]; pass the adapter made",
        ),
        ({"lora_a": torch.zeros(64)}, "lora_a must be [r, K] = [*, 64], got [64]"),
        ({"lora_a": torch.zeros(0, 64)}, "lora_a must be [r, K] with r > 0, got [0, 64]"),
        ({"lora_b": torch.zeros(3, 12)}, "lora_b must be [N, r] = [12, 3], got [3, 12]"),
        (
            {"lora_a": torch.zeros(3, 64).half()},
            "lora_a must be float32, got float16; convert the adapter or x",
        ),
        (
            {"lora_b": torch.zeros(12, 3).half()},
            "lora_b must be float32, got float16; lora_a and lora_b have one",
        ),
        ({"lora_a": torch.zeros(3, 64, **meta)}, "lora_a must be on the device of x, cpu, got meta"),
        ({"column_scale": torch.zeros(64)}, "column_scale must be [N] = [12], got [64]"),
        ({"column_scale": torch.zeros(12, 1)}, "column_scale must be [N] = [12], got [12, 1]"),
        ({"input_scale": torch.zeros(12)}, "input_scale must be [K] = [64], got [12]"),
        ({"input_scale": torch.zeros(64).bfloat16()}, "input_scale must be float32, got bfloat16"),
        ({"bias": torch.zeros(13)}, "bias must be [N] = [12], got [13]"),
        ({"bias": torch.zeros(12, **meta)}, "bias must be on the device of x, cpu, got meta; move it with"),
        ({"scaling": math.nan}, "scaling must be finite, got nan"),
        ({"scaling": math.inf}, "scaling must be finite, got inf"),
        (
            {"scaling": 3.0, "lora_a": None, "lora_b": None},
            "scaling must be 1.0 without lora_a and lora_b, got 3.0",
        ),
        (
            {"scaling": torch.tensor(3.0), "lora_a": None, "lora_b": None},
            "scaling must be 1.0 without lora_a and lora_b, got 3.0",
        ),
        ({"scaling": torch.ones(2)}, "scaling must have one element, got [2]"),
        ({"dropout_p": 1.0}, "dropout_p must be in [0, 1), got 1.0"),
        ({"dropout_p": -0.1}, "dropout_p must be in [0, 1), got -0.1"),
        (
            {"dropout_p": 0.5, "lora_a": None, "lora_b": None},
            "dropout_p must be 0 without lora_a and lora_b, got 0.5",
        ),
        ({"dropout_p": 0.5, "seed": torch.tensor(1, dtype=torch.int32)}, "seed must be int64, got int32"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1])}, "seed must be 0-dim = [], got [1]"),
        (
            {"weight": torch.zeros(12, 64, dtype=torch.bfloat16)},
            "weight must be float32, got bfloat16; convert it or x",
        ),
        ({"weight": torch.zeros(64)}, "weight must be [N, K], got [64]"),
        ({"weight": torch.zeros(0, 64)}, "weight must be [N, K] with N, K > 0, got [0, 64]"),
        ({"weight": torch.zeros(12, 65)}, "x must be [..., K] = [..., 65], got [4, 64]"),
        ({"weight": torch.zeros(12, 64, **meta)}, "weight must be on the device of x, cpu, got meta"),
        (
            {"weight": torch.zeros(12, 64, requires_grad=True)},
            "weight must be frozen, got requires_grad=True; call",
        ),
        ({"weight": pk.functional.nf4_quantize(torch.zeros(2, 3, 64))}, "an NF4Weight of shape [2, 3, 64]"),
        (
            {"weight": pk.functional.nf4_quantize(torch.zeros(12, 63))},
            "x must be [..., K] = [..., 63], got [4, 64]",
        ),
        (
            {"weight": pk.functional.nf4_quantize(torch.zeros(12, 64)).to("meta")},
            "weight must be on the device of x",
        ),
    ],
)
def test_public_call_refuses(backend: str, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(4, 64, requires_grad=True),
        "weight": torch.randn(12, 64),
        "lora_a": torch.randn(3, 64),
        "lora_b": torch.randn(12, 3),
        **change,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.functional.adapted_linear(**arguments)


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "column_scale", "input_scale", "bias"])
@pytest.mark.parametrize("value", [[1.0], numpy.zeros((12, 64), numpy.float32), torch.nn.Linear(64, 12)])
def test_public_call_refuses_what_is_no_tensor(name: str, value: object) -> None:
    arguments = {
        "x": torch.zeros(4, 64),
        "weight": torch.zeros(12, 64),
        "lora_a": torch.zeros(3, 64),
        "lora_b": torch.zeros(12, 3),
    }
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got .*{type(value).__name__}; "):
        pk.functional.adapted_linear(**{**arguments, name: value})


@pytest.mark.parametrize("adapter", [(), (torch.zeros(3, 64), torch.zeros(12, 3))], ids=["none", "lora"])
@pytest.mark.parametrize("scaling", ["1", None])
def test_public_call_refuses_a_scaling_that_is_no_number(adapter: tuple[Any, ...], scaling: Any) -> None:
    lora = dict(zip(("lora_a", "lora_b"), adapter, strict=False))
    with pytest.raises(TypeError, match=f"^scaling must be a number, got {scaling!r}$"):
        pk.functional.adapted_linear(torch.zeros(4, 64), torch.zeros(12, 64), scaling=scaling, **lora)


def test_special_cases_refuse_a_dense_weight_for_nf4() -> None:
    x, a, b = torch.zeros(1, 64), torch.zeros(2, 64), torch.zeros(8, 2)
    with pytest.raises(
        TypeError, match=r"w must be an NF4Weight, got Tensor; make one with nf4_quantize\(weight\)"
    ):
        pk.functional.nf4_linear(x, torch.zeros(8, 64))
    with pytest.raises(TypeError, match="w must be an NF4Weight, got Parameter"):
        pk.functional.nf4_lora_linear(x, torch.nn.Parameter(torch.zeros(8, 64)), a, b, 1.0)


def assert_refused(name: str, arguments: tuple[Any, ...], message: str) -> None:
    """Reference and fake say `message`; the native kernel refuses in its own words."""
    op = getattr(torch.ops.peft_kernels, name)
    with pytest.raises(ValueError, match=re.escape(message)):
        op.reference(*arguments)
    with pytest.raises((ValueError, RuntimeError)):
        op.default(*arguments)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=re.escape(message)):
        op.default(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 2, 64)}, "x must be [M, K], got [2, 2, 64]; flatten the leading dimensions"),
        ({"x": torch.zeros(4, 32)}, "packed must be [(n+1)//2] = [192], got [384]"),
        ({"weight": torch.zeros(383, dtype=torch.uint8)}, "packed must be [(n+1)//2] = [384], got [383]"),
        (
            {"absmax": torch.zeros(11, dtype=torch.uint8)},
            "absmax must be [ceil(n/blocksize)] = [12], got [11]",
        ),
        ({"absmax": None}, "weight must be float32, got uint8"),
        ({"nested_absmax": None}, "must be given together"),
        ({"nested_code": torch.zeros(16)}, "nested_code must be [256] = [256], got [16]"),
        ({"nested_blocksize": 3}, "nested_blocksize must be one of 32, 64"),
        ({"blocksize": 0}, "blocksize must be one of 32, 64"),
        ({"out_features": 13}, "packed must be [(n+1)//2] = [416], got [384]"),
        ({"lora_a": torch.zeros(4, 63)}, "lora_a must be [r, K] = [*, 64], got [4, 63]"),
        ({"lora_b": torch.zeros(12, 5)}, "lora_b must be [N, r] = [12, 4], got [12, 5]"),
        ({"column_scale": torch.zeros(11)}, "column_scale must be [N] = [12], got [11]"),
        ({"input_scale": torch.zeros(65)}, "input_scale must be [K] = [64], got [65]"),
        ({"bias": torch.zeros(1)}, "bias must be [N] = [12], got [1]"),
        ({"seed": None}, "seed must be given when dropout_p > 0, got None"),
        ({"dropout_p": 1.5}, "dropout_p must be in [0, 1), got 1.5"),
    ],
)
def test_forward_op_refuses(change: dict[str, Any], message: str) -> None:
    a = forward_args(make_problem(4, 12, 64, weight="nf4_double", dropout_p=0.2))
    assert_refused("adapted_linear", (*a._replace(**change), True), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(5, 12)}, "grad must be [M, N] = [4, *], got [5, 12]"),
        ({"grad": torch.zeros(4, 13)}, "packed must be [(n+1)//2] = [416], got [384]"),
        ({"grad": torch.zeros(4, 12).half()}, "grad must be float32, got float16"),
        ({"u": None}, "u must be given when need_lora_b is True, got None"),
        ({"u": torch.zeros(4, 5)}, "u must be [M, r] = [4, 4], got [4, 5]"),
        ({"u": torch.zeros(4, 4).half()}, "u must be float32, got float16"),
        ({"z": None}, "z must be given when need_column_scale is True, got None"),
        ({"z": torch.zeros(4, 11)}, "z must be [M, N] = [4, 12], got [4, 11]"),
        ({"column_scale": None}, "column_scale must be given when need_column_scale is True, got None"),
        ({"input_scale": None}, "input_scale must be given when need_input_scale is True, got None"),
        (
            {"lora_a": None, "lora_b": None, "dropout_p": 0.0},
            "lora_a must be given when need_lora_a is True, got None",
        ),
    ],
)
def test_backward_op_refuses(change: dict[str, Any], message: str) -> None:
    a = backward_args(make_problem(4, 12, 64, weight="nf4_double", dropout_p=0.2))
    assert_refused("adapted_linear_backward", tuple(a._replace(**change)), message)
