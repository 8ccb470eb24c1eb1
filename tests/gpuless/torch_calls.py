"""Torch ops that code calls: each one counted, and run or not.

A launcher calls torch ops beside its own kernels (a vendor GEMM, a copy), and what we compare with is nothing
but torch ops. The rule for bytes is the same for all of them: an op reads its inputs once and writes its
outputs once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_KEEP = ("detach", "alias", "lift_fresh", "_unsafe_view", "set_", "resize_")  # move no bytes


class MissingKernel(NotImplementedError):
    """An op was called for whose Triton kernel there is none."""


def has_launcher(overload: str) -> bool:
    """Whether an overload, such as "peft_kernels::nf4_quantize.triton", has a Triton launcher behind it."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(overload, "CompositeExplicitAutograd"))


@dataclass(frozen=True)
class TorchCall:
    """An op that did something: not a view, not an allocation."""

    name: str
    read: tuple[torch.Tensor, ...]
    written: tuple[torch.Tensor, ...]

    @property
    def read_bytes(self) -> int:
        """Of its inputs."""
        return bytes_of(self.read)

    @property
    def write_bytes(self) -> int:
        """Of its outputs."""
        return bytes_of(self.written)

    @property
    def flops(self) -> int:
        """Multiplications and additions of a matrix product, which dominate everything else; otherwise 0."""
        if "mm" not in self.name:
            return 0
        (*batch, rows, inner), (*_, columns) = (operand.shape for operand in self.read[-2:])
        return 2 * torch.Size((*batch, rows, inner, columns)).numel()


class TorchCalls(TorchDispatchMode):
    """Records torch ops, those that our own launchers call among them.

    With `execute=False` nothing is computed: results are memory that nobody has written, which costs nothing
    however large, and has an address, as a launch needs. What would need a value (`item()`) then fails, as a
    launcher must not wait for the device. Where some values are needed after all, as of a table of codes, ops
    on tensors of up to `compute_up_to` elements do run.
    """

    def __init__(self, execute: bool, compute_up_to: int = 0) -> None:
        super().__init__()
        self.execute, self.compute_up_to = execute, compute_up_to
        self.calls: list[TorchCall] = []
        self.results: Any = None  # of what was called in this mode, where somebody keeps them
        self.made: list[torch.Tensor] = []  # kept, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "peft_kernels" and func._overloadname == "triton":
            if not has_launcher(func.name()):
                raise MissingKernel(f"{func.name()} has no Triton kernel")
            with self:  # for what the launcher calls
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func._overloadname == "cuda":
            raise AssertionError("enter TorchCalls before gpuless.cuda: it must see what a CUDA op calls")
        if (
            func is torch.ops.aten.contiguous.default and not args[0].is_contiguous()
        ):  # by C++: is no view then
            func, kwargs = torch.ops.aten.clone.default, {"memory_format": torch.contiguous_format}
        name = func._schema.name.partition("::")[2]
        if name in _ALLOCATE:
            self.made.append(results := func(*args, **kwargs))
            return results
        if func.is_view or name in _KEEP:
            return func(*args, **kwargs)
        run = func if self.execute or self._small(args) else partial(_without_values, func)
        results = run(*args, **kwargs)
        changed = _written(func, args, kwargs)
        written = changed or _tensors(results)
        if not changed:
            self.made += written
        read = _tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
        self.calls.append(TorchCall(name, tuple(read), tuple(written)))
        return results

    def _small(self, args: Any) -> bool:
        sizes = [tensor.numel() for tensor in _tensors(args)]
        return bool(sizes) and max(sizes) <= self.compute_up_to

    @property
    def bytes(self) -> int:
        """Read and written by all calls."""
        return sum(call.read_bytes + call.write_bytes for call in self.calls)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the elements that tensors have in memory: those of an expanded dimension are there once."""
    total = 0
    for tensor in tensors:
        sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        total += tensor.element_size() * torch.Size(sizes).numel() if tensor.numel() else 0
    return total


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Arguments that an in-place op, or one with `out`, writes."""
    values = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    values |= kwargs
    return [
        values[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in values
    ]


def _without_values(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Results with the shapes, strides and dtypes that `func` would give."""
    if written := _written(func, args, kwargs):
        return written[0] if len(written) == 1 else tuple(written)

    def meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta") if value.device.type != "meta" else value
        return torch.device("meta") if isinstance(value, torch.device) else value

    def memory(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)

    inputs, options = tree_map(meta, (args, kwargs))
    makes_tensors = any(argument.name == "device" for argument in func._schema.arguments)
    if makes_tensors and not _tensors(args):
        options["device"] = torch.device("meta")
    return tree_map(memory, func(*inputs, **options))
