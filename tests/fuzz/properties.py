"""What holds for every call, whatever its arguments: an error that names one of them, or the right result.

refuse(call)     the error is of a documented type, names an argument, and says what is required
unchanged(...)   no input has other bytes, sizes, versions or gradients than before
no_alias(...)    no result shares memory with an input
close(...)       a result equals the reference in float64, up to what rounding can cause
"""

import contextlib
import ctypes
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

import numerics

DOCUMENTED = (ValueError, TypeError, RuntimeError, NotImplementedError)
# How errors say what is required: ours, and those of torch's dispatcher about the type of an argument.
REQUIREMENT = re.compile(
    r"\bmust\b|\bneeds?\b|\brequires\b|not available|Expected a value of type|expected at most|missing"
)
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|no memory for|Storage size calculation overflowed"
)
OF_INFERENCE = "Inference tensors cannot be saved for backward"
COMPARED_UP_TO = (
    1e6  # larger inputs may overflow between two products; then only the kind of result is checked
)


class Refusal(NamedTuple):
    """The error that a call raised."""

    error: Exception

    @property
    def text(self) -> str:
        """Its message."""
        return str(self.error.args[0] if isinstance(self.error, KeyError) else self.error)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in an argument or a result."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in vars(value).values():
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif type(value).__name__ == "QuantState":
        yield from tensors_in(vars(value))


def state_of(t: torch.Tensor) -> tuple[Any, ...]:
    """All that a call must leave as it was."""
    state: list[Any] = [t.shape, t.dtype, t.device, t.requires_grad, type(t), t.layout]
    if t.is_leaf:
        state.append(t.grad is None)
    if not t.is_inference():
        state.append(t._version)
    if t.layout == torch.strided and not t.is_meta and not t._is_zerotensor():
        storage = t.untyped_storage()
        content = ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""
        state += [t.stride(), t.storage_offset(), storage.data_ptr(), content]
    return tuple(state)


@contextlib.contextmanager
def unchanged(*arguments: Any) -> Iterator[None]:
    """No tensor in `arguments`, and nothing of torch's own settings, changes inside."""
    tensors = list(tensors_in(arguments))
    before = [state_of(t) for t in tensors], settings()
    yield
    assert ([state_of(t) for t in tensors], settings()) == before, (
        "a call changed its inputs, or torch's settings"
    )


def settings() -> tuple[Any, ...]:
    """torch's, as far as a call could leave them changed."""
    return (
        *(torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
        *(torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    )


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or its `Refusal`; any error that is not documented comes through."""
    try:
        return function(*args, **kwargs)
    except DOCUMENTED as error:
        return Refusal(error)


def refuse(refusal: Refusal, names: Sequence[str]) -> None:
    """The error is a documented one, names an argument, and says what it must be."""
    error, text = refusal.error, refusal.text
    if type(error) is RuntimeError and NO_MEMORY.search(text):
        return  # for more than any machine has: `odd.HUGE`
    if OF_INFERENCE in text:
        return  # autograd's own words
    problem = f"{type(error).__name__}: {text[:600]}"
    assert type(error) in (*DOCUMENTED, KeyError), f"an undocumented error: {problem}"
    assert any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) for name in names), (
        f"the error names none of {', '.join(names)}: {problem}"
    )
    assert REQUIREMENT.search(text), f"the error does not say what is required: {problem}"


def no_alias(results: Any, *arguments: Any) -> None:
    """No result shares memory with an argument."""
    taken = {t.untyped_storage().data_ptr() for t in _with_memory(arguments)}
    for t in _with_memory(results):
        assert t.untyped_storage().data_ptr() not in taken, "a result shares memory with an input"


def _with_memory(value: Any) -> Iterator[torch.Tensor]:
    for t in tensors_in(value):
        if t.layout == torch.strided and not t.is_meta and t.numel() and not t._is_zerotensor():
            yield t


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, NaN like NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=0, equal_nan=True)


def same_form(actual: Any, expected: Any) -> None:
    """The same dtypes, shapes and devices."""
    for one, other in zip(tensors_in(actual), tensors_in(expected), strict=True):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device), (
            f"got {one.dtype} {list(one.shape)} on {one.device}, and {other.dtype} {list(other.shape)} on "
            f"{other.device} of the reference"
        )


def close(
    name: str,
    actual: torch.Tensor,
    exact: torch.Tensor,
    magnitude: torch.Tensor,
    roundings: int,
    extra: float,
    inputs: Sequence[Any],
) -> None:
    """`actual` is `exact` up to rounding: `numerics.bound`, and `extra` relative to `magnitude`.

    Where the exact result is NaN or infinite, `actual` is not finite either. Products that underflow are off
    by the smallest number of their dtype, times the factors that come after.
    """
    assert actual.shape == exact.shape, f"{name}: {list(actual.shape)}, expected {list(exact.shape)}"
    dtype = actual.dtype
    actual, exact, magnitude = (t.detach().double() for t in (actual, exact, magnitude))
    finite = exact.isfinite()
    unruly = ~finite & actual.isfinite()
    assert not unruly.any(), f"{name}: finite where the exact result is {exact[unruly].flatten()[:3]}"
    largest = [_largest(t) for t in inputs]
    half = any(isinstance(t, torch.Tensor) and t.dtype == torch.float16 for t in inputs)
    most = 30.0 if half else COMPARED_UP_TO
    limit = torch.finfo(dtype).max / 4
    if max(largest) > most or math.prod(max(1.0, size) for size in largest) > 1e30:
        return
    compared = finite & (magnitude < limit)
    growth = math.prod(max(1.0, size) for size in largest)
    allowed = numerics.bound(exact, magnitude, roundings, dtype) + extra * magnitude
    allowed = allowed + roundings * growth * numerics.smallest(dtype)
    wrong = compared & ~((actual - exact).abs() <= allowed)
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}[{at}] is {float(actual[at])!r}, exactly {float(exact[at])!r}: "
            f"off by {float((actual - exact)[at].abs())!r}, allowed {float(allowed[at])!r}; "
            f"{int(wrong.sum())} of {wrong.numel()} are"
        )


def _largest(value: Any) -> float:
    """The largest finite magnitude in an input."""
    if (
        isinstance(value, torch.Tensor)
        and value.dtype.is_floating_point
        and value.numel()
        and not value.is_meta
    ):
        numbers = value.detach().double()
        return float(numbers.where(numbers.isfinite(), 0.0).abs().max())
    return abs(float(value)) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def extra(result: torch.Tensor, inputs: Sequence[Any]) -> float:
    """What 16-bit steps on the way to a result may add, relative to its magnitude.

    With 16-bit x: x, or the weight, times a scale (1), the weight of an NF4 product (1), the result of
    torch's GEMM (1), dropped x and the difference of two terms in DoRA (3), z kept for a gradient (1). A
    scaling tensor is multiplied into B, in the dtype of B (1).
    """
    halves = [t.dtype for t in (result, *inputs) if isinstance(t, torch.Tensor) and t.dtype.itemsize == 2]
    return max(
        (8 * numerics.unit_roundoff(dtype) for dtype in halves if dtype.is_floating_point), default=0.0
    )


def words(refusal: Refusal) -> str:
    """An error without what depends on the backend: overload, source file, how memory ran out."""
    if NO_MEMORY.search(refusal.text) or "must have memory" in refusal.text:
        return "memory"
    text = refusal.text.partition("\nDeclaration:")[0]
    return re.sub(r"^\w+, [\w/]+\.(h|cpp):\d+, ", "", text)
