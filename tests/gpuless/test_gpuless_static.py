"""Static budgets: counts worked out by hand, NVIDIA's own occupancy header, a kernel made to spill."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import gpuless
from gpuless import sass
from gpuless.occupancy import MULTIPROCESSORS, REGISTERS, amd_occupancy, occupancy
from gpuless.static import TARGETS, amdgcn_budget, budget, compiled_for, cubin_budget, ptx_budget

NVIDIA = tuple(target for target in TARGETS if isinstance(target, int))
AMD = tuple(target for target in TARGETS if isinstance(target, str))
BOUNDS = {"registers": 64, "threads": 128, "shared": 0}


@triton.jit
def product(x, w, y, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y [BM, BN] = x [BM, K] @ w [K, BN], in 16-bit tiles."""
    rows, columns, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(x + rows[:, None] * K + start + k[None, :])
        b = tl.load(w + (start + k)[:, None] * BN + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(y + rows[:, None] * BN + columns[None, :], total)


@triton.jit
def sums_of_rows(x, y, K, BK: tl.constexpr):
    """y [M] = sums of the rows of x [M, K], K at most BK: no loop."""
    k = tl.arange(0, BK)
    row = tl.program_id(0)
    tl.store(y + row, tl.sum(tl.load(x + row * K + k, mask=k < K, other=0.0)))


def launched(arch=80, tile=(64, 64, 64), k=256, **options):
    m, n, _ = tile
    x, w, y = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((m, k), (k, n), (m, n)))
    with gpuless.device(arch, execute=False) as gpu:
        product[(1,)](x, w, y.float(), k, *tile, enable_fp_fusion=True, **options)
    (launch,) = gpu.launches
    return launch


