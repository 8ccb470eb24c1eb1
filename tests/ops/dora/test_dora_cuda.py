"""`dora_norm` in CUDA C++ on emulated GPUs: the bounds of `test_dora_norm.py`, and what its code takes."""

import re
from typing import Any

import pytest
import torch
from test_dora_triton import MOST, NORM, SHAPES, base_of, check, error, exact_norm

import gpuless
import peft_kernels as pk
from factories import WEIGHTS, make_problem
from gpuless import toolchain
from gpuless.mutations import weaken_all_waits
from gpuless.sass import disassemble
from gpuless.static import cubin_budget

OP = torch.ops.peft_kernels.dora_norm
SOURCE = toolchain.ROOT / "csrc" / "cuda" / "dora.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
full = pytest.mark.gpuless_full

# Several tiles of columns and of rows, splits; ranks in several parts, and more than stay in shared memory.
TILES = ((130, 160, 17), (64, 512, 64), (5, 288, 70), (65, 640, 8), (3, 136, 6), (66, 512, 3))


@pytest.mark.parametrize(("n", "k", "r"), [*SHAPES, *TILES])
def test_norm_against_float64(cuda_gpu: Any, n: int, k: int, r: int) -> None:
    weight, dtype = WEIGHTS[(n + cuda_gpu.triton.arch // 10) % 3], DTYPES[(n + k) % 3]
    check(n, k, r, weight=weight, dtype=dtype, adapter_dtype=DTYPES[n % 3], blocksize=32)
    assert [launch.shown.partition("<")[0] for launch in cuda_gpu.launches][-4:] == 2 * [
        "row_squares_kernel",
        "finish_norms_kernel",
    ]


@full
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "r"), [*SHAPES, *TILES])
def test_every_weight_and_dtype(
    cuda_gpu: Any, weight: str, dtype: torch.dtype, n: int, k: int, r: int
) -> None:
    for scaling, adapter_dtype in ((0.7, torch.float32), (0.0, torch.float16), (-1.5, dtype)):
        check(n, k, r, scaling, weight=weight, dtype=dtype, adapter_dtype=adapter_dtype, blocksize=64)


@pytest.mark.parametrize(
    ("blocksize", "nested", "k"), [(32, False, 512), (32, True, 800), (256, True, 800), (4096, False, 800)]
)
def test_blocksizes(cuda_gpu: Any, blocksize: int, nested: bool, k: int) -> None:
    """Blocks that end with a row, and blocks that run on into the next."""
    weight, a, b = torch.randn(20, k), torch.randn(4, k), torch.randn(20, 4)
    w = pk.functional.nf4_quantize(weight, blocksize, nested)
    assert error(NORM(w, a, b, 0.5), exact_norm(w.dequantize(torch.float32), a, b, 0.5)) <= MOST


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_adapters_that_nearly_cancel_the_weight(cuda_gpu: Any, distance: float) -> None:
    """Such rows are made again in fp64; the others are not."""
    n, k, r = 40, 192, 4
    a, b = torch.randn(r, k), torch.randn(n, r)
    weight = torch.randn(n, k)
    weight[::3] = (b @ a + distance * torch.randn(n, k))[::3]
    assert error(NORM(weight, a, b, -1.0), exact_norm(weight, a, b, -1.0)) <= MOST


def test_long_rows_in_few_splits() -> None:
    """Sums of many squares, all rounded the same way; in the last row every addition would lose 2^-18."""
    k = 65536  # in four splits
    weight, a, b = torch.full((4, k), 1.1), torch.zeros(1, k), torch.zeros(4, 1)
    weight[:3, ::2] = torch.tensor([0.7, 1.3, 1.9])[:, None]
    weight[3] = 0.0
    weight[3, ::8] = 1 + 2**-19 - 2**-23
    with gpuless.cuda(90, multiprocessors=1), pk.use_backend("cuda"):
        assert error(NORM(weight, a, b, 1.0), exact_norm(weight, a, b, 1.0)) <= 2e-7


def test_scaling_is_not_rounded_to_fp32(cuda_gpu: Any) -> None:
    """What is left of the update is a hundredth; no element is so small that fp64 would be asked for."""
    a, b = torch.randn(1, 4096).sign(), torch.tensor([[1.0], [1.7]])
    weight = (-0.99 * (1 / 3) * b.double() @ a.double()).float()
    assert error(NORM(weight, a, b, 1 / 3), exact_norm(weight, a, b, 1 / 3)) <= MOST


