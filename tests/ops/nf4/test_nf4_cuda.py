"""The codec's CUDA C++ kernels on emulated GPUs, against the reference and the CPU's kernels bit by bit."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from nf4_tensors import (
    DTYPES,
    adversarial,
    assert_same_as_reference,
    assert_same_bits,
    decision_points,
    random_tensor,
)

import gpuless
import peft_kernels as pk
from gpuless import toolchain
from gpuless.sass import disassemble
from gpuless.static import cubin_budget
from peft_kernels.core.library import native_library
from peft_kernels.ops.nf4.schema import BLOCKSIZES

OPS = torch.ops.peft_kernels
SOURCE = toolchain.ROOT / "csrc" / "cuda" / "nf4.cu"
TILE = 8192  # weights of a CTA that dequantises; one that quantises has half
full = pytest.mark.gpuless_full


@pytest.mark.parametrize("n", [1, 2, 63, TILE - 1, TILE, 2 * TILE + 2049])
def test_sizes(cuda_gpu: Any, n: int) -> None:
    """Odd and even; tiles that are whole, and that are not; a partial block and none."""
    for blocksize in (32, 256, 4096):
        assert_same_as_reference(torch.randn(n), blocksize, n % 3 == 0, DTYPES[n % 3 :][:1])
    assert all(launch.shown.startswith(("quantize", "dequantize")) for launch in cuda_gpu.launches)


@pytest.mark.parametrize("name", list(adversarial()))
def test_adversarial_tensors(cuda_gpu: Any, name: str) -> None:
    """As they are, one element at a time; and among others, in a tile that is whole."""
    weight = adversarial()[name].flatten()
    others = torch.randn(TILE, generator=torch.Generator().manual_seed(3))
    for tensor in (weight, torch.cat([weight, others])[:TILE]):
        assert_same_as_reference(tensor, 64, False, (torch.float32,))


@full
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(adversarial()))
def test_adversarial_tensors_of_every_dtype(
    cuda_gpu: Any, name: str, dtype: torch.dtype, double_quant: bool
) -> None:
    weight = torch.cat([adversarial()[name].flatten(), torch.randn(TILE)])
    for blocksize, tensor in itertools.product((32, 64, 4096), (weight, weight[:TILE])):
        assert_same_as_reference(tensor.to(dtype), blocksize, double_quant)


@full
@pytest.mark.parametrize("index", range(100))
def test_random_tensors(cuda_gpu: Any, index: int) -> None:
    assert_same_as_reference(*random_tensor(index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_up_to_one(cuda_gpu: Any, dtype: torch.dtype) -> None:
    """The nearest code is one of the two that a cubic leaves, for all of bf16 and what fp16 adds to it."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    values = values[values.abs() <= 1].to(dtype)
    blocks = values[: len(values) // 63 * 63].view(-1, 63)
    weight = torch.cat([blocks, torch.ones(len(blocks), 1, dtype=dtype)], 1)
    assert_same_as_reference(weight, 64, False, ())


def test_decision_points(cuda_gpu: Any) -> None:
    """Full blocks multiply by a reciprocal, a partial one divides: the last bit decides on an index."""
    points = decision_points(128)
    points[:64] /= points[:64].abs().amax(1, keepdim=True)  # absmax 1: the very midpoints
    assert_same_as_reference(points, 64, False, ())
    for block, size in itertools.product(decision_points(4), (49, 63)):
        assert_same_as_reference(block[:size], 64, False, ())


@pytest.mark.parametrize("size", [3e38, 1e-37, 1e-39])
def test_every_code_times_every_kind_of_absmax(cuda_gpu: Any, size: float) -> None:
    """The largest numbers and subnormals; zero, infinities and NaN; packed bytes that lie anywhere."""
    special = torch.tensor([0.0, 1.0, math.nan, math.inf, -math.inf])
    absmax = size * torch.cat([special, torch.rand(251)])
    byte = torch.arange(256, dtype=torch.uint8).repeat(16)  # every pair of codes
    anywhere = torch.empty(len(byte) + 1, dtype=torch.uint8)[1:].copy_(byte)
    for dtype in DTYPES:
        rest = (absmax, None, None, None, 0, 32, (TILE,), dtype)
        expected = OPS.nf4_dequantize.reference(byte, *rest)
        assert_same_bits(OPS.nf4_dequantize.cuda(byte, *rest), expected)
        assert_same_bits(OPS.nf4_dequantize.cuda(anywhere, *rest), expected)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocksizes_and_nested_scales(cuda_gpu: Any, blocksize: int) -> None:
    """Several nested blocks where that is not too slow; a second pass has the same bits."""
    weight = torch.randn(max(2 * TILE, min(300 * blocksize, 3 * TILE)) + 11)
    for dtype in DTYPES:
        assert_same_as_reference(weight.to(dtype), blocksize, True, (dtype,))
    once, again = (pk.functional.nf4_quantize(weight, blocksize) for _ in range(2))
    assert_same_bits(once.packed, again.packed)
    assert_same_bits(once.dequantize(), again.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_the_cpu(cuda_gpu: Any, dtype: torch.dtype) -> None:
    if not native_library().loaded:
        pytest.skip(f"native library not loaded: {native_library().reason}")
    weight = torch.randn(TILE + 500).to(dtype)
    with pk.use_backend("cpu"):
        expected = pk.functional.nf4_quantize(weight, 64, double_quant=True)
    ours = pk.functional.nf4_quantize(weight, 64, double_quant=True)
    assert_same_bits(ours.packed, expected.packed)
    assert_same_bits(ours.absmax, expected.absmax)
    with pk.use_backend("cpu"):
        dense = expected.dequantize(dtype)
    assert_same_bits(ours.dequantize(dtype), dense)


@pytest.mark.parametrize("transform", ["transposed", "strided", "expanded", "shifted"])
def test_any_strides_and_alignment(cuda_gpu: Any, transform: str) -> None:
    base = torch.randn(68, 144)
    weight = {
        "transposed": base.t(), "strided": base[:, ::3], "expanded": base[:1].expand(35, 144),
        "shifted": base.flatten()[1:4200],
    }[transform]  # fmt: skip
    for dtype in DTYPES:
        assert_same_as_reference(weight.to(dtype), 64, False, (dtype,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_bytes_and_transactions_are_the_fewest(dtype: torch.dtype, double_quant: bool) -> None:
    """Every byte moves once; sectors and wavefronts are what the bytes need, in 16-byte loads and stores."""
    weight = torch.randn(2 * TILE).to(dtype)
    with gpuless.cuda(90, counts=True) as gpu, pk.use_backend("cuda"):
        w = pk.functional.nf4_quantize(weight)
        quantize = gpu.launches[-1].result
        w = pk.functional.nf4_quantize(weight, 64, double_quant)
        w.dequantize(dtype)
        dequantize = gpu.launches[-1].result
    size = w.packed.nbytes + weight.nbytes
    for result, scales in ((quantize, 4 * 256), (dequantize, w.absmax.nbytes)):
        moved = sum((*result.bytes_read.values(), *result.bytes_written.values()))
        assert size + scales <= moved <= size + scales + 2048  # and tables
        for access in result.accesses:
            nested_code = access.name.endswith("nc.f32") and double_quant
            assert access.transactions == access.ideal or nested_code, access
        wide = [a for a in result.accesses if ".v4." in a.name and a.space == "global"]
        read = w.packed.nbytes if result is dequantize else 0
        assert sum(access.bytes for access in wide) >= weight.nbytes + read


def test_a_missing_barrier_is_found() -> None:
    """Where a block is more than a warp's 1024 weights, warps exchange what they found."""

    def without_barrier(ptx: str) -> str:
        changed, count = re.subn(r"bar\.sync\s+0;", "", ptx)
        assert count
        return changed

    weight = torch.randn(2 * TILE)
    with gpuless.cuda(80, edit=without_barrier), pk.use_backend("cuda"):
        pk.functional.nf4_quantize(weight, 1024)
        for blocksize in (2048, 4096):
            with pytest.raises(gpuless.Report, match=r"shared race|uninitialised"):
                pk.functional.nf4_quantize(weight, blocksize)


@pytest.mark.parametrize("arch", [90, *(pytest.param(each, marks=full) for each in (80, 86, 89, 100, 120))])
def test_everything_stays_in_registers(nvcc: str, arch: int) -> None:
    code = toolchain.cubin(SOURCE, arch)
    kernels = list(disassemble(code))
    assert len(kernels) == 6
    for kernel in kernels:
        found = cubin_budget(code, arch, threads=128, kernel=kernel)
        assert found.in_registers, found
        assert found.occupancy.ctas >= 8, found


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(5, 33),
        torch.randn(64, 48).t(),
        torch.randn(1, 64).expand(4, 64).bfloat16(),
        torch.empty(0, 4),
    ],
    ids=["odd", "transposed", "stride 0", "empty"],
)
def test_opcheck_quantize(weight: torch.Tensor) -> None:
    with gpuless.cuda(80):
        torch.library.opcheck(OPS.nf4_quantize.cuda, (weight, 64))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_opcheck_dequantize(double_quant: bool) -> None:
    w = pk.functional.nf4_quantize(torch.randn(9, 35), 32, double_quant)
    with gpuless.cuda(80):
        torch.library.opcheck(OPS.nf4_dequantize.cuda, (*w.base_weight(), w.shape, torch.bfloat16))


def test_nothing_is_launched_for_nothing(cuda_gpu: Any) -> None:
    w = pk.functional.nf4_quantize(torch.empty(0, 64))
    assert w.packed.shape == w.absmax.shape == (0,)
    assert w.dequantize().shape == (0, 64)
    assert not cuda_gpu.launches
