"""The codec against bitsandbytes' CPU kernels, bit by bit, and against the definition of the format."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch

import peft_kernels as pk
from peft_kernels.ops.nf4.reference import NF4_CODE, dynamic_code

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODE = torch.tensor(NF4_CODE)


def decision_points(count: int) -> torch.Tensor:
    """Blocks of every midpoint between two codes, and its neighbours in fp32, times an absmax: [count, 64].

    With most absmax some element changes its index when w * (1 / absmax) is computed as w / absmax.
    """
    points = (CODE[:-1] + CODE[1:]) / 2
    up, down = points.nextafter(torch.tensor(2.0)), points.nextafter(torch.tensor(-2.0))
    block = torch.cat([points, up, down, torch.tensor([1.0, -1.0, 0.0, -0.0]), points])
    absmax = torch.randn(count, 1, generator=torch.Generator().manual_seed(2)).exp()
    return block * absmax


def adversarial() -> dict[str, torch.Tensor]:
    inf, nan = math.inf, math.nan
    normal = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    return {
        "empty": torch.empty(0, 64),
        "all zero": torch.zeros(3, 64),
        "zero block, zero partial block": torch.cat([torch.zeros(64), torch.ones(64), torch.zeros(7)]),
        "negative zero": torch.full((64,), -0.0),
        "one element": torch.tensor([-2.5]),
        "constant": torch.full((4, 64), 0.3),
        "decision points": decision_points(40),
        "code values": (CODE * 1.7).repeat(4),
        "one outlier a block": torch.where(torch.arange(512).view(8, 64) % 64 == 5, 1e4, normal),
        "largest floats": normal.clamp(-1, 1) * 3.4e38,
        "smallest normals": normal * 1.2e-38,
        "subnormals": normal * 1e-40,
        "subnormal partial block": normal.flatten()[:33] * 1e-40,
        "around the smallest divisor": torch.cat([torch.full((64,), 1e-38), torch.full((9,), 0.99e-38)]),
        "infinite": torch.where(torch.arange(512).view(8, 64) % 100 == 3, inf, normal),
        "both infinities": torch.where(torch.arange(512).view(8, 64) % 100 < 2, -inf, normal),
        "not a number": torch.where(torch.arange(512).view(8, 64) % 130 == 1, nan, normal),
        "not a number, partial block": torch.where(torch.arange(50) == 49, nan, normal.flatten()[:50]),
        "infinite, partial block": torch.where(torch.arange(51) == 50, inf, normal.flatten()[:51]),
    }


def random_tensor(index: int) -> tuple[torch.Tensor, int, bool]:
    """A tensor, blocksize and double_quant; sizes odd and even, around and far from block ends."""
    generator = torch.Generator().manual_seed(index)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    blocksize = 2 ** pick(5, 13)
    n = (
        pick(1, 4 * blocksize),
        blocksize * pick(1, 9),
        blocksize * pick(1, 5) + pick(-1, 2),
        pick(1, 40000),
    )[index % 4]
    values = torch.randn(n, generator=generator) * 10.0 ** pick(-6, 5) + pick(0, 2) * torch.rand(
        (), generator=generator
    )
    return values.to(DTYPES[index % 3]), blocksize, bool(pick(0, 2))


def assert_same_as_bitsandbytes(weight: torch.Tensor, blocksize: int, double_quant: bool) -> None:
    packed, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant
    )
    ours = pk.functional.nf4_quantize(weight, blocksize, double_quant)
    assert_same_bits(ours.packed, packed.flatten())
    assert_same_bits(ours.absmax, state.absmax)
    if double_quant:
        assert ours.nested is not None
        assert_same_bits(ours.nested.absmax, state.state2.absmax)
        assert_same_bits(ours.nested.code, state.state2.code)
        assert_same_bits(ours.nested.offset, state.offset)
    # Dequantised as one row: with rows that are not whole blocks bitsandbytes may be wrong; see below.
    state.shape = torch.Size([weight.numel()])
    for dtype in DTYPES:
        state.dtype = dtype
        theirs = bnb.dequantize_4bit(packed, state) if weight.numel() else weight
        dense = pk.functional.nf4_dequantize(ours, dtype)
        assert dense.shape == weight.shape
        assert dense.dtype == dtype
        theirs, dense = theirs.flatten().float(), dense.flatten().float()
        if dtype == torch.bfloat16:
            # bitsandbytes flushes subnormals where the CPU has AVX512-BF16; its scalar code rounds NaN to 0.
            same = ~(dense.abs() < torch.finfo(dtype).tiny) & ~dense.isnan()
            assert torch.equal(dense.isnan(), ours.dequantize(torch.float32).flatten().isnan())
            theirs, dense = theirs[same], dense[same]
        assert_same_bits(dense, theirs)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit by bit, the sign of zero included; a NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype.is_floating_point:
        nan = actual.isnan()
        assert torch.equal(nan, expected.isnan())
        assert torch.equal(actual.signbit() & ~nan, expected.signbit() & ~nan)
        actual, expected = actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("index", range(200))
def test_random_tensors_equal_bitsandbytes(index: int) -> None:
    assert_same_as_bitsandbytes(*random_tensor(index))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(adversarial()))
def test_adversarial_tensors_equal_bitsandbytes(name: str, dtype: torch.dtype, double_quant: bool) -> None:
    assert_same_as_bitsandbytes(adversarial()[name].to(dtype), 64, double_quant)


def test_decision_points_in_partial_blocks_equal_bitsandbytes() -> None:
    for block in decision_points(40):
        for size in (49, 63):
            assert_same_as_bitsandbytes(block[:size], 64, double_quant=False)


def test_many_blocks_double_quantised() -> None:
    """More absmax than one nested block, a partial last one, and one whose absmax are all equal."""
    weight = torch.randn(300 * 64 + 11) * torch.rand(()).exp()
    weight[256 * 64 :] = 1.0
    assert_same_as_bitsandbytes(weight, 64, double_quant=True)


def test_dynamic_code_equals_bitsandbytes() -> None:
    assert_same_bits(dynamic_code(torch.device("cpu")), bnb.create_dynamic_map())


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("shape", [(3, 80), (5, 33), (7,), (2, 3, 48)], ids=str)
def test_dequantize_is_the_definition_whatever_the_rows(shape: tuple[int, ...], blocksize: int) -> None:
    """Blocks run on across rows. (bitsandbytes' AVX-512 kernel reads the wrong absmax for K = 80.)"""
    w = pk.functional.nf4_quantize(torch.randn(shape), blocksize)
    nibbles = [nibble for byte in w.packed.tolist() for nibble in (byte >> 4, byte & 15)]
    expected = [float(CODE[nibbles[e]] * w.absmax[e // blocksize]) for e in range(math.prod(shape))]
    assert_same_bits(w.dequantize(), torch.tensor(expected).reshape(shape))


def test_nearest_code_within_half_a_gap() -> None:
    weight = torch.randn(64, 64)
    w = pk.functional.nf4_quantize(weight)
    largest_gap = (CODE[1:] - CODE[:-1]).max()
    absmax = w.absmax.repeat_interleave(64).reshape(64, 64)
    assert ((w.dequantize() - weight).abs() <= absmax * largest_gap / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("transform", ["transposed", "strided", "expanded"])
def test_quantize_reads_any_strides_in_row_major_order(transform: str) -> None:
    base = torch.randn(64, 96)
    weight = {"transposed": base.t(), "strided": base[:, ::3], "expanded": base[:1].expand(5, 96)}[transform]
    ours, expected = pk.functional.nf4_quantize(weight), pk.functional.nf4_quantize(weight.contiguous())
    assert_same_bits(ours.packed, expected.packed)
    assert_same_bits(ours.absmax, expected.absmax)


def test_inputs_are_not_changed() -> None:
    weight = torch.randn(40, 50)
    before = weight.clone()
    w = pk.functional.nf4_quantize(weight, double_quant=True)
    parts = [t.clone() for t in w.base_weight()[:5]]
    w.dequantize()
    assert torch.equal(weight, before)
    assert all(torch.equal(a, b) for a, b in zip(parts, w.base_weight()[:5], strict=True))


@pytest.mark.parametrize("threads", [2, 3])
def test_any_thread_count_gives_the_same_bits(threads: int) -> None:
    weight = torch.randn(257, 515)
    one = pk.functional.nf4_quantize(weight)
    dense = one.dequantize()
    torch.set_num_threads(threads)
    many = pk.functional.nf4_quantize(weight)
    assert_same_bits(many.packed, one.packed)
    assert_same_bits(many.absmax, one.absmax)
    assert_same_bits(many.dequantize(), dense)


def test_quantize_takes_part_in_no_gradient() -> None:
    weight = torch.randn(8, 64, requires_grad=True)
    w = pk.functional.nf4_quantize(weight, double_quant=True)
    assert not w.packed.requires_grad
    assert not w.dequantize().requires_grad
