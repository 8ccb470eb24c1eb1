"""Odd arguments: what a valid one is exchanged for."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import peft_kernels as pk

Draw = Callable[[st.SearchStrategy[Any]], Any]

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
)
HUGE = 2**50  # elements: more than an address space holds, so that no attempt to copy them gets memory
FLOATS: tuple[Any, ...] = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1e-320, 1e-45, 1e30, 3.5e38, 1e300, math.inf, -math.inf, math.nan),
    *(10**400, -(10**400), True, False, 0, 1, 2, "1", b"1", None, 1j, [1.0], (), object()),
    *(np.float32(0.5), np.int64(1), np.float64("nan"), np.array(0.5), np.array([0.5, 0.5])),
)
INTS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 31, 32, 33, 63, 64, 65, 256, 4096, 8192, -64, 2**31, 2**32, 2**62, 2**63 - 1, 2**63),
    *(-(2**63), 10**30, True, False, 64.0, 0.5, math.nan, math.inf, "64", None, [64], (), np.int32(64)),
    *(np.float32(64.0), 1j, object()),
)
SIZES = tuple(
    i for i in INTS if not isinstance(i, int) or abs(i) < 10_000 or abs(i) >= HUGE
)  # no memory, or little
STRINGS: tuple[Any, ...] = (
    *("", "int8", "INT8", "int4", "relu", "ReLU", "gelu", "identity", "gelu_new", "nope", "a" * 1000, "\0"),
    *("\ud800", "nf4", "fp4", None, 1, True, b"int8", [], torch.relu, object()),
)
DTYPE_ARGUMENTS: tuple[Any, ...] = (*DTYPES, torch.complex128, "float32", "", None, 0, float, object())
NO_TENSORS: tuple[Any, ...] = (
    *(
        None,
        1.0,
        0,
        True,
        "x",
        [1.0, 2.0],
        (),
        {},
        np.ones((2, 2)),
        object(),
        torch.float32,
        torch.nn.Linear(2, 2),
    ),
    *(torch.nn.Parameter, [torch.ones(2)]),
)
# Values of elements. The finite ones keep every sum of products of five of them far from overflow in fp32.
SPECIAL = (0.0, -0.0, 1.0, 1e-40, -1e-38, 1e-30, 1e4, -1e4, math.inf, -math.inf, math.nan)


def choose(draw: Draw, choices: Sequence[Any]) -> Any:
    """One of them, by index: hypothesis keeps what `sampled_from` is given, and would compare tensors."""
    return choices[draw(st.integers(0, len(choices) - 1))]


class Subclass(torch.Tensor):
    """A tensor of another class, as many libraries have them."""


# What keeps a valid call valid: the same shape, dtype and device.
def transposed(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    order = draw(st.permutations(range(t.dim())))
    return t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])


def expanded(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    """Stride 0 in one dimension."""
    if t.dim() == 0 or t.numel() == 0:
        return t
    dim = draw(st.integers(0, t.dim() - 1))
    return t.narrow(dim, 0, 1).expand(t.shape)


def offset(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    """Inside a larger storage, at any offset, its ends poisoned."""
    before, after = draw(st.integers(0, 17)), draw(st.integers(0, 5))
    storage = t.new_zeros(before + t.numel() + after)
    storage[before : before + t.numel()] = t.reshape(-1)
    return storage[before : before + t.numel()].view(t.shape)


def spread(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    """Every second or third element of the last dimension."""
    if t.dim() == 0:
        return t
    step = draw(st.integers(2, 3))
    wide = t.new_zeros((*t.shape[:-1], t.shape[-1] * step))
    wide[..., ::step] = t
    return wide[..., ::step]


def overlapping(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    """Rows that share memory, one element apart."""
    if t.dim() != 2 or t.numel() == 0:
        return t
    rows, columns = t.shape
    return t.reshape(-1)[: rows + columns - 1].clone().as_strided((rows, columns), (1, 1))


def special_values(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    if t.numel() == 0 or not t.dtype.is_floating_point or t.dtype.itemsize < 2:
        return t
    t = t.detach().clone()
    for _ in range(draw(st.integers(1, 3))):
        t.view(-1)[draw(st.integers(0, t.numel() - 1))] = choose(draw, SPECIAL)
    return t


def constant(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    if not t.dtype.is_floating_point or t.dtype.itemsize < 2:
        return t
    return torch.full_like(t, choose(draw, SPECIAL))


def trained(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    return t.detach().clone().requires_grad_() if t.dtype.is_floating_point else t


def parameter(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(t.detach(), requires_grad=False)


def subclass(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    return t.detach().as_subclass(Subclass)


def negative_bit(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    """A lazily negated view, as torch makes of the imaginary part of a conjugate."""
    return torch._neg_view(t.detach()) if t.dtype.is_floating_point else t


def lazy_zeros(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    """Zeros without memory, as torch's forward-mode differentiation makes them."""
    return torch._efficientzerotensor(t.shape, dtype=t.dtype) if t.dtype.is_floating_point else t


