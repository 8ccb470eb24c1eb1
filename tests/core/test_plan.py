"""What is said about the methods is what the library does: one function decides, and the kernels ask it."""

import pytest
import torch

from peft_kernels.core.library import native_library
from peft_kernels.core.plan import MOST_TOKENS, Plan, Product, Regime, method, plans

pytestmark = pytest.mark.skipif(not native_library().loaded, reason="native library not loaded")
CPU = torch.device("cpu")
METHODS = {"look-up GEMV", "fp32 panels", "bf16 panels"}


def product(dtype: torch.dtype = torch.float32, in_features: int = 256) -> Product:
    return Product(in_features, 64, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward", [False, True])
def test_few_tokens_are_looked_up_and_many_decoded(dtype: torch.dtype, backward: bool) -> None:
    assert method(product(dtype), 1, backward=backward) == "look-up GEMV"
    many = method(product(dtype), 512, backward=backward)
    bf16 = dtype == torch.bfloat16 and native_library().capability == "avx512_bf16"
    assert many == ("bf16 panels" if bf16 else "fp32 panels")


def test_rows_that_are_not_whole_blocks_are_decoded_in_fp32() -> None:
    ragged = product(torch.bfloat16, in_features=96)
    assert {method(ragged, tokens) for tokens in (1, 8, 512)} == {"fp32 panels"}


@pytest.mark.parametrize("direction", ["forward", "input gradient"])
def test_plan_is_method_for_every_number_of_tokens(direction: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        plan = plans(product(dtype))[direction]
        assert plan.regimes[0].first == 1
        assert plan.regimes[-1].last is None
        for regime, following in zip(plan.regimes, plan.regimes[1:], strict=False):
            assert regime.last is not None
            assert following.first == regime.last + 1
        for regime in plan.regimes:
            for tokens in {regime.first, regime.last or MOST_TOKENS}:
                name = method(product(dtype), tokens, backward=direction != "forward")
                assert name == regime.method
                assert name in METHODS


def test_no_plan_where_the_reference_computes() -> None:
    assert plans(product(torch.float64)) == {}
    assert plans(Product(256, 64, torch.float32, torch.device("meta"))) == {}


def test_text() -> None:
    assert str(Plan((Regime(1, None, "a"),))) == "a"
    assert str(Plan((Regime(1, 8, "a"), Regime(9, None, "b")))) == "a for M = 1 to 8, b for M >= 9"