# The rules, each limit in turn, worked out by hand from the table in occupancy.py.
@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "ctas", "limiter"),
    [
        (80, 32, 1024, 0, 2, "warps, registers"),  # 64 warps of 32; 65536 / (32 * 1024)
        (86, 32, 1024, 0, 1, "warps"),  # 48 of 32
        (90, 16, 32, 0, 32, "CTAs"),  # 64 warps would be there
        (86, 16, 32, 0, 16, "CTAs"),
        (89, 16, 32, 0, 24, "CTAs"),
        (80, 128, 128, 0, 4, "registers"),  # 4096 a warp, 4 warps on each of 4 sub-partitions
        (
            80,
            129,
            128,
            0,
            3,
            "registers",
        ),  # rounded up to 136 registers a thread, 4352 a warp: 3 a sub-partition
        (80, 136, 128, 0, 3, "registers"),
        (80, 255, 256, 0, 1, "registers"),  # 8192 a warp, 2 a sub-partition, 8 in all
        (80, 168, 160, 0, 2, "registers"),  # 5376 a warp, 3 a sub-partition, 12 in all: 2 CTAs of 5
        (80, 32, 128, 164 * 1024 // 2 - 1024, 2, "shared memory"),
        (80, 32, 128, 164 * 1024 // 2 - 1023, 1, "shared memory"),
        (90, 32, 128, 227 * 1024, 1, "shared memory"),
        (90, 32, 128, 227 * 1024 + 1, 0, "shared memory"),
        (120, 32, 128, 49 * 1024, 2, "shared memory"),  # 100 KiB, 1 KiB reserved for each
        (120, 32, 128, 50 * 1024, 1, "shared memory"),
    ],
)
def test_occupancy_by_hand(arch, registers, threads, shared, ctas, limiter):
    found = occupancy(arch, registers=registers, threads=threads, shared=shared)
    assert (found.ctas, found.limiter) == (ctas, limiter)
    assert found.share == ctas * -(-threads // 32) / MULTIPROCESSORS[arch].warps


_HEADER = Path(triton.__file__).parent / "backends" / "nvidia" / "include" / "cuda_occupancy.h"
_CALCULATOR = """
#include <climits>
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int arch, warps, registers, threads, shared_of_sm, shared;
  while (std::scanf("%d %d %d %d %d %d", &arch, &warps, &shared_of_sm, &registers, &threads, &shared) == 6) {
    cudaOccDeviceProp device;
    device.computeMajor = arch / 10, device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = shared_of_sm;
    device.sharedMemPerBlockOptin = shared_of_sm - 1024, device.reservedSharedMemPerBlock = 1024;
    device.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = INT_MAX, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = shared_of_sm - 1024;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult found;
    auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&found, &device, &kernel, &state, threads, shared);
    std::printf("%d\\n", error == CUDA_OCC_SUCCESS ? found.activeBlocksPerMultiprocessor : -1);
  }
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_occupancy_is_that_of_the_cuda_header(tmp_path):
    (tmp_path / "calculator.cpp").write_text(_CALCULATOR)
    calculator = tmp_path / "calculator"
    subprocess.run(
        ["c++", "-std=c++17", "-w", f"-I{_HEADER.parent}", tmp_path / "calculator.cpp", "-o", calculator],
        check=True,
    )
    draw = random.Random(0)
    cases = [
        (
            arch,
            draw.randint(16, 255),
            32 * draw.randint(1, 32),
            draw.choice([0, draw.randint(0, limits.shared)]),
        )
        for arch, limits in MULTIPROCESSORS.items()
        for _ in range(500)
    ]
    lines = (
        f"{arch} {MULTIPROCESSORS[arch].warps} {MULTIPROCESSORS[arch].shared} {registers} {threads} {shared}"
        for arch, registers, threads, shared in cases
    )
    run = subprocess.run([calculator], input="\n".join(lines), capture_output=True, text=True, check=True)
    expected = [int(line) for line in run.stdout.split()]
    found = [occupancy(a, registers=r, threads=t, shared=s).ctas for a, r, t, s in cases]
    assert found == expected
    assert len(set(expected)) > 5


def test_amd_occupancy_by_hand():
    # 4 SIMDs with 4 waves each, workgroups of 4 waves; 64 KiB of LDS
    args = {"waves": 4, "threads": 256, "wave_size": 64}
    assert amd_occupancy("gfx942", **args, shared=0).ctas == 4
    assert amd_occupancy("gfx942", **args, shared=16 << 10).ctas == 4
    assert amd_occupancy("gfx942", **args, shared=(16 << 10) + 1).ctas == 3
    assert amd_occupancy("gfx942", **args, shared=0).share == 0.5


# 64 x 64 x 64 by mma m16n8k16: 128 warp instructions, 32 a warp. wgmma m64n64k16: 4 of the whole warpgroup.
# MFMA 32x32x8: 32 over 4 waves. WMMA 16x16x16: 64 over 4 waves.
@pytest.mark.parametrize(
    ("target", "tensor", "opcode"),
    [
        *((arch, 32, "HMMA") for arch in (80, 86, 89, 120)),
        (90, 4, "HGMMA"),
        (100, 4, "UTCHMMA"),
        *((arch, 8, "v_mfma_f32_32x32x8") for arch in ("gfx90a", "gfx942")),
        ("gfx1100", 16, "v_wmma_f32_16x16x16"),
    ],
)
def test_tensor_instructions_of_the_hot_loop(target, tensor, opcode):
    loop = budget(launched(num_warps=4, num_stages=2), target).loop
    assert loop.in_loop
    assert loop.tensor == tensor
    assert sum(count for name, count in loop.opcodes.items() if name.startswith(opcode)) == tensor
    assert loop.instructions == loop.opcodes.total() > tensor


def test_registers_and_occupancy_are_those_that_ptxas_says():
    found = budget(launched(80, num_warps=4))
    again = ptx_budget(launched(80, num_warps=4).ptx, 80, threads=32, dynamic_shared=found.shared_bytes)
    assert again == found  # the 128 threads stand in the code
    assert (found.target, found.threads) == ("sm_80", 128)
    assert found.occupancy == occupancy(80, registers=found.registers, threads=128, shared=found.shared_bytes)
    assert 32 < found.registers <= 255
    assert REGISTERS // (found.registers * 128) >= found.occupancy.ctas >= 1


@pytest.mark.parametrize("arch", NVIDIA)
def test_shared_memory_is_what_the_tiles_take(arch):
    one, three = (budget(launched(arch, num_stages=stages)).shared_bytes for stages in (1, 3))
    assert three > one
    assert three >= 2 * (64 * 64 + 64 * 64) * 2  # stages - 1 pairs of bf16 tiles in flight


@pytest.mark.parametrize("arch", NVIDIA)
def test_static_shared_memory_is_counted_and_the_systems_is_not(arch):
    ptx = f".version 8.7\n.target sm_{arch}\n.address_size 64\n.visible .entry k() {{ ret; }}\n"
    assert ptx_budget(ptx, arch, threads=64).shared_bytes == 0
    static = ptx.replace("ret;", ".shared .b8 s[400]; .reg .b32 r; ld.volatile.shared.b32 r, [s]; ret;")
    assert ptx_budget(static, arch, threads=64).shared_bytes == 400
    assert ptx_budget(static, arch, threads=64, dynamic_shared=1000).shared_bytes == 1400


def test_a_kernel_with_too_few_registers_spills():
    tile = (128, 128, 32)
    plain, starved = (budget(launched(80, tile, num_warps=4, maxnreg=limit)) for limit in (None, 64))
    assert plain.spill_bytes == plain.stack_bytes == plain.local_instructions == 0
    assert plain.in_registers
    assert starved.registers == 64
    assert starved.spill_bytes > 128  # 128 sums of a thread do not fit
    assert starved.stack_bytes > 0
    assert starved.local_instructions > 0
    assert not starved.in_registers


def test_a_cubin_says_the_same_but_for_spills(tmp_path):
    launch = launched(90)
    whole = budget(launch)
    with pytest.raises(ValueError, match="kernel must name one of product, got other"):
        cubin_budget(_cubin(launch), 90, threads=128, kernel="other")
    found = cubin_budget(_cubin(launch), 90, threads=128, dynamic_shared=launch.shared)
    assert found.spill_bytes is None
    assert (found.registers, found.shared_bytes, found.loop) == (
        whole.registers,
        whole.shared_bytes,
        whole.loop,
    )


def _cubin(launch):
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    return triton.compile(launch.source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_launched_compiles_for_every_target(target):
    launch = launched(80, num_warps=8, num_stages=2)
    kernel = compiled_for(launch, target)
    assert kernel.metadata.num_warps == 8
    assert kernel.metadata.num_stages == 2
    assert (f".target sm_{target}" if target in NVIDIA else target) in kernel.code
    found = budget(launch, target)
    assert found.threads == 8 * (64 if target in ("gfx90a", "gfx942") else 32)
    assert found.in_registers


def test_the_specialisation_of_the_launch_is_kept():
    """Rows of x can be copied 16 bytes at a time where 16 divides K, those of w always."""
    aligned, ragged = (launched(80, k=k) for k in (256, 257))
    copies = [compiled_for(launch, 86).code.count("cp.async.cg") for launch in (aligned, ragged)]
    assert copies[0] > copies[1] > 0


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"target must be one of 80, 86, .*gfx1100, got gfx1201"):
        compiled_for(launched(), "gfx1201")


def test_a_kernel_without_a_loop_is_counted_whole():
    x, y = torch.zeros(3, 100), torch.zeros(3)
    with gpuless.device(80, execute=False) as gpu:
        sums_of_rows[(3,)](x, y, 100, 128, enable_fp_fusion=True)
    loop = budget(gpu.launches[0]).loop
    assert not loop.in_loop
    assert loop.opcodes["STG"] == 1
    assert loop.opcodes["SHFL"] >= 5
    assert loop.tensor == 0


def test_instructions_per_weight():
    found = sass.Mix(pipes=sass.Counter(alu=6, fma=2), opcodes=sass.Counter(), in_loop=True)
    assert found.per_weight(4) == {"alu": 1.5, "fma": 0.5, "all": 2.0}


def instructions(*lines):
    """`name` or `name>target` or, ending the flow, `name!`, `name>target!`."""
    parsed = []
    for line in lines:
        opcode, _, jump = line.rstrip("!").partition(">")
        parsed.append(sass.Instruction(opcode, int(jump) if jump else None, line.endswith("!")))
    return parsed


def test_loops_are_natural_loops():
    nested = instructions("MOV", "HMMA", "FFMA", "BRA>2", "IADD3", "BRA>1", "EXIT!", "BRA>7!")
    assert sass.loops(nested) == [frozenset({1, 2, 3, 4, 5}), frozenset({2, 3})]
    assert sass.hot_loop(nested) == frozenset({1, 2, 3, 4, 5})  # where the tensor instruction is
    without = instructions("MOV", "FADD", "FFMA", "BRA>2", "IADD3", "BRA>1", "EXIT!")
    assert sass.hot_loop(without) == frozenset({2, 3})


def test_a_wait_out_of_line_belongs_to_the_loop_that_it_returns_to():
    code = instructions("MOV", "SYNCS", "BRA>6", "HMMA", "BRA>1", "EXIT!", "SYNCS", "BRA>6", "BRA>3!")
    assert sass.loops(code) == [frozenset({1, 2, 3, 4, 6, 7, 8}), frozenset({6, 7})]
    assert sass.hot_loop(code) == frozenset({1, 2, 3, 4, 6, 7, 8})


def test_code_without_a_loop():
    assert sass.hot_loop(instructions("MOV", "BRA>3", "FADD", "EXIT!", "BRA>4!")) is None


def test_amd_spills_of_vector_registers_go_to_memory():
    assembly = launched("gfx942").ptx
    none, scalar, vector = (
        amdgcn_budget(
            assembly.replace(f".{kind}_spill_count: 0", f".{kind}_spill_count: 3"), "gfx942", threads=256
        )
        for kind in ("no", "sgpr", "vgpr")
    )
    assert none.in_registers
    assert none == scalar
    assert vector.spill_bytes == 12
    assert not vector.in_registers


@pytest.mark.parametrize("arch", AMD)
def test_a_launch_for_amd_is_compiled_and_not_run(arch):
    with pytest.raises(ValueError, match="execute must be False for AMD GPUs"), gpuless.device(arch):
        pass
    launch = launched(arch)
    assert launch.metadata.target.backend == "hip"
    assert budget(launch).target == arch
    assert budget(launch).loop.tensor > 0
