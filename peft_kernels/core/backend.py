"""Ops and their implementations: how they are registered, and which one runs.

Each op has a reference in plain PyTorch, registered as its default kernel. Where the native library is
loaded, its kernels are registered for the CPU key and the dispatcher prefers them, unless `use_backend`
forces the reference. float64 always runs on the reference: the native kernels compute in float32.

An op has two overloads of one schema, `peft_kernels::<op>` and `peft_kernels::<op>.reference`. The second
has the reference alone behind it, so that a forced reference is an op like any other: opaque to
torch.compile, and open to opcheck.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from peft_kernels.core.library import native_library

BACKENDS = ("reference", "cpu", "triton", "cuda")

_forced_backend: ContextVar[str | None] = ContextVar("peft_kernels_forced_backend", default=None)


def define_op(op_name: str, signature: str) -> None:
    """Define `peft_kernels::<op_name>`, and its overload for the reference."""
    for overload in _overloads(op_name):
        torch.library.define(overload, signature)


def fake_kernel(op_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what `peft_kernels::<op_name>` returns for tensors without data (shapes, dtypes, checks)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for overload in _overloads(op_name):
            torch.library.register_fake(overload, function)
        return function

    return register


def reference_kernel(op_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a plain PyTorch function as the default kernel of `peft_kernels::<op_name>`.

    Autocast is switched off inside: the op's contract fixes the dtype of every step.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def kernel(tensor: torch.Tensor, *args: Any) -> Any:
            device_type = tensor.device.type
            if not torch.is_autocast_enabled(device_type):
                return function(tensor, *args)
            with torch.autocast(device_type, enabled=False):
                return function(tensor, *args)

        for overload in _overloads(op_name):
            torch.library.impl(overload, "default", kernel)
        return kernel

    return register


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op called in this context onto one backend. For tests, benchmarks and bug hunts.

    Functions compiled by torch.compile run eagerly inside the context: what they were compiled to has its
    backend built in. For the same reason the context cannot be entered inside a compiled function.

    Args:
        name: "reference" (plain PyTorch, any device), "cpu" (the native library); "triton" and "cuda" are
            reserved for backends this version does not have.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: this installation does not have that backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name in ("triton", "cuda"):
        raise RuntimeError(f"backend {name!r} is not part of this version; use 'cpu' or 'reference'")
    if name == "cpu" and not native_library().loaded:
        raise RuntimeError(
            f"backend 'cpu' needs the native library: {native_library().reason}; "
            "run `make build`, reinstall the package, or use 'reference'"
        )
    token = _forced_backend.set(name)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _forced_backend.reset(token)


def resolve(op_name: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The overload of `op_name` to call for inputs like `tensor`: the dispatcher's choice, or the reference.

    Raises:
        RuntimeError: `use_backend("cpu")` is in force and `tensor` is not on the CPU or is float64.
    """
    # Dynamo cannot trace ContextVar.get, and need not: inside use_backend nothing is compiled.
    forced = None if torch.compiler.is_compiling() else _forced_backend.get()
    if forced == "cpu" and (tensor.device.type != "cpu" or tensor.dtype == torch.float64):
        raise RuntimeError(
            f"backend 'cpu' is forced, but {op_name} got a {tensor.dtype} tensor on {tensor.device}; "
            "it takes float32, bfloat16 and float16 on the CPU: leave use_backend('cpu') for this call"
        )
    op = getattr(torch.ops.peft_kernels, op_name)
    reference = forced == "reference" or tensor.dtype == torch.float64
    overload: Callable[..., Any] = op.reference if reference else op.default
    return overload


def backend_of(op_name: str, device: torch.device | str) -> str:
    """What runs op `op_name` on `device` right now, in words: "cpu (C++ avx512)" or "reference"."""
    native = native_library()
    on_cpu = torch.device(device).type == "cpu"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{op_name}", "CPU")
    if _forced_backend.get() == "reference" or not (on_cpu and native.loaded and has_kernel):
        return "reference"
    return f"cpu (C++ {native.capability or 'unusable'})"


def _overloads(op_name: str) -> tuple[str, str]:
    return f"peft_kernels::{op_name}", f"peft_kernels::{op_name}.reference"
