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


def test_tensor_is_dense() -> None:
    message = r"^x must be a dense tensor, got torch\.sparse_coo; use \.to_dense\(\)$"
    with pytest.raises(ValueError, match=message):
        checks.check_tensor("x", torch.eye(2).to_sparse())


@pytest.mark.parametrize("value", [1, 0, None, "True", numpy.bool_(True), torch.ones(2)])
def test_flag(value: object) -> None:
    checks.check_flag("bias", True)
    checks.check_flag("bias", False)
    with pytest.raises(TypeError, match=r"^bias must be True or False, got "):
        checks.check_flag("bias", value)


def test_numbers_of_other_types() -> None:
    checks.check_finite("scaling", numpy.float32(0.5))  # type: ignore[arg-type]
    checks.check_probability("p", numpy.float32(0.5))  # type: ignore[arg-type]
    for value in (torch.ones(1), numpy.ones(2), 1j, None, b"1"):
        with pytest.raises(TypeError, match=r"^scaling must be a number, got "):
            checks.check_finite("scaling", value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^p must be a number, got "):
            checks.check_probability("p", value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^scaling must be finite, got an int of 1329 bits$"):
        checks.check_finite("scaling", 10**400)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_size_of_another_type(value: object) -> None:
    checks.check_size("r", 1)
    with pytest.raises(TypeError, match=f"^r must be an int, got {value!r}$"):
        checks.check_size("r", value)


@pytest.mark.parametrize("value", [0, -1])
def test_size_out_of_range(value: int) -> None:
    with pytest.raises(ValueError, match=r"^r must be below 2\^62, got 4611686018427387904$"):
        checks.check_size("r", 2**62)
    with pytest.raises(ValueError, match=f"^r must be positive, got {value}$"):
        checks.check_size("r", value)


def test_sizes() -> None:
    checks.check_sizes("shape", (0, 3))
    for sizes, error, message in (
        ((-8, -64), ValueError, r"^shape must have no negative size, got -8$"),
        ((2**62, 4, 0), ValueError, r"^shape must have fewer than 2\^62 elements"),
        ((8.0, 64), TypeError, r"^shape must be a sequence of ints, got 8\.0 in it$"),
        ("8", TypeError, r"^shape must be a sequence of ints, got '8'$"),
    ):
        with pytest.raises(error, match=message):
            checks.check_sizes("shape", sizes)  # type: ignore[arg-type]


def test_memory() -> None:
    tensor = torch.ones(4, 4)
    rows = tensor[1:3]
    checks.check_memory("x", rows)
    checks.check_memory("x", torch.ones(1, device="meta").expand(2**50))
    tensor.untyped_storage().resize_(4 * 4)  # the first row is left
    checks.check_memory("x", tensor[:1])
    with pytest.raises(RuntimeError, match=r"^x must have memory, got a tensor whose storage was freed"):
        checks.check_memory("x", rows)
