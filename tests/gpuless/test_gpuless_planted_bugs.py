"""Bugs planted in real kernels are reported; the kernels themselves are clean.

A mutant that is not caught must be one of which mutations.py shows, on the control flow of the PTX, that it
changes nothing.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import gpuless
from gpuless import Report, launch_ptx
from gpuless.mutations import mutants, weaken_all_waits
from gpuless.rounding import f32_to_bf16


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    MASKED: tl.constexpr = True,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = (start + k)[None, :] < K
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :], mask=(m[:, None] < M) & inside, other=0.0)
        if MASKED:
            b = tl.load(
                b_ptr + n[:, None] * K + (start + k)[None, :], mask=(n[:, None] < N) & inside, other=0.0
            )
        else:
            b = tl.load(b_ptr + n[:, None] * K + (start + k)[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))


M, N = 100, 96  # a multiple of 16 and yet ragged, as K below, so that Triton makes 16-byte copies


def problem(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    return tuple(torch.randn(rows, k, generator=generator).bfloat16() for rows in (M, N))


def compiled(arch: int, stages: int = 3) -> gpuless.driver.Launch:
    a, b = problem(176)
    with gpuless.device(arch) as gpu:
        matmul_kernel[(2, 2)](
            a, b, torch.empty(M, N), M, N, 176, 64, 64, 32, num_stages=stages, enable_fp_fusion=True
        )
    return gpu.launches[0]


def run(ptx: str, shared: int, k: int) -> bool:
    """Whether the result is right."""
    (a, b), c = problem(k), torch.full((M, N), float("nan"))
    launch_ptx(ptx, (2, 2), [a, b, c, M, N, k], shared=shared, argument_names=["a", "b", "c", "M", "N", "K"])
    exact = a.double() @ b.double().T
    bound = (k + 2) * 2.0**-24 * (a.double().abs() @ b.double().abs().T)
    return bool(((c - exact).abs() <= bound).all())


def is_caught(attempt: Callable[[], bool]) -> bool:
    """Reported, or a wrong result."""
    try:
        return not attempt()
    except Report:
        return True


@pytest.mark.parametrize("arch", [80, 90])
def test_pipelined_matmul(arch: int) -> None:
    kernel = compiled(arch)
    sizes = (176, 48, 16)  # the last block of K ragged; shorter than the pipeline
    assert all(run(kernel.ptx, kernel.shared, k) for k in sizes)
    planted = list(mutants(kernel.ptx))
    assert len(planted) > 15
    survivors = {
        m.what for m in planted if not is_caught(lambda m=m: all(run(m.ptx, kernel.shared, k) for k in sizes))
    }
    assert survivors == {m.what for m in planted if m.harmless}


@pytest.mark.parametrize("arch", [80, 90])
def test_waits_and_barriers_are_reported_whatever_the_result(arch: int) -> None:
    """The order of the emulator may hide a race from the numbers, never from the report."""
    kernel = compiled(arch)
    for mutant in mutants(kernel.ptx):
        if mutant.harmless or not any(word in mutant.what for word in ("bar", "wait", "fence")):
            continue
        with pytest.raises(Report):
            run(mutant.ptx, kernel.shared, 176)
    with pytest.raises(Report, match=r"never waited|was waited for|others see it"):
        run(weaken_all_waits(kernel.ptx), kernel.shared, 176)


def test_off_by_one_bound() -> None:
    kernel = compiled(80)
    a, b = problem(176)
    for m, n in ((M + 1, N), (M, N + 16)):
        with pytest.raises(Report, match=r"out of bounds|cross-CTA race"):
            launch_ptx(kernel.ptx, (2, 2), [a, b, torch.empty(M, N), m, n, 176], shared=kernel.shared)


@pytest.mark.parametrize("arch", [80, 90])
def test_missing_mask(arch: int) -> None:
    a, b = problem(176)
    with gpuless.device(arch), pytest.raises(Report, match="global out of bounds") as caught:
        matmul_kernel[(2, 2)](
            a, b, torch.empty(M, N), M, N, 176, 64, 64, 32, MASKED=False, enable_fp_fusion=True
        )
    found = caught.value.findings[0]
    assert "b_ptr" in found.message
    assert "test_gpuless_planted_bugs.py" in found.instruction.source


@triton.jit
def sum_kernel(x_ptr, total_ptr, n, B: tl.constexpr, ATOMIC: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    part = tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0))
    if ATOMIC:
        tl.atomic_add(total_ptr, part)
    else:
        tl.store(total_ptr, tl.load(total_ptr) + part)


def test_lost_update_between_ctas() -> None:
    x, total = torch.arange(100.0), torch.zeros(1)
    with gpuless.device(80):
        sum_kernel[(2,)](x, total, 100, B=64, ATOMIC=True, enable_fp_fusion=True)
        assert total.item() == 4950
        with pytest.raises(Report, match="cross-CTA race"):
            sum_kernel[(2,)](x, total, 100, B=64, ATOMIC=False, enable_fp_fusion=True)


CUDA = r"""
#include <cuda_pipeline.h>
#include <cuda_bf16.h>
// out[row] = sum over k of x[row, k] * w[k], a CTA per row: x comes in chunks of 256, two in flight.
extern "C" __global__ void __launch_bounds__(128) row_dot(
    const __nv_bfloat16* __restrict__ x, const float* __restrict__ w, float* __restrict__ out,
    int rows, int k)
{
    __shared__ __align__(16) __nv_bfloat16 chunk[2][256];
    __shared__ float partial[4];
    const __nv_bfloat16* row = x + (size_t)blockIdx.x * k;
    auto fetch = [&](int stage, int start) {
        int i = start + threadIdx.x * 8;
        if (threadIdx.x < 32 && i < k) __pipeline_memcpy_async(&chunk[stage][threadIdx.x * 8], row + i, 16);
        __pipeline_commit();
    };
    fetch(0, 0);
    float sum = 0.f;
    for (int start = 0, stage = 0; start < k; start += 256, stage ^= 1) {
        fetch(stage ^ 1, start + 256);
        __pipeline_wait_prior(1);
        __syncthreads();
        for (int j = threadIdx.x; j < 256 && start + j < k; j += 128)
            sum = fmaf(__bfloat162float(chunk[stage][j]), w[start + j], sum);
        __syncthreads();
    }
    for (int d = 16; d; d >>= 1) sum += __shfl_down_sync(0xffffffff, sum, d);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
}
"""


@pytest.fixture(scope="module")
def row_dot(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "row_dot.cu").write_text(CUDA)
    command = [nvcc, "-ptx", "-arch=sm_80", "-lineinfo", "-o", "row_dot.ptx", "row_dot.cu"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return Path(folder / "row_dot.ptx").read_text()


def run_row_dot(ptx: str, k: int, rows: int = 5) -> bool:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((rows, k)).astype(np.float32), rng.standard_normal(k).astype(np.float32)
    bits = f32_to_bf16(x)
    x = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    out = np.full(rows, np.nan, np.float32)
    launch_ptx(ptx, (rows,), [bits, w, out, rows, k], block=128, name="row_dot")
    return bool((np.abs(out - x @ w) <= k * 2.0**-24 * (np.abs(x) @ np.abs(w))).all())


def test_cuda_kernel_with_double_buffering(row_dot: str) -> None:
    sizes = (8, 256, 1000)
    assert all(run_row_dot(row_dot, k) for k in sizes)
    planted = list(mutants(row_dot, "row_dot"))
    assert len(planted) >= 4
    survivors = {
        m.what for m in planted if not is_caught(lambda m=m: all(run_row_dot(m.ptx, k) for k in sizes))
    }
    assert survivors == {m.what for m in planted if m.harmless}


def test_cuda_kernel_with_a_wrong_size(row_dot: str) -> None:
    x, w, out = np.zeros((5, 256), np.uint16), np.zeros(256, np.float32), np.zeros(5, np.float32)
    for arguments in (
        [x[:, :248].copy(), w, out, 5, 256],
        [x, w[:255].copy(), out, 5, 256],
        [x, w, out[:4].copy(), 5, 256],
    ):
        with pytest.raises(Report, match="global out of bounds"):
            launch_ptx(row_dot, (5,), arguments, block=128, name="row_dot")
