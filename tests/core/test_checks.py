"""The style of error messages: argument, requirement, value, remedy."""

import math
import re

import numpy
import pytest
import torch

from peft_kernels.core import checks


def test_shape() -> None:
    tensor = torch.empty(16, 2048)
    checks.check_shape("lora_a", tensor, "[r, K]", (None, 2048))
    message = r"^lora_a must be \[r, K\] = \[\*, 4096\], got \[16, 2048\]; pass another$"
    with pytest.raises(ValueError, match=message):
        checks.check_shape("lora_a", tensor, "[r, K]", (None, 4096), "pass another")
    with pytest.raises(ValueError, match=r"^bias must be \[N\] = \[16\], got \[16, 2048\]$"):
        checks.check_shape("bias", tensor, "[N]", (16,))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (numpy.zeros(1), "x must be a torch.Tensor, got numpy.ndarray; make one with torch.as_tensor()"),
        ([1.0], "x must be a torch.Tensor, got list; make one with torch.as_tensor()"),
        (None, "x must be a torch.Tensor, got NoneType; make one with torch.as_tensor()"),
        (
            torch.nn.Linear(1, 1),
            "x must be a torch.Tensor, got torch.nn.modules.linear.Linear; pass its .weight",
        ),
    ],
)
def test_tensor(value: object, message: str) -> None:
    checks.check_tensor("x", torch.nn.Parameter(torch.empty(1)))
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        checks.check_tensor("x", value)
    with pytest.raises(TypeError, match=r"; another remedy$"):
        checks.check_tensor("x", value, "another remedy")


@pytest.mark.parametrize("value", [1.5, 1.0, "1", None])
def test_integer(value: object) -> None:
    checks.check_integer("seed", numpy.int64(3))
    with pytest.raises(TypeError, match=f"^seed must be an int, got {value!r}$"):
        checks.check_integer("seed", value)


def test_dtype() -> None:
    tensor = torch.empty(1, dtype=torch.float16)
    checks.check_dtype("x", tensor, [torch.float32, torch.float16])
    with pytest.raises(ValueError, match=r"^x must be float32 or bfloat16, got float16; convert it$"):
        checks.check_dtype("x", tensor, [torch.float32, torch.bfloat16, torch.float32], "convert it")


def test_device() -> None:
    with pytest.raises(ValueError, match=r"^bias must be on the device of x, cpu, got meta; move it with"):
        checks.check_device("bias", torch.empty(1, device="meta"), "x", torch.empty(1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite(value: float) -> None:
    checks.check_finite("scaling", -2.0)
    with pytest.raises(ValueError, match=f"^scaling must be finite, got {value}$"):
        checks.check_finite("scaling", value)
    with pytest.raises(TypeError, match=f"^scaling must be a number, got '{value}'$"):
        checks.check_finite("scaling", str(value))


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan])
def test_probability(value: float) -> None:
    checks.check_probability("p", 0.0)
    with pytest.raises(ValueError, match=rf"^p must be in \[0, 1\), got {value}$"):
        checks.check_probability("p", value)
