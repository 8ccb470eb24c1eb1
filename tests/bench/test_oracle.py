import math
from dataclasses import replace

import pytest
import torch
from peft_kernels.bench.case import Case, Oracle
from peft_kernels.bench.oracle import (
    CHECKED_TOKENS,
    LinearTerms,
    checked_tokens,
    compare,
    linear_oracle,
    philox_keep_scale,
    philox_words,
)

from peft_kernels import functional

M, K, N, R = 8, 1024, 96, 4


def terms(dtype=torch.float32):
    tensors = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(R, K) / K**0.5, torch.randn(N, R)
    x, weight, a, b = (tensor.to(dtype) for tensor in tensors)
    return LinearTerms(x, weight, a, b, 2.0, torch.randn(M, N).to(dtype))


def case(direction="both"):
    return Case("linear", "lora_linear", M, K, N, r=R, direction=direction, weight="dense")


def test_philox_gives_the_published_words():
    # Random123's known-answer vector for philox4x32-10, counter 0 and key 0.
    assert [hex(word) for word in philox_words(4, seed=0).tolist()] == [
        "0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [1, -1, 2**63 - 1, 2**40 + 5])
def test_philox_agrees_with_the_package(seed):
    mask = functional.philox_dropout_mask((5, 7), 0.3, seed)
    factors = philox_keep_scale((5, 7), 0.3, seed)
    assert torch.equal(factors != 0, mask)
    assert factors.max() == torch.tensor(1 / 0.7, dtype=torch.float32).double()


def test_oracle_is_the_gradient_of_its_own_forward():
    given = terms(torch.float64)
    x, a, b = (tensor.clone().requires_grad_() for tensor in (given.x, given.lora_a, given.lora_b))
    factors = philox_keep_scale((M, K), 0.2, seed=3)
    y = x @ given.weight.T + given.scaling * (x * factors) @ a.T @ b.T
    dx, da, db = torch.autograd.grad(y, (x, a, b), given.grad)
    expected = {"y": y.detach(), "dx": dx, "dlora_a": da, "dlora_b": db}
    for name, value in given.evaluate(factors, forward=True, backward=True).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_float32_arithmetic_is_green(direction):
    given = terms()
    oracle = linear_oracle(case(direction), given, None)
    x, a, b = (tensor.clone().requires_grad_() for tensor in (given.x, given.lora_a, given.lora_b))
    y = x @ given.weight.T + given.scaling * x @ a.T @ b.T
    gradients = torch.autograd.grad(y, (x, a, b), given.grad)
    results = dict(zip(("y", "dx", "dlora_a", "dlora_b"), (y.detach(), *gradients), strict=True))
    check = compare({name: results[name] for name in oracle.values}, oracle)
    assert check.passed
    assert 0 < check.error < 1e-5


def test_a_weight_rounded_to_bfloat16_is_red():
    given = terms()
    oracle = linear_oracle(case("forward"), given, None)
    rounded = given.weight.bfloat16().float()
    y = given.x @ rounded.T + given.scaling * given.x @ given.lora_a.T @ given.lora_b.T
    check = compare({"y": y}, oracle)
    assert not check.passed
    assert check.worst == "y"


def rounded(weight, bits):
    """To `bits` significant bits, to nearest."""
    mantissa, exponent = torch.frexp(weight)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


@pytest.mark.parametrize(("bits", "passed"), [(8, True), (5, False)])
def test_a_weight_may_be_rounded_to_bfloat16_where_that_is_known_and_no_further(bits, passed):
    given = replace(terms(torch.bfloat16), lora_a=None, lora_b=None)
    given = replace(given, weight=given.weight.float() * 1.2345)  # as a decoded one: no bfloat16
    weight = rounded(given.weight, bits).double()
    assert bits != 8 or torch.equal(weight, given.weight.bfloat16().double())
    results = {"y": given.x.double() @ weight.T, "dx": given.grad.double() @ weight}
    roundoff = dict.fromkeys(results, 2.0**-8)
    bfloat16 = replace(case(), r=0, dtype="bfloat16")
    assert compare(results, linear_oracle(bfloat16, given, None, roundoff)).passed == passed
    assert not compare(results, linear_oracle(bfloat16, given, None)).passed
    for name in results:  # each result has its own
        others = {other: roundoff[other] for other in results if other != name}
        assert compare(results, linear_oracle(bfloat16, given, None, others)).worst == name


def test_one_wrong_element_is_red():
    given = terms()
    oracle = linear_oracle(case("forward"), given, None)
    y = oracle.values["y"].clone()
    assert compare({"y": y}, oracle).tolerance_used == 0.0
    y[3, 5] += 10 * oracle.tolerances["y"][3, 5]
    assert compare({"y": y}, oracle).tolerance_used == pytest.approx(10.0)


@pytest.mark.parametrize("m", [CHECKED_TOKENS + 1, 1024, 2048, 4096])
def test_checked_tokens_are_the_first_the_last_and_of_every_remainder(m):
    mask = checked_tokens(m)
    tokens = mask.nonzero().flatten()
    assert mask.shape == (m,)
    assert len(tokens) == CHECKED_TOKENS
    assert (tokens[0], tokens[-1]) == (0, m - 1)
    for block in (2, 3, 4, 6, 8, 12, 14, 16, 24, 28, 32, 64, 96, 192):
        assert len(set((tokens % block).tolist())) == block


def test_up_to_a_limit_every_token_is_checked():
    assert checked_tokens(CHECKED_TOKENS) is None


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_of_many_tokens_the_checked_ones_are_those_of_a_full_check(monkeypatch, direction):
    given, factors = terms(), philox_keep_scale((M, K), 0.2, seed=3)
    full = linear_oracle(case(direction), given, factors)
    monkeypatch.setattr("peft_kernels.bench.oracle.CHECKED_TOKENS", 3)
    some = linear_oracle(case(direction), given, factors)
    rows = [0, 4, 7]  # of 8
    for part in ("values", "tolerances"):
        for name, expected in getattr(full, part).items():
            expected = expected[rows] if name in ("y", "dx") else expected
            torch.testing.assert_close(getattr(some, part)[name], expected, rtol=1e-12, atol=1e-15)
    assert compare(full.values, some).passed
    for name, wrong in full.values.items():
        last = torch.zeros_like(wrong)
        last[-1, -1] = 10 * full.tolerances[name][-1, -1]
        assert compare(full.values | {name: wrong + last}, some).tolerance_used == pytest.approx(10.0)


def test_results_have_all_tokens_whichever_are_checked(monkeypatch):
    monkeypatch.setattr("peft_kernels.bench.oracle.CHECKED_TOKENS", 3)
    oracle = linear_oracle(case("forward"), terms(), None)
    with pytest.raises(ValueError, match=rf"y must be \[{M}, {N}\], got \[3, {N}\]"):
        compare({"y": oracle.values["y"]}, oracle)


def test_nan_is_red_wherever_it_is():
    oracle = Oracle({"a": torch.ones(3), "b": torch.ones(3)}, {"a": torch.ones(3), "b": torch.zeros(3)})
    results = {"a": torch.tensor([1.0, math.nan, 1.0]), "b": torch.ones(3)}
    check = compare(results, oracle)
    assert not check.passed
    assert check.worst == "a"
    assert math.isnan(check.error)
    assert not compare({"a": torch.ones(3), "b": results["a"]}, oracle).passed


def test_results_must_be_those_of_the_oracle():
    oracle = Oracle({"y": torch.ones(3)}, {"y": torch.ones(3)})
    with pytest.raises(ValueError, match=r"results must be \['y'\], got \['dx'\]"):
        compare({"dx": torch.ones(3)}, oracle)
    with pytest.raises(ValueError, match=r"y must be \[3\], got \[4\]"):
        compare({"y": torch.ones(4)}, oracle)