def test_low_rank_parts_that_cancel_each_other(cuda_gpu: Any) -> None:
    """B A is small, its two terms are a million times as large."""
    k, n = 192, 20
    row, other = torch.randn(1, k), 1e-4 * torch.randn(1, k)
    a, b = torch.cat([row, row + other]), 1e4 * torch.randn(n, 1) * torch.tensor([[1.0, -1.0]])
    weight = torch.randn(n, k)
    assert error(NORM(weight, a, b, 1.0), exact_norm(weight, a, b, 1.0)) <= MOST


@pytest.mark.parametrize("scaling", [1.0, 1e6])
def test_one_column_that_cancels(cuda_gpu: Any, scaling: float) -> None:
    """The largest element of A counts, times scaling; not those that come after it."""
    n, k = 20, 192
    a, b, weight = torch.randn(2, k) / scaling, torch.randn(n, 2), torch.randn(n, k)
    a[:, 3] *= 1e6
    weight[:, 3] -= scaling * (b @ a)[:, 3]
    assert error(NORM(weight, a, b, scaling), exact_norm(weight, a, b, scaling)) <= MOST


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_squares_beyond_fp32(cuda_gpu: Any, size: float) -> None:
    weight, a, b = size * torch.randn(10, 100), size * torch.randn(4, 100), torch.randn(10, 4)
    assert error(NORM(weight, a, b, 0.5), exact_norm(weight, a, b, 0.5)) <= MOST


def test_scaling_beyond_fp32(cuda_gpu: Any) -> None:
    weight, a, b = torch.randn(10, 64), 1e-30 * torch.randn(4, 64), 1e-30 * torch.randn(10, 4)
    assert error(NORM(weight, a, b, 1e60), exact_norm(weight, a, b, 1e60)) <= MOST


@pytest.mark.parametrize("weight", WEIGHTS)
def test_zero_rows_and_special_values_stay_in_their_rows(cuda_gpu: Any, weight: str) -> None:
    """In the weight, its absmax and B; columns beyond K add nothing, whatever B has."""
    n, k = 70, 96
    dense, a, b = torch.randn(n, k), torch.randn(4, k), torch.randn(n, 4)
    dense[3], b[3] = 0.0, 0.0
    dense[5, 7], dense[11, 95] = torch.nan, torch.inf
    b[20, 1], b[69, 3] = torch.inf, torch.nan
    nf4 = pk.functional.nf4_quantize(dense, 32)  # double_quant spreads NaN
    w, exact = (dense, dense) if weight == "dense" else (nf4, nf4.dequantize(torch.float32))
    exact = exact_norm(exact, a, b, 0.5)
    norm = NORM(w, a, b, 0.5)
    special = [5, 11, 20, 69]
    assert torch.equal(norm[special].nan_to_num(nan=-1.0), exact[special].float().nan_to_num(nan=-1.0))
    assert norm[3] == 0
    finite = [i for i in range(n) if i not in (3, *special)]
    assert error(norm[finite], exact[finite]) <= MOST


