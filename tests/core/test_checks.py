"""The style of error messages: argument, requirement, value, remedy."""

import math

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


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan])
def test_probability(value: float) -> None:
    checks.check_probability("p", 0.0)
    with pytest.raises(ValueError, match=rf"^p must be in \[0, 1\), got {value}$"):
        checks.check_probability("p", value)
