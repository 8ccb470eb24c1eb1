"""Argument checks with one style of message: the argument, what it must be, what it is, and the remedy."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch


def check_tensor(name: str, value: object, remedy: str = "") -> None:
    """Require `value` to be a tensor."""
    if isinstance(value, torch.Tensor):
        return
    if not remedy:
        remedy = (
            "pass its .weight" if isinstance(value, torch.nn.Module) else "make one with torch.as_tensor()"
        )
    kind = type(value)
    got = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    raise TypeError(f"{name} must be a torch.Tensor, got {got}{_hint(remedy)}")


def check_module(name: str, value: object, remedy: str) -> None:
    """Require `value` to be a module."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {value!r}{_hint(remedy)}")


def check_shape(
    name: str, tensor: torch.Tensor, letters: str, expected: tuple[int | None, ...], remedy: str = ""
) -> None:
    """Require `tensor` to have shape `expected`, where None stands for any size.

    Example message: `lora_a must be [r, K] = [*, 4096], got [16, 2048]`.
    """
    shape = tensor.shape
    if shape == expected:
        return
    if len(shape) == len(expected) and all(
        want in (None, size) for size, want in zip(shape, expected, strict=True)
    ):
        return
    wanted = ", ".join("*" if want is None else str(want) for want in expected)
    raise ValueError(f"{name} must be {letters} = [{wanted}], got {list(shape)}{_hint(remedy)}")


def check_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype], remedy: str = "") -> None:
    """Require the dtype of `tensor` to be one of `allowed`."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(allowed))
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be {wanted}, got {got}{_hint(remedy)}")


def check_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Require `tensor` to be on the device of `other`."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}; "
            f"move it with .to({str(other.device)!r})"
        )


def check_integer(name: str, value: object) -> None:
    """Require `value` to be a whole number; a float with such a value is none."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_finite(name: str, value: float) -> None:
    """Require `value` to be a finite number."""
    try:
        finite = -math.inf < value < math.inf  # math.isfinite cannot be traced by torch.compile
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not finite:
        raise ValueError(f"{name} must be finite, got {value}")


def check_probability(name: str, value: float) -> None:
    """Require 0 <= `value` < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def _hint(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""