def test_tiny_rows_are_not_zero(cuda_gpu: Any) -> None:
    weight = torch.zeros(2, 64)
    weight[0, 5] = 1e-40  # subnormal
    norm = NORM(weight, torch.zeros(1, 64), torch.zeros(2, 1), 1.0)
    assert norm[0] == weight[0, 5]
    assert norm[1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment_of_a_dense_weight(cuda_gpu: Any, dtype: torch.dtype) -> None:
    """They are followed, not copied away."""
    base, a, b = torch.randn(20, 72).to(dtype), torch.randn(5, 64), torch.randn(20, 5)
    for weight in (
        *(base[:, :64], base[:, 8:], base[:, 1:65], base[:, :64].t().contiguous().t()),
        *(base[:1, :64].expand(20, 64), base[:, :1].expand(20, 64)),
    ):
        assert error(NORM(weight, a, b, 2.0), exact_norm(weight, a, b, 2.0)) <= MOST
    expanded = NORM(base[:, :64], a[:, :1].expand(5, 64), b[:, :1].expand(20, 5), 2.0)
    exact = exact_norm(base[:, :64], a[:, :1].expand(5, 64), b[:, :1].expand(20, 5), 2.0)
    assert error(expanded, exact) <= MOST


def test_packed_bytes_that_lie_anywhere(cuda_gpu: Any) -> None:
    w = pk.functional.nf4_quantize(torch.randn(20, 96), 32)
    a, b = torch.randn(5, 96), torch.randn(20, 5)
    base = list(w.base_weight())
    base[0] = torch.empty(w.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(w.packed)
    exact = exact_norm(w.dequantize(torch.float32), a, b, 0.5)
    assert error(OP.cuda(*base, 20, a, b, 0.5), exact) <= MOST


@pytest.mark.parametrize("weight", WEIGHTS)
def test_opcheck(weight: str) -> None:
    problem = make_problem(1, 9, 34, weight=weight, parts=["lora"])
    a, b = problem.tensors["lora_a"], problem.tensors["lora_b"]
    with gpuless.cuda(80):
        torch.library.opcheck(OP.cuda, (*base_of(problem.weight), 9, a, b, 0.5))
        torch.library.opcheck(OP.cuda, (*base_of(problem.weight), 9, a.t().contiguous().t(), b, 0.5))


def test_float64_goes_to_the_reference(cuda_gpu: Any) -> None:
    a, b, w = torch.randn(3, 40).double(), torch.randn(5, 3).double(), torch.randn(5, 40).double()
    assert NORM(w, a, b, 0.5).dtype == torch.float64
    assert not cuda_gpu.launches
    with pytest.raises(RuntimeError, match="lora_a must be float32, bfloat16 or float16"):
        OP.cuda(*base_of(w), 5, a, b, 0.5)


def run(weight: str, dtype: torch.dtype = torch.float32, n: int = 128, k: int = 512, r: int = 32) -> None:
    problem = make_problem(1, n, k, r=r, weight=weight, dtype=dtype, parts=["lora"])
    with pk.use_backend("cuda"):
        NORM(problem.weight, problem.tensors["lora_a"], problem.tensors["lora_b"], 0.5)


@pytest.mark.parametrize("weight", ["nf4", "dense"])
def test_a_missing_barrier_or_wait_is_found(weight: str) -> None:
    with gpuless.cuda(80, edit=without_barriers), pytest.raises(gpuless.Report, match=r"race|uninitialised"):
        run(weight)
    if weight == "nf4":
        with gpuless.cuda(80, edit=weaker_waits), pytest.raises(gpuless.Report, match=r"cp\.async"):
            run(weight)


def without_barriers(ptx: str) -> str:
    return re.sub(r"bar\.sync\s+0;", "", ptx) if "row_squares_kernel" in ptx else ptx


def weaker_waits(ptx: str) -> str:
    name = re.search(r"\.entry\s+(\w*row_squares_kernel\w*NormNF4\w*)", ptx)
    return weaken_all_waits(ptx, name[1]) if name else ptx


@pytest.mark.parametrize("weight", ["nf4", "dense"])
def test_bytes_and_wavefronts(weight: str) -> None:
    """The weight is read once; sectors and wavefronts of the loop are what its bytes need."""
    with gpuless.cuda(90, counts=True, multiprocessors=2) as gpu:
        run(weight, torch.bfloat16)
        (squares,) = [each for each in gpu.launches if "row_squares" in each.name]
    accesses = [each for each in squares.result.accesses if each.requests > 64]
    assert sum(each.transactions for each in accesses) <= 1.1 * sum(each.ideal for each in accesses)
    assert {each.space for each in accesses} == {"shared", "global"}


@pytest.mark.parametrize("arch", [90, *(pytest.param(each, marks=full) for each in (80, 86, 89, 100, 120))])
def test_everything_stays_in_registers(nvcc: str, arch: int) -> None:
    code = toolchain.cubin(SOURCE, arch)
    kernels = list(disassemble(code))
    assert len(kernels) == 6
    for kernel in kernels:
        found = cubin_budget(code, arch, threads=128, dynamic_shared=4096, kernel=kernel)
        assert found.in_registers, found
        assert found.occupancy.ctas >= 3, found
