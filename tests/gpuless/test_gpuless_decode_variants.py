"""The variants of the NF4 decoder look up the same codes; and the one in use is still the best."""

import pytest
import torch

from gpuless.decode_variants import BYTES, VARIANTS, cost, launch
from gpuless.driver import device
from peft_kernels.ops.nf4.reference import NF4_CODE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.gpuless_full) for arch in (80, 86, 89, 120))]
)
def test_every_byte_is_decoded_exactly(arch: int, variant: str) -> None:
    packed = torch.arange(2 * BYTES).reshape(2, BYTES).add(3).to(torch.uint8)
    packed[1] = packed[1].flip(0)
    code = torch.tensor(NF4_CODE)
    with device(arch):
        high, low = launch(packed, variant)
    assert torch.equal(high, code[(packed[0] >> 4).long()] + code[(packed[1] >> 4).long()])
    assert torch.equal(low, code[(packed[0] & 15).long()] + code[(packed[1] & 15).long()])


@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.gpuless_full) for arch in (80, 86, 89, 120))]
)
def test_the_shuffle_is_the_best(arch: int) -> None:
    costs = {variant: cost(variant, arch) for variant in VARIANTS}
    assert max(VARIANTS, key=lambda variant: costs[variant].rate(arch)) == "shuffle"
    assert costs["shuffle"].pipes["all"] <= 3.25  # a shift, a shuffle, the loop's own add
    assert costs["shuffle"].shared == 0
