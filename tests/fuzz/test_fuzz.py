"""A fixed minute of fuzzing: `make fuzz` has the rest. And that its properties see what is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fuzz import properties
from fuzz.__main__ import fuzz
from fuzz.calls import Entry, check_call
from fuzz.entries import ENTRIES

INPUTS = 350  # of each entry: a minute in all


@pytest.mark.parametrize("name", ENTRIES)
def test_fixed_inputs(name: str) -> None:
    assert fuzz(ENTRIES[name], INPUTS, seed=0) >= INPUTS


def doubled(x: torch.Tensor, factor: float) -> torch.Tensor:
    if not isinstance(factor, float):
        raise TypeError(f"factor must be a float, got {factor!r}")
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32 or x.layout != torch.strided:
        raise ValueError("x must be a float32 tensor")
    return torch.zeros(x.shape)


def changes_its_input(x: torch.Tensor, factor: float) -> torch.Tensor:
    y = doubled(x, factor)
    if x.is_contiguous() and x.numel() > 1 and not x.requires_grad and not x.is_meta:
        x.view(-1)[-1] = 3.0
    return y


def returns_its_input(x: torch.Tensor, factor: float) -> torch.Tensor:
    doubled(x, factor)
    return x


def names_nothing(x: torch.Tensor, factor: float) -> torch.Tensor:
    if not isinstance(factor, float):
        raise TypeError("it must be a float")
    return doubled(x, factor)


def requires_nothing(x: torch.Tensor, factor: float) -> torch.Tensor:
    if not isinstance(factor, float):
        raise TypeError("factor is bad")
    return doubled(x, factor)


def raises_another_error(x: torch.Tensor, factor: float) -> torch.Tensor:
    if not isinstance(factor, float):
        raise AttributeError("factor must be a float")
    return doubled(x, factor)


def refuses_what_is_valid(x: torch.Tensor, factor: float) -> torch.Tensor:
    if isinstance(x, torch.Tensor) and not x.is_contiguous():
        raise ValueError("x must be contiguous")
    return doubled(x, factor)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (changes_its_input, "a call changed its inputs"),
        (returns_its_input, "shares memory with an input"),
        (names_nothing, "the error names none of x, factor"),
        (requires_nothing, "the error does not say what is required"),
        (raises_another_error, "factor must be a float"),
        (refuses_what_is_valid, "valid arguments were refused"),
    ],
)
def test_planted_defects_are_found(function: Callable[..., Any], message: str) -> None:
    entry = Entry(function, lambda draw: {"x": torch.randn(3, 4), "factor": 2.0}, names=())
    with pytest.raises((AssertionError, AttributeError), match=message):
        fuzz(lambda draw: check_call(draw, entry), 300, seed=0, shrink=False)


def test_a_call_without_defects_passes() -> None:
    entry = Entry(doubled, lambda draw: {"x": torch.randn(3, 4), "factor": 2.0}, names=())
    fuzz(lambda draw: check_call(draw, entry), 300, seed=0)


def test_wrong_results_are_found() -> None:
    x, exact = torch.ones(3), torch.ones(3, dtype=torch.float64)
    properties.close("y", x, exact, exact, 4, 0.0, [x])
    with pytest.raises(AssertionError, match=r"y\[\(1,\)\] is 1\.00"):
        properties.close("y", torch.tensor([1.0, 1.00001, 1.0]), exact, exact, 4, 0.0, [x])
    with pytest.raises(AssertionError, match="finite where the exact result is"):
        properties.close("y", x, exact * torch.nan, exact, 4, 0.0, [x])
