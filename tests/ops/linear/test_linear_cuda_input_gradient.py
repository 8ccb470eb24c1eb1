"""dz W by CUDA C++ alone: long sums, split sums, every tile, against the weight that the contract says."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import gpuless
import numerics
import peft_kernels as pk
from factories import Problem, make_problem
from peft_kernels.ops.nf4.reference import dequantize_absmax, nf4_dequantize
from peft_kernels.ops.nf4.schema import BaseWeight

OP = torch.ops.peft_kernels.nf4_linear_backward_input
full = pytest.mark.gpuless_full
SIXTEEN = (torch.bfloat16, torch.float16)


def make(m: int, n: int, k: int, **options: Any) -> Problem:
    return make_problem(
        m, n, k, **{"parts": ("lora", "column_scale", "input_scale"), "dtype": torch.bfloat16, **options}
    )


def run(problem: Problem, du: torch.Tensor | None) -> torch.Tensor:
    t = problem.tensors
    dx: torch.Tensor = OP.cuda(
        *(problem.grad, *problem.weight.base_weight(), t["x"].shape[1], t.get("column_scale"), du),
        *(None if du is None else t["lora_a"], t.get("input_scale"), problem.dropout_p),
        torch.tensor(problem.seed),
    )
    return dx


def rounded_weight(problem: Problem) -> torch.Tensor:
    """W times column_scale [N, K], rounded to the dtype of grad as the contract says: exact from there on."""
    n, k = problem.exact_weight.shape
    base = problem.weight.base_weight()
    absmax = dequantize_absmax(base).view(n, -1)
    if "column_scale" in problem.tensors:
        absmax = absmax * problem.tensors["column_scale"].float()[:, None]
    plain = BaseWeight(base.weight, absmax.flatten(), None, None, None, 0, base.blocksize)
    weight: torch.Tensor = nf4_dequantize(*plain, (n, k), problem.grad.dtype)
    return weight


def check(problem: Problem, seed: int = 0) -> torch.Tensor:
    t, (m, n) = problem.tensors, problem.grad.shape
    generator = torch.Generator().manual_seed(seed)
    r = t["lora_a"].shape[0] if "lora_a" in t else 0
    du = torch.randn(m, r, generator=generator) if r else None
    dx = run(problem, du)
    grad, weight = problem.grad.double(), rounded_weight(problem).double()
    exact, magnitude = grad @ weight, grad.abs() @ weight.abs()
    if "input_scale" in t:
        exact, magnitude = exact * t["input_scale"].double(), magnitude * t["input_scale"].double().abs()
    if du is not None:
        keep = pk.functional.philox_dropout_mask(t["x"].shape, problem.dropout_p, problem.seed)
        keep = keep * torch.tensor(1 / (1 - problem.dropout_p), dtype=torch.float32).double()
        exact = exact + (du.double() @ t["lora_a"].double()) * keep
        magnitude = magnitude + (du.double().abs() @ t["lora_a"].double().abs()) * keep
    numerics.assert_within("dx", dx, exact, numerics.bound(exact, magnitude, n + r + 8, dx.dtype))
    return dx


def splits(gpu: Any) -> int:
    """Parts of the last product's sum; where there are several, a launch adds them up."""
    names = [launch.name for launch in gpu.launches]
    finished = "finish_input_gradient_kernel" in names[-1]
    last = max(i for i, name in enumerate(names) if "21input_gradient_kernel" in name)
    count: int = gpu.launches[last].grid[1]
    assert finished == (count > 1)
    return count


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("m", [1, 12, 30, 64, pytest.param(100, marks=full)])
def test_long_sums(cuda_gpu: Any, m: int, dtype: torch.dtype) -> None:
    """Several turns of every warp, warps with one turn less, rows after the last step; split in two."""
    problem = make(m, 1129, 192, dtype=dtype, weight="nf4_double", r=20, dropout_p=0.3)
    check(problem)
    assert splits(cuda_gpu) == 2


