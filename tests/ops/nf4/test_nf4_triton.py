"""The codec's Triton kernels on emulated GPUs, against the reference bit by bit."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
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
from gpuless.driver import EmulatedGPU
from gpuless.static import budget
from peft_kernels.ops.nf4 import triton as kernels
from peft_kernels.ops.nf4.reference import NF4_CODE
from peft_kernels.ops.nf4.schema import BLOCKSIZES
from peft_kernels.ops.nf4.triton import TILE, code_table, decode

OPS = torch.ops.peft_kernels
ARCHS = (80, 90, 120)


@contextlib.contextmanager
def emulated(arch: int, *, gather: bool = False) -> Iterator[EmulatedGPU]:
    """Triton's kernels on an emulated GPU; with `gather` they look codes up as they do on AMD."""
    with pytest.MonkeyPatch.context() as patch, gpuless.device(arch) as device, pk.use_backend("triton"):
        if gather:
            patch.setattr(kernels, "has_shuffle", lambda: False)
        yield device


@pytest.fixture(params=ARCHS)
def gpu(request: pytest.FixtureRequest) -> Iterator[EmulatedGPU]:
    with emulated(request.param) as device:
        yield device


@pytest.mark.parametrize("n", [1, 2, 63, TILE - 1, 2 * TILE + 33])
def test_sizes_equal_reference(gpu: EmulatedGPU, n: int) -> None:
    """Odd and even, one CTA and several, with a partial block and without."""
    for blocksize in (32, 256, 4096):
        assert_same_as_reference(torch.randn(n), blocksize, n % 3 == 0, DTYPES[n % 3 :][:1])
    assert {launch.name for launch in gpu.launches} == {"quantize_kernel", "dequantize_kernel"}


@pytest.mark.parametrize("name", list(adversarial()))
def test_adversarial_tensors_equal_reference(name: str) -> None:
    with emulated(90):
        assert_same_as_reference(adversarial()[name], 64, False)


@pytest.mark.gpuless_full
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(adversarial()))
def test_adversarial_tensors_of_every_dtype(
    gpu: EmulatedGPU, name: str, dtype: torch.dtype, double_quant: bool
) -> None:
    for blocksize in (32, 64, 4096):
        assert_same_as_reference(adversarial()[name].to(dtype), blocksize, double_quant)


@pytest.mark.gpuless_full
@pytest.mark.parametrize("index", range(200))
def test_random_tensors_equal_reference(gpu: EmulatedGPU, index: int) -> None:
    assert_same_as_reference(*random_tensor(index))


@pytest.mark.parametrize("size", [49, 63])
def test_decision_points_in_partial_blocks(size: int) -> None:
    """Full blocks multiply by a reciprocal, a partial one divides: the last bit decides on an index."""
    with emulated(80):
        for block in decision_points(12):
            assert_same_as_reference(block[:size], 64, False, (torch.float32,))


@pytest.mark.parametrize("size", [3e38, 1e-37, 1e-39])
def test_every_code_times_every_kind_of_absmax(gpu: EmulatedGPU, size: float) -> None:
    """All 16 codes in blocks whose absmax go to the largest number and down to subnormals."""
    absmax = size * torch.cat([torch.tensor([0.0, 1.0]), torch.rand(30)])
    byte = torch.arange(256, dtype=torch.uint8)  # every pair of codes
    arguments = (byte.repeat(2), absmax, None, None, None, 0, 32, (64, 16))
    for dtype in DTYPES:
        expected = OPS.nf4_dequantize.reference(*arguments, dtype)
        assert_same_bits(OPS.nf4_dequantize.triton(*arguments, dtype), expected)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_absmax_that_is_no_number(special: float) -> None:
    arguments = (
        torch.arange(64, dtype=torch.uint8),
        torch.tensor([special, 1.0]),
        *[None] * 3,
        0,
        64,
        (128,),
    )
    with emulated(90):
        found = OPS.nf4_dequantize.triton(*arguments, torch.float32)
    assert_same_bits(found, OPS.nf4_dequantize.reference(*arguments, torch.float32))


@pytest.mark.parametrize(("blocksize", "arch"), list(zip(BLOCKSIZES, itertools.cycle(ARCHS), strict=False)))
def test_blocksizes_and_nested_scales(blocksize: int, arch: int) -> None:
    """Several nested blocks where that is not too slow; a second pass has the same bits."""
    weight = torch.randn(min(300 * blocksize, 5 * TILE) + 11)
    with emulated(arch):
        for dtype in (torch.float32, torch.bfloat16):
            assert_same_as_reference(weight.to(dtype), blocksize, True, (dtype,))
        once, again = (pk.functional.nf4_quantize(weight, blocksize) for _ in range(2))
        assert_same_bits(once.packed, again.packed)
        assert_same_bits(once.dequantize(), again.dequantize())


