"""`dora_norm` against float64: ordinary rows, rows that nearly cancel or leave fp32's range; bad input."""

import math
import re
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import peft_kernels as pk
from factories import WEIGHTS, make_problem
from peft_kernels.core.backend import resolve
from peft_kernels.core.library import native_library

OP = torch.ops.peft_kernels.dora_norm
EACH_WEIGHT = pytest.mark.parametrize("weight", WEIGHTS)
MOST = 1e-6  # relative error


def exact_norm(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The definition in float64."""
    return (weight.double() + scaling * lora_b.double() @ lora_a.double()).norm(dim=1)


def expanded_norm(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The textbook way, ||W||^2 + 2 s <W, BA> + s^2 ||BA||^2, in fp32: what cancellation costs."""
    cross = ((weight @ lora_a.t()) * lora_b).sum(1)
    square = ((lora_b @ (lora_a @ lora_a.t())) * lora_b).sum(1)
    return (weight.square().sum(1) + 2 * scaling * cross + scaling**2 * square).clamp_min(0).sqrt()


def error(norm: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest relative error."""
    return float((norm.double() / exact - 1).abs().max())


@EACH_WEIGHT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "k", "r"),
    [(1, 1, 1), (3, 2, 1), (50, 64, 4), (24, 257, 5), (65, 96, 33), (37, 1030, 8), (7, 31, 300)],
)
def test_norm_against_float64(backend: str, weight: str, dtype: torch.dtype, n: int, k: int, r: int) -> None:
    problem = make_problem(1, n, k, r=r, weight=weight, dtype=dtype, blocksize=32, parts=["lora"])
    a, b = problem.tensors["lora_a"], problem.tensors["lora_b"]
    for scaling in (-1.5, 0.0, 0.7):
        norm = pk.functional.dora_norm(problem.weight, a, b, scaling)
        assert norm.dtype == torch.float32
        exact = exact_norm(problem.exact_weight, a, b, scaling)
        assert error(norm, exact) <= MOST


def test_float64() -> None:
    problem = make_problem(1, 9, 33, weight="dense", dtype=torch.float64, parts=["lora"])
    a, b = problem.tensors["lora_a"], problem.tensors["lora_b"]
    norm = pk.functional.dora_norm(problem.weight, a, b, 0.3)
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, exact_norm(problem.weight, a, b, 0.3), rtol=1e-14, atol=0)


@pytest.mark.parametrize("left", [0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("scaling", [2.0, 1 / 3])
def test_rows_that_nearly_cancel(backend: str, left: float, scaling: float) -> None:
    """W = -(1 - left) * scaling * B A: nearly all of the weight is taken away."""
    k, n, r = 1024, 48, 8
    a, b = torch.randn(r, k), torch.randn(n, r)
    weight = (-(1 - left) * scaling * (b.double() @ a.double())).float()
    exact = exact_norm(weight, a, b, scaling)
    assert error(pk.functional.dora_norm(weight, a, b, scaling), exact) <= MOST
    if left <= 0.1:  # or this would be no test
        assert error(expanded_norm(weight, a, b, scaling), exact) > MOST


@pytest.mark.parametrize("k", [1, 2, 4, 300])
@pytest.mark.parametrize("r", [1, 2, 16])
def test_rows_around_the_point_from_which_float64_is_used(backend: str, k: int, r: int) -> None:
    """Rows from a tenth to a thousandth of what they are made of; the scaling is not a number of fp32."""
    n = 20_000
    a, b, scaling = torch.randn(r, k), torch.randn(n, r), -2 / 3
    a[:, : k // 2] *= 1e-3  # so that it is the last inputs that count
    left = 10 ** torch.empty(n, 1, dtype=torch.float64).uniform_(-3, -1)
    update = scaling * b.double() @ a.double()
    weight = (left * update.norm(dim=1, keepdim=True) * torch.randn(n, k) / k**0.5 - update).float()
    assert error(pk.functional.dora_norm(weight, a, b, scaling), exact_norm(weight, a, b, scaling)) <= MOST


def test_scaling_is_not_rounded_to_fp32(backend: str) -> None:
    """What is left of the update is a hundredth; no element is so small that fp64 would be asked for."""
    k, scaling = 4096, 1 / 3
    a, b = torch.randn(1, k).sign(), torch.tensor([[1.0], [1.7], [1.3], [0.9]])
    weight = (-0.99 * scaling * b.double() @ a.double()).float()
    # Without a fused multiply-add the update is rounded, here by the same for all of a row, and it is
    # a hundred times as large as what is left.
    fused = backend == "reference" or native_library().capability != "portable"
    most = MOST if fused else MOST + 100 * 2**-24
    assert error(pk.functional.dora_norm(weight, a, b, scaling), exact_norm(weight, a, b, scaling)) <= most


def test_low_rank_parts_that_cancel_each_other(backend: str) -> None:
    """B A is small, its two terms are a million times as large."""
    k, n = 512, 40
    row, other = torch.randn(1, k), 1e-4 * torch.randn(1, k)
    a, b = torch.cat([row, row + other]), 1e4 * torch.randn(n, 1) * torch.tensor([[1.0, -1.0]])
    weight = torch.randn(n, k)
    assert error(pk.functional.dora_norm(weight, a, b, 1.0), exact_norm(weight, a, b, 1.0)) <= MOST


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_squares_beyond_fp32(backend: str, size: float) -> None:
    weight, a, b = size * torch.randn(30, 100), size * torch.randn(4, 100), torch.randn(30, 4)
    assert error(pk.functional.dora_norm(weight, a, b, 0.5), exact_norm(weight, a, b, 0.5)) <= MOST


def test_zero_rows_and_special_values_stay_in_their_rows(backend: str) -> None:
    weight, a, b = torch.randn(30, 100), torch.randn(4, 100), torch.randn(30, 4)
    weight[3], b[3] = 0.0, 0.0
    weight[5, 7], weight[11, 99] = torch.nan, torch.inf
    norm = pk.functional.dora_norm(weight, a, b, 0.5)
    assert norm[3] == 0
    assert norm[5].isnan()
    assert norm[11] == torch.inf
    finite = [i for i in range(30) if i not in (3, 5, 11)]
    assert error(norm[finite], exact_norm(weight, a, b, 0.5)[finite]) <= MOST


def test_tiny_rows_are_not_zero(backend: str) -> None:
    weight = torch.zeros(2, 64)
    weight[0, 5] = 1e-40  # subnormal
    norm = pk.functional.dora_norm(weight, torch.zeros(1, 64), torch.zeros(2, 1), 1.0)
    assert norm[0] == weight[0, 5]
    assert norm[1] == 0


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
def test_blocksizes(backend: str, blocksize: int, nested: bool) -> None:
    weight, a, b = torch.randn(30, 8192), torch.randn(4, 8192), torch.randn(30, 4)
    w = pk.functional.nf4_quantize(weight, blocksize, nested)
    exact = exact_norm(w.dequantize(torch.float32), a, b, 0.5)
    assert error(pk.functional.dora_norm(w, a, b, 0.5), exact) <= MOST


@EACH_WEIGHT
def test_strides_and_mixed_dtypes(backend: str, weight: str) -> None:
    problem = make_problem(1, 20, 64, weight=weight, dtype=torch.bfloat16, parts=["lora"])
    a, b = problem.tensors["lora_a"].float(), problem.tensors["lora_b"].float()
    w = problem.weight.t().contiguous().t() if weight == "dense" else problem.weight
    norm = pk.functional.dora_norm(w, a.t().contiguous().t(), b.t().contiguous().t(), 2.0)
    assert torch.equal(norm, pk.functional.dora_norm(problem.weight, a, b, 2.0))
    assert error(norm, exact_norm(problem.exact_weight, a, b, 2.0)) <= MOST


def test_scaling_as_a_tensor_and_dtype_of_the_result(backend: str) -> None:
    weight, a, b = torch.randn(12, 64), torch.randn(3, 64), torch.randn(12, 3)
    norm = pk.functional.dora_norm(weight, a, b, 2.0)
    assert torch.equal(pk.functional.dora_norm(weight, a, b, torch.tensor([2.0])), norm)
    rounded = pk.functional.dora_norm(weight, a, b, 2.0, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, norm.bfloat16())


def test_norm_is_a_constant(backend: str) -> None:
    a, b = torch.randn(3, 64, requires_grad=True), torch.randn(12, 3, requires_grad=True)
    for scaling in (2.0, torch.tensor(2.0, requires_grad=True)):
        assert not pk.functional.dora_norm(torch.randn(12, 64), a, b, scaling).requires_grad


@EACH_WEIGHT
@pytest.mark.parametrize("overload", ["default", "reference"])
@pytest.mark.parametrize("variant", ["contiguous", "transposed", "stride 0"])
def test_opcheck(weight: str, overload: str, variant: str) -> None:
    problem = make_problem(1, 9, 34, weight=weight, parts=["lora"])
    a, b = problem.tensors["lora_a"], problem.tensors["lora_b"]
    if variant == "transposed":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    elif variant == "stride 0":
        a, b = a[:1].expand(4, 34), b[:, :1].expand(9, 4)
    torch.library.opcheck(getattr(OP, overload), (*base_of(problem.weight), 9, a, b, 0.5))


def base_of(weight: Any) -> tuple[Any, ...]:
    dense = isinstance(weight, torch.Tensor)
    return (weight, None, None, None, None, 0, 0) if dense else tuple(weight.base_weight())


@EACH_WEIGHT
def test_compile_equals_eager(backend: str, weight: str, fresh_compiler: None) -> None:
    problem = make_problem(1, 12, 64, weight=weight, parts=["lora"])
    a, b = problem.tensors["lora_a"], problem.tensors["lora_b"]
    compiled = torch.compile(pk.functional.dora_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(problem.weight, a, b, -2.0), pk.functional.dora_norm(problem.weight, a, b, -2.0)
    )


@EACH_WEIGHT
@pytest.mark.parametrize("k", [64, 96, 1030])
def test_same_bits_for_any_number_of_threads(weight: str, k: int) -> None:
    problem = make_problem(1, 150, k, weight=weight, parts=["lora"])
    call = (
        pk.functional.dora_norm,
        (problem.weight, problem.tensors["lora_a"], problem.tensors["lora_b"], 0.5),
    )
    expected = call[0](*call[1])
    for threads in (2, 7, 3, 1):
        torch.set_num_threads(threads)
        assert torch.equal(call[0](*call[1]), expected)


def test_meta_tensors() -> None:
    norm = pk.functional.dora_norm(
        *(torch.empty(s, device="meta") for s in ((12, 64), (3, 64), (12, 3))), 1.0
    )
    assert norm.is_meta
    assert norm.shape == (12,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(64)}, "weight must be [N, K], got [64]"),
        ({"weight": torch.zeros(0, 64)}, "lora_b must be [N, r] = [0, 3], got [12, 3]"),
        (
            {"weight": torch.zeros(12, 64).int()},
            "weight must be float32 or bfloat16 or float16 or float64, got",
        ),
        (
            {"weight": torch.zeros(12, 65)},
            "lora_a must be [r, K] = [*, 65], got [3, 64]; pass the adapter made",
        ),
        (
            {"weight": torch.zeros(12, 64, requires_grad=True)},
            "weight must be frozen, got requires_grad=True",
        ),
        (
            {"weight": pk.functional.nf4_quantize(torch.zeros(12, 63))},
            "packed must be [(n+1)//2] = [384], got",
        ),
        ({"lora_a": torch.zeros(64)}, "lora_a must be [r, K] = [*, 64], got [64]"),
        ({"lora_a": torch.zeros(0, 64)}, "lora_a must be [r, K] with r > 0, got [0, 64]"),
        (
            {"lora_a": torch.zeros(3, 64).double()},
            "lora_a must be float32 or bfloat16 or float16, got float64; convert the adapter or",
        ),
        ({"lora_b": torch.zeros(12, 4)}, "lora_b must be [N, r] = [12, 3], got [12, 4]"),
        ({"lora_b": torch.zeros(12, 3).half()}, "lora_b must be float32, got float16"),
        (
            {"lora_b": torch.zeros(12, 3, device="meta")},
            "lora_b must be on the device of weight, cpu, got meta",
        ),
        ({"scaling": math.nan}, "scaling must be finite, got nan"),
        ({"scaling": torch.ones(2)}, "scaling must have one element, got [2]"),
    ],
)
def test_public_call_refuses(backend: str, change: dict[str, Any], message: str) -> None:
    arguments = {
        "weight": torch.randn(12, 64), "lora_a": torch.randn(3, 64), "lora_b": torch.randn(12, 3),
        "scaling": 1.0, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.functional.dora_norm(**arguments)


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b"])
def test_public_call_refuses_what_is_no_tensor(name: str) -> None:
    arguments = {"weight": torch.zeros(12, 64), "lora_a": torch.zeros(3, 64), "lora_b": torch.zeros(12, 3)}
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got list; "):
        pk.functional.dora_norm(**{**arguments, name: [1.0]}, scaling=1.0)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, torch.zeros(383, dtype=torch.uint8)),
        (1, torch.zeros(11)),
        (6, 48),
        (7, 13),
        (8, torch.zeros(4, 63)),
        (9, torch.zeros(11, 4)),
        (10, math.inf),
    ],
)
def test_op_refuses(index: int, value: Any) -> None:
    problem = make_problem(1, 12, 64, weight="nf4", parts=["lora"])
    arguments = [*base_of(problem.weight), 12, problem.tensors["lora_a"], problem.tensors["lora_b"], 0.5]
    resolve("dora_norm", problem.grad)(*arguments)
    arguments[index] = value
    for overload in (OP.default, OP.reference):
        with pytest.raises((ValueError, RuntimeError)):
            overload(*arguments)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=" must be "):
        OP.default(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
