"""The Triton kernel of `philox_dropout` on emulated GPUs, and the mask that other kernels draw with it."""

import math

import pytest
import torch
import triton
import triton.language as tl

import peft_kernels as pk
from gpuless.driver import EmulatedGPU
from peft_kernels.ops.dropout.reference import philox4x32
from peft_kernels.ops.dropout.triton import TILE, keep_scale, keep_threshold, keep_tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = (0, 2**32 - 1, 2**63 - 1, -1, -(2**63))
dropout = pk.functional.philox_dropout


def bits(y: torch.Tensor) -> list[int]:
    """All bits but those of NaNs, which a GPU and torch make differently."""
    return torch.where(y.isnan(), 99.0, y.float()).view(torch.int32).tolist()


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_reference(gpu: EmulatedGPU, dtype: torch.dtype, p: float) -> None:
    for size, seed in zip((1, 17, 131, TILE, 2 * TILE + 7), SEEDS, strict=True):
        x = torch.randn(size).to(dtype)
        x[::5], x[1::5] = math.nan, -math.inf
        y = dropout(x, p, seed)
        with pk.use_backend("reference"):
            expected = dropout(x, p, seed)
        assert bits(y) == bits(expected), size
        assert bits(dropout(x, p, seed)) == bits(y)
    assert {launch.shared for launch in gpu.launches} == {0}


def test_dropout_of_nothing(gpu: EmulatedGPU) -> None:
    assert dropout(torch.empty(0, 3), 0.5, 1).shape == (0, 3)
    x = torch.randn(40)
    assert torch.equal(torch.ops.peft_kernels.philox_dropout.triton(x, 0.0, torch.tensor(1)), x)


def test_gradient_goes_through_the_same_mask(gpu: EmulatedGPU) -> None:
    x, grad = torch.randn(9, 7, requires_grad=True), torch.randn(7, 9).t()
    assert torch.equal(torch.autograd.grad(dropout(x, 0.3, 8), x, grad)[0], dropout(grad, 0.3, 8))


@pytest.mark.parametrize(
    "x", [torch.randn(5, 3).t().bfloat16(), torch.ones(1, 4).expand(3, 4), torch.empty(0, 2).half()]
)
def test_opcheck(gpu: EmulatedGPU, x: torch.Tensor) -> None:
    torch.library.opcheck(torch.ops.peft_kernels.philox_dropout.triton, (x, 0.25, torch.tensor(6)))


def test_float64_is_refused(gpu: EmulatedGPU) -> None:
    with pytest.raises(ValueError, match="x must be float32 or bfloat16 or float16, got float64; or leave"):
        torch.ops.peft_kernels.philox_dropout.triton(torch.ones(3).double(), 0.5, torch.tensor(1))


@triton.jit(do_not_specialize=["first_row", "threshold"])
def _mask_kernel(
    out_ptr, first_row, first_column, columns, seed_ptr, threshold,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPED: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    keep = keep_tile(
        first_row.to(tl.int64) + rows,
        first_column,
        columns,
        tl.load(seed_ptr),
        threshold,
        BLOCK,
        GROUPED,
        OPERAND,
    )
    tl.store(out_ptr + rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("first_row", [0, 2**19, 2**31 - 3, 2**31 + 5], ids=str)
@pytest.mark.parametrize("columns", [4, 4097, 12288])
def test_mask_of_a_tile_anywhere(gpu: EmulatedGPU, first_row: int, columns: int) -> None:
    """Element indices around 2^31, and around 2^34, where the counter has a high word."""
    rows, block, p, first_column = 4, 32, 0.6, 36
    element = (first_row + torch.arange(rows))[:, None] * columns + first_column + torch.arange(block)
    for seed in (3, -7):
        low = 2**32 - 1
        zero = torch.zeros_like(element)
        counter = (element >> 2 & low, element >> 34, zero, zero)
        words = torch.stack(philox4x32(counter, (torch.tensor(seed & low), torch.tensor(seed >> 32 & low))))
        expected = words.gather(0, (element & 3)[None])[0] >= keep_threshold(p)
        forms = [(False, False), (True, False), (True, True)]
        for grouped, operand in forms if columns % 4 == 0 else forms[:1]:
            mask = torch.full((rows, block), 2, dtype=torch.int8)
            _mask_kernel[(1,)](
                mask, first_row, first_column, columns, torch.tensor(seed), keep_threshold(p),
                ROWS=rows, BLOCK=block, GROUPED=grouped, OPERAND=operand, enable_fp_fusion=False,
            )  # fmt: skip
            assert torch.equal(mask, expected.to(torch.int8)), (seed, grouped, operand)


def test_a_word_equal_to_the_threshold_is_kept(gpu: EmulatedGPU) -> None:
    counter, key = (torch.zeros(1, dtype=torch.int64),) * 4, (torch.tensor([99]), torch.tensor([0]))
    for element, word in enumerate(philox4x32(counter, key)):
        at, above = int(word) / 2**32, (int(word) + 1) / 2**32
        assert dropout(torch.ones(4), at, 99)[element] > 0
        assert dropout(torch.ones(4), above, 99)[element] == 0


def test_threshold_and_scale() -> None:
    assert [keep_threshold(p) for p in (0.0, 0.5, 1 - 2**-53)] == [0, 2**31, 2**32 - 1]
    assert keep_scale(0.5) == 2.0