@pytest.mark.parametrize("arch", ARCHS)
def test_gather_decodes_as_the_shuffle_does(arch: int) -> None:
    """What runs where there is no NVIDIA shuffle; its CTA holds no inline PTX."""
    w = pk.functional.nf4_quantize(torch.randn(TILE + 129), 64, double_quant=True)
    with emulated(arch, gather=True) as gpu:
        found = [w.dequantize(dtype) for dtype in DTYPES]
        assert all("shfl.sync.idx" not in launch.ptx for launch in gpu.launches)
    with emulated(arch) as gpu:
        shuffled = [w.dequantize(dtype) for dtype in DTYPES]
        assert all("shfl.sync.idx" in launch.ptx for launch in gpu.launches)
    with pk.use_backend("reference"):
        expected = [w.dequantize(dtype) for dtype in DTYPES]
    for one, other, dense in zip(found, shuffled, expected, strict=True):
        assert_same_bits(one, dense)
        assert_same_bits(other, dense)


@triton.jit
def decode_kernel(packed_ptr, high_ptr, low_ptr, N: tl.constexpr, SHUFFLE: tl.constexpr):
    packed = tl.load(packed_ptr + tl.arange(0, N))
    high, low = decode(packed, code_table(SHUFFLE), SHUFFLE)
    tl.store(high_ptr + tl.arange(0, N), high)
    tl.store(low_ptr + tl.arange(0, N), low)


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffle", "gather"])
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_decode_of_every_byte(gpu: EmulatedGPU, warps: int, shuffle: bool) -> None:
    """In tiles that give a thread fewer than the four bytes that the shuffle takes at once, and more."""
    packed, code = torch.arange(256, dtype=torch.uint8), torch.tensor(NF4_CODE)
    high, low = torch.empty(256), torch.empty(256)
    decode_kernel[(1,)](packed, high, low, 256, shuffle, num_warps=warps, enable_fp_fusion=False)
    assert_same_bits(high, code[(packed >> 4).long()])
    assert_same_bits(low, code[(packed & 15).long()])


@pytest.mark.parametrize("transform", ["transposed", "strided", "expanded", "shifted"])
def test_any_strides_and_alignment(gpu: EmulatedGPU, transform: str) -> None:
    base = torch.randn(34, 48)
    weight = {
        "transposed": base.t(), "strided": base[:, ::3], "expanded": base[:1].expand(5, 48),
        "shifted": base.flatten()[1:200],
    }[transform]  # fmt: skip
    assert_same_as_reference(weight, 64, False, (torch.float32,))


def test_parts_that_are_not_contiguous(gpu: EmulatedGPU) -> None:
    w = pk.functional.nf4_quantize(torch.randn(9, 1000), 32, double_quant=True)
    spread = [
        part.repeat_interleave(2)[::2] if isinstance(part, torch.Tensor) and part.dim() else part
        for part in w.base_weight()
    ]
    found = OPS.nf4_dequantize.triton(*spread, w.shape, torch.float32)
    assert_same_bits(found, OPS.nf4_dequantize.reference(*spread, w.shape, torch.float32))


@pytest.mark.parametrize("arch", ARCHS)
def test_bytes_and_wavefronts_are_the_fewest(arch: int) -> None:
    """Every byte moves once, 16 at a time; nothing is kept in local memory."""
    weight = torch.randn(2 * TILE).bfloat16()
    with gpuless.device(arch, counts=True) as gpu, pk.use_backend("triton"):
        w = pk.functional.nf4_quantize(weight)
        w.dequantize()
    for launch in gpu.launches:
        moved = sum((*launch.result.bytes_read.values(), *launch.result.bytes_written.values()))
        assert moved == weight.nbytes + w.packed.nbytes + w.absmax.nbytes
        assert all(access.excess <= 1.1 for access in launch.result.accesses)
        found = budget(launch)
        assert found.in_registers
        assert found.occupancy.ctas >= 2


def test_nothing_is_launched_for_nothing(gpu: EmulatedGPU) -> None:
    w = pk.functional.nf4_quantize(torch.empty(0, 64))
    assert w.packed.shape == w.absmax.shape == (0,)
    assert w.dequantize().shape == (0, 64)
    assert not gpu.launches


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
    with emulated(90):
        torch.library.opcheck(OPS.nf4_quantize.triton, (weight, 64))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_dequantize(dtype: torch.dtype, double_quant: bool) -> None:
    w = pk.functional.nf4_quantize(torch.randn(9, 35), 32, double_quant)
    with emulated(90):
        torch.library.opcheck(OPS.nf4_dequantize.triton, (*w.base_weight(), w.shape, dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(95, dtype=torch.uint8)}, "packed must be"),
        ({6: 100}, "blocksize must be one of 32, 64"),
        ({8: torch.float64}, "dtype must be float32, bfloat16 or float16, got float64"),
    ],
)
def test_bad_input_is_refused_before_a_launch(gpu: EmulatedGPU, change: dict[int, Any], message: str) -> None:
    w = pk.functional.nf4_quantize(torch.randn(3, 64))
    launched = len(gpu.launches)
    arguments = [change.get(i, value) for i, value in enumerate((*w.base_weight(), w.shape, torch.float32))]
    with pytest.raises(ValueError, match=message):
        OPS.nf4_dequantize.triton(*arguments)
    assert len(gpu.launches) == launched
