"""Argument checks with one style of message: the argument, what it must be, what it is, and the remedy."""

import math
import sys
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch


def check_tensor(name: str, value: object, remedy: str = "") -> None:
    """Require `value` to be a dense tensor."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {value.layout}; use .to_dense()")
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
        raise TypeError(f"{name} must be an nn.Module, got {shown(value)}{_hint(remedy)}")


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
        raise TypeError(f"{name} must be an int, got {shown(value)}")


def check_flag(name: str, value: object) -> None:
    """Require True or False: what counts as true of anything else is a guess."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_size(name: str, value: object) -> None:
    """Require a number of features or the like: a positive int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    if value >= 2**62:
        raise ValueError(f"{name} must be below 2^62, got {shown(value)}")


def check_finite(name: str, value: float) -> None:
    """Require `value` to be a finite number, of a size that a float has."""
    if type(value) is float and -math.inf < value < math.inf:  # at once: this is in every call
        return
    # math.isfinite cannot be traced by torch.compile
    finite = _holds(name, value, lambda number: -math.inf < number < math.inf)
    if not finite or (isinstance(value, int) and abs(value) > sys.float_info.max):
        raise ValueError(f"{name} must be finite, got {shown(value)}")


def check_probability(name: str, value: float) -> None:
    """Require 0 <= `value` < 1."""
    if type(value) is float and 0.0 <= value < 1.0:  # at once: this is in every call
        return
    if not _holds(name, value, lambda number: 0.0 <= number < 1.0):
        raise ValueError(f"{name} must be in [0, 1), got {shown(value)}")


def check_sizes(name: str, shape: Sequence[int]) -> None:
    """Require the shape of a tensor: whole numbers, none negative."""
    if not isinstance(shape, Sequence) or isinstance(shape, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of ints, got {shown(shape)}")
    elements = 1
    for size in shape:
        if not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{name} must be a sequence of ints, got {shown(size)} in it")
        if size < 0:
            raise ValueError(f"{name} must have no negative size, got {size}")
        if isinstance(size, int):
            elements *= max(size, 1)
    if elements >= 2**62:  # sizes of blocks and bytes are computed from it in 64 bits
        raise ValueError(f"{name} must have fewer than 2^62 elements, got {elements}")


def check_memory(name: str, tensor: torch.Tensor) -> None:
    """Require the elements of a dense tensor to be in memory; FSDP frees that of its parameters between uses.

    Torch's own operations read past the end of such a tensor.
    """
    if torch.compiler.is_compiling() or tensor.numel() == 0 or tensor.is_meta:
        return
    if tensor.is_contiguous():
        extent = tensor.numel()
    else:
        extent = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
    last = tensor.storage_offset() + extent
    try:
        stored = tensor.untyped_storage().nbytes()
    except NotImplementedError:  # a wrapper of torch.func, whose tensor torch looks after
        return
    if stored < last * tensor.itemsize and not tensor._is_zerotensor():
        raise RuntimeError(
            f"{name} must have memory, got a tensor whose storage was freed; gather the sharded parameter "
            "first"
        )


def _holds(name: str, value: Any, condition: Callable[[float], bool]) -> bool:
    """Whether `value`, which must be a number, meets a condition."""
    if not isinstance(value, torch.Tensor):
        try:
            return bool(condition(value))
        except (TypeError, ValueError):  # no number; an array of them
            pass
    raise TypeError(f"{name} must be a number, got {shown(value)}")


def shown(value: object) -> str:
    """A value in an error, cut where it is long; an int of more digits than Python prints by its size."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _hint(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""