def of_inference(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return t.detach().clone()


KEEP = (
    *(transposed, expanded, offset, spread, overlapping, special_values, special_values, constant),
    *(parameter, subclass, negative_bit, lazy_zeros),
)


# What need not.
def other_shape(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    sizes = [max(0, size + draw(st.integers(-1, 1))) for size in t.shape]
    change = choose(draw, ("sizes", "zero", "add", "first", "drop", "flat", "scalar", "one"))
    if change == "zero" and sizes:
        sizes[draw(st.integers(0, len(sizes) - 1))] = 0
    if change in ("add", "first"):
        sizes = [*t.shape, 1] if change == "add" else [1, *t.shape]
    if change in ("drop", "flat", "scalar", "one"):
        sizes = {"drop": list(t.shape[1:]), "flat": [t.numel()], "scalar": [], "one": [1]}[change]
    return torch.ones(sizes, dtype=t.dtype)


def other_dtype(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a complex number loses a part
        return t.detach().to(choose(draw, DTYPES))


def other_device(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    return t.detach().to("meta")


def huge(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    """More elements than there is memory, all of them the same one."""
    one = torch.ones([1] * max(t.dim(), 1), dtype=t.dtype)
    dim = draw(st.integers(0, one.dim() - 1))
    other = list(t.shape) or [1]
    other[dim] = choose(draw, (HUGE, HUGE - 1, 2**40))
    if math.prod(other) < HUGE:
        other[dim] = HUGE
    return one.expand(other) if math.prod(other) < 2**62 else one


def without_memory(draw: Draw, t: torch.Tensor) -> torch.Tensor:
    """As FSDP leaves its parameters between uses."""
    t = t.detach().clone()
    t.untyped_storage().resize_(0)
    return t


def other_layout(draw: Draw, t: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that CSR is in beta
        compressed = t.dim() == 2 and draw(st.booleans())
        return t.detach().to_sparse_csr() if compressed else t.detach().to_sparse()


CHANGE = (
    other_shape,
    other_shape,
    other_dtype,
    other_dtype,
    other_device,
    huge,
    without_memory,
    other_layout,
)


def odd_tensor(draw: Draw, t: torch.Tensor) -> tuple[Any, bool]:
    """An odd tensor for `t`, and whether a valid call stays valid with it."""
    kind = draw(st.integers(0, 9))
    if kind < 5:
        return choose(draw, KEEP)(draw, t), True
    if kind == 5:
        return choose(draw, (trained, of_inference))(draw, t), False
    if kind < 9:
        return choose(draw, CHANGE)(draw, t), False
    return choose(draw, NO_TENSORS), False


def odd_weight(draw: Draw, w: pk.NF4Weight) -> tuple[Any, bool]:
    """An NF4 weight with one part changed behind the back of its constructor; or something else."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return choose(draw, (*NO_TENSORS, w.packed, torch.ones(w.shape))), False
    if kind == 1:  # what may be in a file: any number as absmax
        return dataclasses.replace(w, absmax=special_values(draw, w.absmax)), True
    name = choose(draw, ("packed", "absmax", "shape", "blocksize"))
    part = odd(draw, vars(w)[name])[0]
    if type(part) is type(vars(w)[name]):
        changed = object.__new__(pk.NF4Weight)
        changed.__dict__.update({**vars(w), name: part})
        if all(isinstance(size, int) for size in changed.shape):
            return changed, False
    return w, True


def odd_shape(draw: Draw, shape: tuple[int, ...]) -> Any:
    """Something in the place of a shape."""
    sizes: list[Any] = list(shape)
    if sizes and draw(st.booleans()):
        sizes[draw(st.integers(0, len(sizes) - 1))] = choose(draw, SIZES)
        return tuple(sizes)
    odd_ones = (
        (),
        (0,),
        (-8, -64),
        (2**62, 4, 0),
        (2**32, 2**32),
        (8, 64, 1),
        (512,),
        [8, 64],
        512,
        "8",
        None,
    )
    return choose(draw, odd_ones)


def odd(draw: Draw, value: Any) -> tuple[Any, bool]:
    """Something odd in the place of `value`, and whether a valid call stays valid with it."""
    if isinstance(value, torch.Tensor):
        return odd_tensor(draw, value)
    if isinstance(value, pk.NF4Weight):
        return odd_weight(draw, value)
    if dataclasses.is_dataclass(value):  # NestedAbsmax
        name = choose(draw, [*vars(value)])
        return dataclasses.replace(value, **{name: odd(draw, vars(value)[name])[0]}), False  # type: ignore[type-var]
    if isinstance(value, torch.dtype):
        return choose(draw, DTYPE_ARGUMENTS), False
    if isinstance(value, (tuple, torch.Size)):
        return odd_shape(draw, value), False
    choices: tuple[Any, ...] = (*NO_TENSORS, *FLOATS, *STRINGS, torch.ones(3), torch.ones(()))
    if isinstance(value, float):
        choices = (
            *FLOATS,
            torch.ones(()),
            torch.ones(1),
            torch.ones(2),
            torch.tensor(1j),
            torch.tensor(True),
        )
    elif isinstance(value, int):
        choices = INTS
    elif isinstance(value, str):
        choices = STRINGS
    return choose(draw, choices), False
