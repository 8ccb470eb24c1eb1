"""Barriers, waits and guarded copies of the CUDA C++ kernels: without any one of them a test would fail."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import gpuless
import peft_kernels as pk
from factories import make_problem
from gpuless.cuda import CudaLaunch
from gpuless.mutations import Mutant, mutants

OPS = torch.ops.peft_kernels
Run = Callable[[], torch.Tensor]
full = pytest.mark.gpuless_full


def forward(m: int, k: int, n: int, dtype: torch.dtype = torch.bfloat16) -> Run:
    """Blocks beyond K would meet the infinity, were they not masked."""
    problem = make_problem(m, n, k, dtype=dtype, parts=())
    x, base = problem.tensors["x"], problem.weight.base_weight()
    x[0, 3] = torch.inf
    rest = (None, None, 1.0, None, None, None, 0.0, None, False)
    return lambda: OPS.adapted_linear.cuda(x, *base, n, *rest)[0]


def backward(m: int, k: int, n: int) -> Run:
    """The same with rows beyond N."""
    problem = make_problem(m, n, k, dtype=torch.bfloat16, parts=())
    grad, base = problem.grad, problem.weight.base_weight()
    grad[0, 3] = torch.inf
    return lambda: OPS.nf4_linear_backward_input.cuda(grad, *base, k, None, None, None, None, 0.0, None)


def projection(m: int, k: int, r: int) -> Run:
    """u of a product with one output, with dropout."""
    problem = make_problem(m, 1, k, r=r, dtype=torch.bfloat16, parts=("lora",))
    t, base, seed = problem.tensors, problem.weight.base_weight(), torch.tensor(5)
    rest = (t["lora_a"], t["lora_b"], 1.0, None, None, None, 0.3, seed, False)
    return lambda: OPS.adapted_linear.cuda(t["x"], *base, 1, *rest)[1]


def codec(blocksize: int) -> Run:
    """Both directions, two tiles and a ragged end."""
    weight = torch.randn(8192 * 2 + 77)
    return lambda: pk.functional.nf4_quantize(weight, blocksize).dequantize(torch.bfloat16)


def norm(weight: str, r: int) -> Run:
    """Two tiles of columns."""
    problem = make_problem(1, 70, 192, r=r, weight=weight, dtype=torch.bfloat16, parts=("lora",))
    t = problem.tensors
    return lambda: pk.functional.dora_norm(problem.weight, t["lora_a"], t["lora_b"], 0.5)


@dataclass(frozen=True)
class Case:
    """Problems that launch a kernel: a long sum, and one shorter than the first copies.

    Attributes:
        kernel: how its name begins; it alone is changed.
        multiprocessors: of the emulated GPU: with few, small problems get large tiles.
    """

    kernel: str
    runs: tuple[Run, ...]
    multiprocessors: int = 1


CASES = (
    Case("linear_gemv_kernel<", (forward(1, 2368, 20),)),
    Case("linear_gemv_fp32_kernel<", (forward(2, 640, 9, torch.float32),)),
    Case("linear_matmul_kernel<__nv_bfloat16, MatmulTile<8,", (forward(5, 2368, 40), forward(5, 64, 40))),
    Case("linear_matmul_kernel<__nv_bfloat16, MatmulTile<16,", (forward(12, 1344, 70), forward(12, 64, 70))),
    Case(
        "linear_matmul_kernel<__nv_bfloat16, MatmulTile<64,", (forward(50, 832, 520), forward(50, 64, 520))
    ),
    Case("input_gradient_kernel<__nv_bfloat16, 8,", (backward(3, 192, 600), backward(3, 64, 20))),
    Case("input_gradient_kernel<__nv_bfloat16, 64,", (backward(50, 192, 600), backward(50, 64, 20))),
    Case("input_gradient_kernel<__nv_bfloat16, 16,", (backward(12, 64, 1100),), 4),  # a split sum
    Case("project_kernel<", (projection(5, 320, 3), projection(1, 64, 3))),
    Case("quantize_kernel<", (codec(64), codec(4096))),
    Case("dequantize_kernel<", (codec(64),)),
    Case("row_squares_kernel<NormNF4>", (norm("nf4_double", 20), norm("nf4", 70))),
    Case("row_squares_kernel<NormDense", (norm("dense", 20), norm("dense", 70))),
)


def outcome(case: Case, run: Run, arch: int, original: str = "", changed: str = "") -> bytes | None:
    """The result's bits; None where the emulator reports something."""

    def edit(ptx: str) -> str:
        return changed if ptx == original else ptx

    with gpuless.cuda(arch, multiprocessors=case.multiprocessors, edit=edit), pk.use_backend("cuda"):
        try:
            return bytes(run().view(torch.uint8).numpy())
        except gpuless.Report:
            return None


def survivors(case: Case, arch: int) -> list[Mutant]:
    """Mutants that none of the problems shows."""
    launches: dict[str, CudaLaunch] = {}
    expected = []
    for run in case.runs:
        with gpuless.cuda(arch, multiprocessors=case.multiprocessors) as gpu, pk.use_backend("cuda"):
            expected.append(bytes(run().view(torch.uint8).numpy()))
        launches |= {each.name: each for each in gpu.launches if each.shown.startswith(case.kernel)}
    candidates = [
        (launch.ptx, mutant)
        for launch in launches.values()
        for mutant in mutants(launch.ptx, launch.name)
        # A guard of plain loads and stores is the compiler's; ragged shapes show those that matter.
        if "without its guard" not in mutant.what and not mutant.harmless
    ]
    assert candidates, f"no problem launches {case.kernel}, or it has neither barriers nor waits"
    return [
        mutant
        for ptx, mutant in candidates
        if all(
            outcome(case, run, arch, ptx, mutant.ptx) == bits
            for run, bits in zip(case.runs, expected, strict=True)
        )
    ]


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=full), pytest.param(120, marks=full)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
def test_every_barrier_and_wait_is_needed(case: Case, arch: int, poison: None) -> None:
    assert [mutant.what for mutant in survivors(case, arch)] == []
