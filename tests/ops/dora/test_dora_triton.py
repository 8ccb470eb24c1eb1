"""`dora_norm` in Triton on emulated GPUs: the bounds of `test_dora_norm.py`, and what its code takes."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gpuless
import peft_kernels as pk
from factories import WEIGHTS, make_problem
from gpuless.driver import EmulatedGPU
from gpuless.static import budget
from peft_kernels.ops.dora.triton import norm_plan

OP = torch.ops.peft_kernels.dora_norm
ARCHS = (80, 90, 120)
MOST = 1e-6  # relative error
NORM = pk.functional.dora_norm


@pytest.fixture(params=ARCHS)
def gpu(request: pytest.FixtureRequest) -> Iterator[EmulatedGPU]:
    with gpuless.device(request.param) as device, pk.use_backend("triton"):
        yield device


@pytest.fixture
def h100() -> Iterator[EmulatedGPU]:
    with gpuless.device(90) as device, pk.use_backend("triton"):
        yield device


def exact_norm(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The definition in float64."""
    return (weight.double() + scaling * lora_b.double() @ lora_a.double()).norm(dim=1)


def error(norm: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest relative error."""
    return float((norm.double() / exact - 1).abs().max())


def check(n: int, k: int, r: int, scaling: float = -1.5, **options: Any) -> None:
    problem = make_problem(1, n, k, r=r, parts=["lora"], **options)
    a, b = problem.tensors["lora_a"], problem.tensors["lora_b"]
    norm = NORM(problem.weight, a, b, scaling)
    assert norm.dtype == torch.float32
    assert error(norm, exact_norm(problem.exact_weight, a, b, scaling)) <= MOST
    assert torch.equal(NORM(problem.weight, a, b, scaling), norm)


# Rows that begin in the middle of a byte, of a block; several blocks of rows, splits, chunks of ranks.
SHAPES = (
    (1, 1, 1), (3, 2, 1), (70, 96, 4), (24, 257, 5), (17, 1030, 8), (65, 576, 16), (9, 64, 20), (7, 31, 100)
)  # fmt: skip


@pytest.mark.parametrize(("n", "k", "r"), SHAPES)
def test_norm_against_float64(gpu: EmulatedGPU, n: int, k: int, r: int) -> None:
    weight, dtype = WEIGHTS[(n + gpu.arch // 10) % 3], (torch.float32, torch.bfloat16)[n % 2]
    check(n, k, r, weight=weight, dtype=dtype, blocksize=32)
    assert [launch.name for launch in gpu.launches][-4:] == 2 * ["row_squares_kernel", "finish_norms_kernel"]


@pytest.mark.gpuless_full
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k", "r"), SHAPES)
def test_every_weight_and_dtype(
    gpu: EmulatedGPU, weight: str, dtype: torch.dtype, n: int, k: int, r: int
) -> None:
    for scaling, adapter_dtype in ((0.7, torch.float32), (0.0, torch.float16), (-1.5, dtype)):
        check(n, k, r, scaling, weight=weight, dtype=dtype, adapter_dtype=adapter_dtype, blocksize=64)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(h100: EmulatedGPU, weight: str, dtype: torch.dtype) -> None:
    check(33, 160, 8, weight=weight, dtype=dtype, adapter_dtype=torch.float32)
    check(5, 45, 3, weight=weight, dtype=torch.float32, adapter_dtype=dtype)


@pytest.mark.parametrize(
    ("blocksize", "nested", "k"), [(32, False, 512), (32, True, 800), (256, True, 800), (4096, False, 800)]
)
def test_blocksizes(h100: EmulatedGPU, blocksize: int, nested: bool, k: int) -> None:
    """Blocks that end with a row, and blocks that run on into the next."""
    weight, a, b = torch.randn(20, k), torch.randn(4, k), torch.randn(20, 4)
    w = pk.functional.nf4_quantize(weight, blocksize, nested)
    assert error(NORM(w, a, b, 0.5), exact_norm(w.dequantize(torch.float32), a, b, 0.5)) <= MOST


def test_gather_decodes_where_there_is_no_shuffle(h100: EmulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    w, a, b = pk.functional.nf4_quantize(torch.randn(20, 96)), torch.randn(4, 96), torch.randn(20, 4)
    expected = NORM(w, a, b, 0.5)
    monkeypatch.setattr("peft_kernels.ops.dora.triton.has_shuffle", lambda: False)
    assert torch.equal(NORM(w, a, b, 0.5), expected)
    shuffled = ["shfl.sync.idx" in launch.ptx for launch in h100.launches if "squares" in launch.name]
    assert shuffled == [True, False]


@pytest.mark.parametrize("left", [0.5, 1e-2, 1e-5])
@pytest.mark.parametrize("scaling", [2.0, 1 / 3])
def test_rows_that_nearly_cancel(gpu: EmulatedGPU, left: float, scaling: float) -> None:
    """W = -(1 - left) * scaling * B A: nearly all of the weight is taken away."""
    k, n, r = 256, 20, 8
    a, b = torch.randn(r, k), torch.randn(n, r)
    weight = (-(1 - left) * scaling * (b.double() @ a.double())).float()
    assert error(NORM(weight, a, b, scaling), exact_norm(weight, a, b, scaling)) <= MOST


@pytest.mark.parametrize(("k", "r"), [(1, 1), (4, 2), (60, 16), (128, 16)])
def test_rows_around_the_point_from_which_float64_is_used(h100: EmulatedGPU, k: int, r: int) -> None:
    """Rows from a tenth to a thousandth of what they are made of; the scaling is not a number of fp32."""
    n = 240
    a, b, scaling = torch.randn(r, k), torch.randn(n, r), -2 / 3
    a[:, : k // 2] *= 1e-3  # so that it is the last inputs that count
    left = 10 ** torch.empty(n, 1, dtype=torch.float64).uniform_(-3, -1)
    update = scaling * b.double() @ a.double()
    weight = (left * update.norm(dim=1, keepdim=True) * torch.randn(n, k) / k**0.5 - update).float()
    assert error(NORM(weight, a, b, scaling), exact_norm(weight, a, b, scaling)) <= MOST


def test_long_rows_in_one_split(h100: EmulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of many squares, all rounded the same way."""
    monkeypatch.setattr("peft_kernels.ops.dora.triton._CTAS_PER_SM", 0)
    k = 16384
    weight, a, b = torch.full((3, k), 1.1), torch.zeros(1, k), torch.zeros(3, 1)
    weight[:, ::2] = torch.tensor([0.7, 1.3, 1.9])[:, None]
    assert error(NORM(weight, a, b, 1.0), exact_norm(weight, a, b, 1.0)) <= 2e-7


def test_scaling_is_not_rounded_to_fp32(h100: EmulatedGPU) -> None:
    """What is left of the update is a hundredth; no element is so small that fp64 would be asked for."""
    k, scaling = 4096, 1 / 3
    a, b = torch.randn(1, k).sign(), torch.tensor([[1.0], [1.7]])
    update = scaling * b.double() @ a.double()
    weight = (-0.99 * update).float()
    assert error(NORM(weight, a, b, scaling), exact_norm(weight, a, b, scaling)) <= MOST


def test_nf4_rows_that_cancel_are_made_again(gpu: EmulatedGPU) -> None:
    """B A is W times almost one."""
    k, n = 32, 9
    w = pk.functional.nf4_quantize(torch.randn(n, k), 32, double_quant=True)
    dense = w.dequantize(torch.float32)
    b = dense * torch.tensor([1 - 1e-5, 0.5, 1 + 1e-6] * 3)[:, None]
    exact = exact_norm(dense, torch.eye(k), b, -1.0)
    assert error(NORM(w, torch.eye(k), b, -1.0), exact) <= MOST


def test_low_rank_parts_that_cancel_each_other(h100: EmulatedGPU) -> None:
    """B A is small, its two terms are a million times as large."""
    k, n = 192, 20
    row, other = torch.randn(1, k), 1e-4 * torch.randn(1, k)
    a, b = torch.cat([row, row + other]), 1e4 * torch.randn(n, 1) * torch.tensor([[1.0, -1.0]])
    weight = torch.randn(n, k)
    assert error(NORM(weight, a, b, 1.0), exact_norm(weight, a, b, 1.0)) <= MOST


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_squares_beyond_fp32(h100: EmulatedGPU, size: float) -> None:
    weight, a, b = size * torch.randn(10, 100), size * torch.randn(4, 100), torch.randn(10, 4)
    assert error(NORM(weight, a, b, 0.5), exact_norm(weight, a, b, 0.5)) <= MOST


def test_scaling_beyond_fp32(h100: EmulatedGPU) -> None:
    weight, a, b = torch.randn(10, 64), 1e-30 * torch.randn(4, 64), 1e-30 * torch.randn(10, 4)
    assert error(NORM(weight, a, b, 1e60), exact_norm(weight, a, b, 1e60)) <= MOST


def test_zero_rows_and_special_values_stay_in_their_rows(gpu: EmulatedGPU) -> None:
    weight, a, b = torch.randn(30, 100), torch.randn(4, 100), torch.randn(30, 4)
    weight[3], b[3] = 0.0, 0.0
    weight[5, 7], weight[11, 99] = torch.nan, torch.inf
    norm = NORM(weight, a, b, 0.5)
    assert norm[3] == 0
    assert norm[5].isnan()
    assert norm[11] == torch.inf
    finite = [i for i in range(30) if i not in (3, 5, 11)]
    assert error(norm[finite], exact_norm(weight, a, b, 0.5)[finite]) <= MOST


def test_tiny_rows_are_not_zero(h100: EmulatedGPU) -> None:
    weight = torch.zeros(2, 64)
    weight[0, 5] = 1e-40  # subnormal
    norm = NORM(weight, torch.zeros(1, 64), torch.zeros(2, 1), 1.0)
    assert norm[0] == weight[0, 5]
    assert norm[1] == 0


@pytest.mark.parametrize("weight", WEIGHTS)
def test_strides(h100: EmulatedGPU, weight: str) -> None:
    """Of a dense weight they are followed, not copied away."""
    problem = make_problem(1, 20, 64, weight=weight, dtype=torch.bfloat16, parts=["lora"])
    a, b = problem.tensors["lora_a"].float(), problem.tensors["lora_b"].float()
    expected = NORM(problem.weight, a, b, 2.0)
    w = problem.weight.t().contiguous().t() if weight == "dense" else problem.weight
    assert torch.equal(NORM(w, a.t().contiguous().t(), b.t().contiguous().t(), 2.0), expected)
    if weight == "dense":
        norm = NORM(problem.weight[:1].expand(3, 64), a, b[:1].expand(3, 4), 2.0)
        assert torch.equal(norm, expected[:1].expand(3))


def base_of(weight: Any) -> tuple[Any, ...]:
    dense = isinstance(weight, torch.Tensor)
    return (weight, None, None, None, None, 0, 0) if dense else tuple(weight.base_weight())


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("variant", ["contiguous", "transposed", "stride 0"])
def test_opcheck(h100: EmulatedGPU, weight: str, variant: str) -> None:
    problem = make_problem(1, 9, 34, weight=weight, parts=["lora"])
    a, b = problem.tensors["lora_a"], problem.tensors["lora_b"]
    if variant == "transposed":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    elif variant == "stride 0":
        a, b = a[:1].expand(4, 34), b[:, :1].expand(9, 4)
    torch.library.opcheck(OP.triton, (*base_of(problem.weight), 9, a, b, 0.5))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_compile_equals_eager(weight: str, fresh_compiler: None) -> None:
    """The op, as a user's compiled model calls it: not inside use_backend, where nothing is compiled."""
    problem = make_problem(1, 12, 64, weight=weight, parts=["lora"])
    a, b = problem.tensors["lora_a"], problem.tensors["lora_b"]

    def scale(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 1 / OP.triton(*base_of(problem.weight), 12, a, b, -2.0)

    with gpuless.device(90):
        compiled = torch.compile(scale, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(a, b), scale(a, b))


def test_float64_goes_to_the_reference(h100: EmulatedGPU) -> None:
    a, b, w = torch.randn(3, 40).double(), torch.randn(5, 3).double(), torch.randn(5, 40).double()
    assert NORM(w, a, b, 0.5).dtype == torch.float64
    assert not h100.launches
    with pytest.raises(ValueError, match=r"lora_a must be .*got float64; or leave use_backend"):
        OP.triton(*base_of(w), 5, a, b, 0.5)


def test_plan_fills_the_gpu_and_covers_the_inputs() -> None:
    shapes = ((4096, 4096, 16), (14336, 4096, 64), (1024, 4096, 8), (64, 12288, 16), (1, 1, 1), (99, 1030, 3))
    for (n, k, r), nf4 in itertools.product(shapes, (True, False)):
        for multiprocessors in (84, 108, 132, 170):
            plan = norm_plan(n, k, r, nf4, multiprocessors)
            ctas = -(-n // plan.rows) * plan.splits
            assert (plan.splits - 1) * plan.split_columns < k <= plan.splits * plan.split_columns
            assert plan.split_columns % plan.columns == 0
            assert ctas >= 2 * multiprocessors or plan.split_columns <= 512


BUDGETS = (
    (1024, 1024, 16, "nf4", torch.float32), (1024, 1024, 64, "nf4_double", torch.bfloat16),
    (1024, 1024, 64, "dense", torch.bfloat16), (1024, 1024, 16, "dense", torch.float32),
    (1024, 1024, 8, "nf4_double", torch.bfloat16), (1024, 1024, 5, "dense", torch.float32),
    (1000, 1030, 16, "nf4_double", torch.float32), (1000, 1031, 5, "nf4", torch.bfloat16),
    (1000, 1031, 1, "dense", torch.float32), (1024, 1024, 300, "nf4", torch.float32),
)  # fmt: skip


def budgets(target: int | str, n: int, k: int, r: int, weight: str, dtype: torch.dtype) -> Iterator[Any]:
    problem = make_problem(1, n, k, r=r, weight=weight, dtype=dtype, parts=["lora"])
    with gpuless.device(target, execute=False) as gpu, pk.use_backend("triton"):
        NORM(problem.weight, problem.tensors["lora_a"], problem.tensors["lora_b"], 0.5)
    yield from (budget(launch) for launch in gpu.launches)


OTHERS = (80, 86, 89, 100, 120, "gfx90a", "gfx942", "gfx1100")


@pytest.mark.parametrize(
    "target", [90, *(pytest.param(each, marks=pytest.mark.gpuless_full) for each in OTHERS)]
)
@pytest.mark.parametrize("case", BUDGETS)
def test_everything_stays_in_registers(target: int | str, case: tuple[Any, ...]) -> None:
    for found in budgets(target, *case):
        assert found.in_registers, found
        assert found.occupancy.ctas >= 2, found