@pytest.mark.parametrize("blocksize", [64, 128, 256])
@pytest.mark.parametrize("m", [5, 16, 17, 40])
def test_blocks_and_columns(cuda_gpu: Any, m: int, blocksize: int) -> None:
    """Columns that fill their last tile by a half, by a whole."""
    check(make(m, 333, 3 * blocksize, blocksize=blocksize, parts=("column_scale",)))


@pytest.mark.parametrize("n", [1, 31, 32, 33, 255, 256, 257])
@pytest.mark.parametrize("m", [3, 33])
def test_every_rest_of_rows(cuda_gpu: Any, m: int, n: int) -> None:
    check(make(m, n, 64, parts=()))


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("r", [1, 16, 20])
@pytest.mark.parametrize("m", [8, 50])
def test_epilogue(cuda_gpu: Any, m: int, r: int, adapter_dtype: torch.dtype) -> None:
    check(make(m, 64, 192, r=r, adapter_dtype=adapter_dtype, dropout_p=0.5))


@pytest.mark.parametrize("m", [7, 15, 31, 63])
def test_strides(cuda_gpu: Any, m: int) -> None:
    """Rows of dz that are longer than they are read, so that what is beyond them must not count."""
    problem = make(m, 100, 128)
    wide = torch.full((m, 128), torch.nan, dtype=problem.grad.dtype)
    wide[:, :100] = problem.grad
    expected = check(problem)
    problem.grad = wide[:, :100]
    assert torch.equal(check(problem), expected)


@pytest.mark.parametrize("m", [8, 16, 32, 64])
def test_infinity_and_nan(cuda_gpu: Any, m: int) -> None:
    """Of dz they stay in their token; of absmax in the columns of their block: what float64 says."""
    problem = make(m, 300, 192, parts=())
    clean = run(problem, None)
    grad = problem.grad.clone()
    grad[3, 5], grad[4, 290] = torch.inf, torch.nan
    dx = run(replace(problem, grad=grad), None)
    assert dx[4].isnan().all()
    infinite = torch.sign(rounded_weight(problem)[5].float())  # a code of 0 times infinity is NaN
    assert torch.equal(dx[3].float().nan_to_num(0.0, 1.0, -1.0), infinite)
    rest = [i for i in range(m) if i not in (3, 4)]
    assert torch.equal(dx[rest], clean[rest])
    for value in (0.0, 1e-40, torch.inf, torch.nan):
        absmax = problem.weight.absmax.clone()
        absmax[7 * 3 + 1] = value  # row 7, its second block
        odd = replace(problem, weight=replace(problem.weight, absmax=absmax))
        dx = check(odd) if abs(value) < 1 else run(odd, None)
        assert abs(value) < 1 or not dx[:, 64:128].isfinite().any()
        assert torch.equal(dx[:, :64], clean[:, :64])
        assert torch.equal(dx[:, 128:], clean[:, 128:])


@pytest.mark.parametrize("multiprocessors", [1, 4, 500])
@pytest.mark.parametrize("m", [2, 48])
def test_splits_follow_the_device(poison: None, m: int, multiprocessors: int) -> None:
    problem = make(m, 1600, 128, r=16, dropout_p=0.1)
    with gpuless.cuda(80, multiprocessors=multiprocessors) as gpu:
        first, again = check(problem), check(problem)
    assert torch.equal(first, again)
    assert splits(gpu) == {1: 1, 4: 3, 500: 3}[multiprocessors]


@full
@pytest.mark.parametrize("shape", [(9, 2100, 448), (64, 1500, 320), (128, 520, 128), (16, 4097, 64)], ids=str)
@pytest.mark.parametrize("weight", ["nf4", "nf4_double"])
def test_more_shapes(cuda_gpu: Any, shape: Sequence[int], weight: str) -> None:
    m, n, k = shape
    check(make(m, n, k, weight=weight, dropout_p=0.3))
