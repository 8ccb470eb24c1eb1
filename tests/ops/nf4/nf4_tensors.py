"""Tensors to quantise, adversarial and random, and comparison of results bit by bit."""

import math

import torch

import peft_kernels as pk
from peft_kernels.ops.nf4.reference import NF4_CODE

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


def assert_same_as_reference(
    weight: torch.Tensor, blocksize: int, double_quant: bool, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    """Both ops of the backend that is in force."""
    ours = pk.functional.nf4_quantize(weight, blocksize, double_quant)
    with pk.use_backend("reference"):
        expected = pk.functional.nf4_quantize(weight, blocksize, double_quant)
    assert_same_bits(ours.packed, expected.packed)
    assert_same_bits(ours.absmax, expected.absmax)
    for dtype in dtypes:
        dense = ours.dequantize(dtype)
        with pk.use_backend("reference"):
            assert_same_bits(dense, expected.dequantize(dtype))
