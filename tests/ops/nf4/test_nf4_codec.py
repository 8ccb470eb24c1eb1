"""The codec against bitsandbytes' CPU kernels, bit by bit, and against the definition of the format."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from nf4_tensors import CODE, DTYPES, adversarial, assert_same_bits, decision_points, random_tensor

import peft_kernels as pk
from peft_kernels.ops.nf4.reference import dynamic_code

pytestmark = pytest.mark.usefixtures("backend")


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
