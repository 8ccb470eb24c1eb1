"""Barriers, waits and guarded copies of the CUDA C++ kernels: without any one of them a test would fail."""

from collections.abc import Callable

import pytest
import torch

import gpuless
import peft_kernels as pk
from factories import make_problem
from gpuless.cuda import CudaLaunch
from gpuless.mutations import Mutant, mutants

OPS = torch.ops.peft_kernels
MULTIPROCESSORS = 4  # of the emulated GPU: few, so that small problems get large tiles, and split sums
Run = Callable[[], torch.Tensor]
full = pytest.mark.gpuless_full


def forward(m: int, k: int, n: int) -> Run:
    """Blocks beyond K would meet the infinity, were they not masked."""
    problem = make_problem(m, n, k, dtype=torch.bfloat16, parts=())
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


def codec(blocksize: int) -> Run:
    """Both directions, two tiles and a ragged end."""
    weight = torch.randn(8192 * 2 + 77)
    return lambda: pk.functional.nf4_quantize(weight, blocksize).dequantize(torch.bfloat16)


# Kernel, tokens of its tile -> problems: a long sum, and one shorter than the first copies.
PROBLEMS: dict[str, tuple[Run, ...]] = {
    "gemv": (forward(1, 2368, 20),),
    "matmul of 8": (forward(5, 2368, 40), forward(5, 64, 40)),
    "matmul of 16": (forward(12, 1344, 70), forward(12, 64, 70)),
    "matmul of 64": (forward(100, 832, 520), forward(100, 64, 520)),
    "input gradient of 8": (backward(3, 192, 600), backward(3, 64, 20)),
    "input gradient of 64": (backward(50, 192, 600), backward(50, 64, 20)),
    "codec": (codec(64), codec(4096)),
}


def outcome(run: Run, arch: int, original: CudaLaunch | None = None, changed: str = "") -> bytes | None:
    """The result's bits; None where the emulator reports something."""

    def edit(ptx: str) -> str:
        return changed if original is not None and ptx == original.ptx else ptx

    with gpuless.cuda(arch, multiprocessors=MULTIPROCESSORS, edit=edit), pk.use_backend("cuda"):
        try:
            return bytes(run().view(torch.uint8).numpy())
        except gpuless.Report:
            return None


def survivors(runs: tuple[Run, ...], arch: int) -> list[Mutant]:
    """Mutants that none of the problems shows."""
    launches: dict[str, CudaLaunch] = {}
    expected = []
    for run in runs:
        with gpuless.cuda(arch, multiprocessors=MULTIPROCESSORS) as gpu, pk.use_backend("cuda"):
            expected.append(bytes(run().view(torch.uint8).numpy()))
        launches |= {launch.name: launch for launch in gpu.launches}
    found = []
    for launch in launches.values():
        for mutant in mutants(launch.ptx, launch.name):
            # A guard of plain loads and stores is the compiler's; ragged shapes show those that matter.
            if "without its guard" in mutant.what or mutant.harmless:
                continue
            if all(
                outcome(run, arch, launch, mutant.ptx) == bits
                for run, bits in zip(runs, expected, strict=True)
            ):
                found.append(mutant)
    return found


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=full), pytest.param(120, marks=full)])
@pytest.mark.parametrize("kernel", PROBLEMS)
def test_every_barrier_and_wait_is_needed(kernel: str, arch: int, poison: None) -> None:
    assert [mutant.what for mutant in survivors(PROBLEMS[kernel], arch)] == []
