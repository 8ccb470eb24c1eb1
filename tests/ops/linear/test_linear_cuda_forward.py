"""Each of the CUDA C++ kernels of x W^T: what test_linear_cuda.py leaves to the chooser is chosen here."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_linear_op import forward_args

import gpuless
import peft_kernels as pk
from factories import Problem, make_problem
from gpuless.cuda import CudaLaunch
from gpuless.mutations import mutants, weaken_all_waits

full = pytest.mark.gpuless_full
PARTS = ("lora", "column_scale", "bias")
ARCHS = (80, 86, 90, 120)
# Tokens, and the kernel that they get where one multiprocessor has all the work.
KERNELS = {
    "gemv": (1, "linear_gemv_kernel"),
    "8": (5, "MatmulTile<8, 1>"),
    "16": (13, "MatmulTile<16, 2>"),
    "32": (30, "MatmulTile<32, 2>"),
    "64": (60, "MatmulTile<64, 4>"),
}
FP32 = {"fp32": (1, "linear_gemv_fp32_kernel<1"), "fp32 4": (3, "linear_gemv_fp32_kernel<4")}


@pytest.fixture(autouse=True)
def emulated(nvcc: str, poison: None) -> None:
    """Compilers; results that nobody wrote are NaN."""


def device(arch: int, **options: Any) -> Any:
    return gpuless.cuda(arch, **{"multiprocessors": 1, **options})


def run(problem: Problem, save_preactivation: bool = False) -> tuple[torch.Tensor, ...]:
    """y, u and z of the op itself."""
    y, u, z = torch.ops.peft_kernels.adapted_linear.cuda(*forward_args(problem), save_preactivation)
    return y, u, z


def product_of(gpu: Any) -> CudaLaunch:
    launch: CudaLaunch
    (launch,) = (each for each in gpu.launches if "linear_" in each.shown)
    return launch


def make(kernel: str, n: int, k: int, **options: Any) -> tuple[Problem, str]:
    m, shown = (KERNELS | FP32)[kernel]
    dtype = torch.float32 if kernel in FP32 else torch.bfloat16
    return make_problem(m, n, k, **{"parts": PARTS, "dtype": dtype, **options}), shown


def archs(*params: Any) -> list[Any]:
    """Every kernel on every architecture; each on one of them by default."""
    return [
        pytest.param(kernel, arch, *params, marks=() if (i + j) % len(ARCHS) == 0 else full)
        for i, kernel in enumerate((*KERNELS, *FP32))
        for j, arch in enumerate(ARCHS)
    ]


@pytest.mark.parametrize("weight", ["nf4", "nf4_double"])
@pytest.mark.parametrize(("kernel", "arch"), archs())
def test_every_kernel(kernel: str, arch: int, weight: str) -> None:
    """More inputs than a ring of x holds, a chunk cut short, outputs cut short, z beside y."""
    problem, shown = make(kernel, 131, 1344, weight=weight, r=20, dropout_p=0.3)
    with device(arch) as gpu:
        y, _, z = run(problem, save_preactivation=True)
    assert shown in product_of(gpu).shown
    problem.check(y)
    plain = {name: t for name, t in problem.tensors.items() if name not in ("column_scale", "bias")}
    replace(problem, tensors=plain).check(z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n", "k"), [(1, 64), pytest.param(257, 192, marks=full), (64, 256)])
def test_edges(kernel: str, n: int, k: int, dtype: torch.dtype) -> None:
    problem, shown = make(kernel, n, k, dtype=dtype, adapter_dtype=dtype, r=1)
    with device(80, multiprocessors=1) as gpu, pk.use_backend("cuda"):
        problem.check(problem.run())
    if n > 128:
        assert shown in product_of(gpu).shown


@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("kernel", ["gemv", "8", "64", "fp32"])
def test_blocks_longer_than_a_lane_has(kernel: str, blocksize: int) -> None:
    problem, _ = make(kernel, 40, 4096, blocksize=blocksize, parts=())
    with device(90):
        problem.check(run(problem)[0])


def non_finite(y: torch.Tensor) -> torch.Tensor:
    """What of y is not finite, and which infinity: the rest is 0."""
    return torch.where(y.isfinite(), 0.0, y.double())


@pytest.mark.parametrize("adapter_dtype", [torch.float32, None], ids=["fp32 adapters", "adapters as x"])
@pytest.mark.parametrize("kernel", [*KERNELS, *FP32])
def test_infinities_are_those_of_the_formula(kernel: str, adapter_dtype: torch.dtype | None) -> None:
    """In x, so in u; where K ends inside a chunk, and where the rank ends inside a step."""
    problem, _ = make(kernel, 40, 320, r=3, adapter_dtype=adapter_dtype)
    x = problem.tensors["x"]
    x[0, 319] = torch.inf
    x[-1, 7] = -torch.inf
    a, b = problem.tensors["lora_a"], problem.tensors["lora_b"]
    a[0, 319] = a[0, 7] = 0.5  # u is one infinity, not the difference of two
    a[1:, 319] = a[1:, 7] = 0.25
    b.abs_()
    with device(90):
        y, u, _ = run(problem)
    weight = problem.exact_weight.to(x.dtype).double()
    z = x.double() @ weight.T + problem.scaling * (u.double() @ b.double().T)
    expected = z * problem.tensors["column_scale"].double() + problem.tensors["bias"].double()
    assert not expected.isfinite().all()
    torch.testing.assert_close(non_finite(y), non_finite(expected), equal_nan=True)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38, 1e-45, 0.0])
@pytest.mark.parametrize("kernel", [*KERNELS, *FP32])
def test_odd_absmax_gives_what_the_formula_gives(kernel: str, value: float) -> None:
    """Of one block, in the middle of a row or at its end."""
    problem, _ = make(kernel, 40, 320, parts=())
    x = problem.tensors["x"] = problem.tensors["x"].clamp(-2, 2) / 8
    absmax = problem.weight.absmax.clone().reshape(40, 5)
    absmax[3, 1] = absmax[17, 4] = absmax[39, 0] = value
    weight = replace(problem.weight, absmax=absmax.flatten())
    with device(80):
        (y, _, _), (clean, _, _) = run(replace(problem, weight=weight)), run(problem)
    exact = weight.dequantize(x.dtype).double()
    expected = x.double() @ exact.T
    rest = [n for n in range(40) if n not in (3, 17, 39)]
    assert torch.equal(y[:, rest], clean[:, rest])
    odd = expected.to(x.dtype)  # may overflow
    same = odd.isfinite()
    torch.testing.assert_close(non_finite(y)[:, [3, 17, 39]], non_finite(odd)[:, [3, 17, 39]], equal_nan=True)
    torch.testing.assert_close(y[same], odd[same], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", [*KERNELS, *FP32])
def test_bytes_are_the_fewest(kernel: str) -> None:
    """Of 4096 inputs, outputs that no tile cuts short: within 1.05 times, and no scratch."""
    problem, _ = make(kernel, 256, 4096, parts=())
    with device(90, counts=True) as gpu:
        y, _, _ = run(problem)
    launch = product_of(gpu)
    assert launch.result is not None
    moved = sum(launch.result.bytes_read.values()) + sum(launch.result.bytes_written.values())
    weight = problem.weight
    fewest = sum(t.nbytes for t in (problem.tensors["x"], weight.packed, weight.absmax, y))
    assert fewest <= moved <= 1.05 * fewest


@pytest.mark.parametrize("kernel", [*KERNELS, *FP32])
def test_same_bits_on_every_run(kernel: str) -> None:
    problem, _ = make(kernel, 70, 1088, r=20)
    with device(90):
        first, second = run(problem), run(problem)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def planted(gpu: Any) -> list[tuple[str, Callable[[str], str]]]:
    """Bugs in the kernel that ran, as edits of its module."""
    launch = product_of(gpu)
    bugs = [(m.what, m.ptx) for m in mutants(launch.ptx, launch.name) if not m.harmless]
    if any("wait_group" in what for what, _ in bugs):
        bugs.append(("all waits weaker", weaken_all_waits(launch.ptx, launch.name)))
    return [(what, functools.partial(_instead, launch.ptx, ptx)) for what, ptx in bugs]


def _instead(module: str, bug: str, ptx: str) -> str:
    return bug if ptx == module else ptx


@pytest.mark.parametrize(
    "kernel", ["gemv", *(pytest.param(k, marks=full) for k in (*KERNELS, *FP32) if k != "gemv")]
)
def test_planted_bugs_are_found(kernel: str) -> None:
    """With inputs for the whole of the ring, or for a part of its first turn."""
    problems = [make(kernel, 131, k, parts=())[0] for k in (1344, 64)]
    with device(80) as gpu:
        expected = [run(problem)[0] for problem in problems[:1]]
    bugs = planted(gpu)
    with device(80):
        expected.append(run(problems[1])[0])

    def found(edit: Callable[[str], str]) -> bool:
        try:
            with device(80, edit=edit):
                return any(not torch.equal(run(p)[0], y) for p, y in zip(problems, expected, strict=True))
        except gpuless.Report:
            return True

    # Between lanes of a warp the emulator sees no race (its README).
    missed = [what for what, edit in bugs if not found(edit) and "bar.warp.sync" not in what]
    assert not missed
