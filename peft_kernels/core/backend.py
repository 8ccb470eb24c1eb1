"""Ops and their implementations: how they are registered, and which one runs.

Each op has a reference in plain PyTorch, registered as its default kernel. Where the native library is
loaded, its kernels are registered for the CPU key, and Triton's for the CUDA key, and the dispatcher prefers
them, unless `use_backend` forces something else. float64 always runs on the reference: the kernels compute in
float32.

An op has overloads of one schema: `peft_kernels::<op>`, `.reference` with the reference alone behind it, and
`.triton` with the Triton kernels, so that a forced backend is an op like any other: opaque to torch.compile,
and open to opcheck.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from peft_kernels.core.gpu import on_device_of, why_no_gpu
from peft_kernels.core.library import native_library

BACKENDS = ("reference", "cpu", "triton", "cuda")

_forced_backend: ContextVar[str | None] = ContextVar("peft_kernels_forced_backend", default=None)


def define_op(op_name: str, signature: str, triton: str | None = None) -> None:
    """Define `peft_kernels::<op_name>` and its overloads.

    Args:
        op_name: of the op.
        signature: its schema, without the name.
        triton: module with a function `op_name` that launches Triton kernels, imported by its first call.
    """
    for overload in _overloads(op_name):
        torch.library.define(overload, signature)
    if triton is not None:

        @_without_autocast
        def launcher(tensor: torch.Tensor, *args: Any) -> Any:
            with on_device_of(tensor):
                if why_no_gpu():  # an old one: `python -m peft_kernels` says so
                    return getattr(torch.ops.peft_kernels, op_name).reference(tensor, *args)
                return getattr(importlib.import_module(triton), op_name)(tensor, *args)

        torch.library.impl(f"peft_kernels::{op_name}.triton", "default", launcher)
        if importlib.util.find_spec("triton") is not None:
            torch.library.impl(f"peft_kernels::{op_name}", "CUDA", launcher)


def fake_kernel(op_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what `peft_kernels::<op_name>` returns for tensors without data (shapes, dtypes, checks)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for overload in _overloads(op_name):
            torch.library.register_fake(overload, function)
        return function

    return register


def reference_kernel(op_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a plain PyTorch function as the default kernel of `peft_kernels::<op_name>`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        kernel = _without_autocast(function)
        for overload in (f"peft_kernels::{op_name}", f"peft_kernels::{op_name}.reference"):
            torch.library.impl(overload, "default", kernel)
        return kernel

    return register


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op called in this context onto one backend. For tests, benchmarks and bug hunts.

    Functions compiled by torch.compile run eagerly inside the context: what they were compiled to has its
    backend built in. For the same reason the context cannot be entered inside a compiled function.

    Args:
        name: "reference" (plain PyTorch, any device), "cpu" (the native library), "triton" (a GPU); "cuda" is
            reserved for a backend this version does not have.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: this installation does not have that backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cuda":
        raise RuntimeError("backend 'cuda' is not part of this version; use 'triton', 'cpu' or 'reference'")
    if name == "triton" and (reason := why_no_gpu()):
        raise RuntimeError(f"backend 'triton' needs a GPU: {reason}; use 'cpu' or 'reference'")
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
        RuntimeError: `use_backend("cpu")` is in force and `tensor` is not on the CPU or is float64; or
            `use_backend("triton")`, and the op has no Triton kernel.
    """
    # Dynamo cannot trace ContextVar.get, and need not: inside use_backend nothing is compiled.
    forced = None if torch.compiler.is_compiling() else _forced_backend.get()
    if forced == "cpu" and (tensor.device.type != "cpu" or tensor.dtype == torch.float64):
        raise RuntimeError(
            f"backend 'cpu' is forced, but {op_name} got a {tensor.dtype} tensor on {tensor.device}; "
            "it takes float32, bfloat16 and float16 on the CPU: leave use_backend('cpu') for this call"
        )
    op = getattr(torch.ops.peft_kernels, op_name)
    overload: Callable[..., Any]
    if forced == "reference" or tensor.dtype == torch.float64:
        overload = op.reference
    elif forced == "triton":
        if not _has_kernel(f"{op_name}.triton", "CompositeExplicitAutograd"):
            raise RuntimeError(
                f"backend 'triton' is forced, but {op_name} has no Triton kernel: "
                "leave use_backend('triton') for this call"
            )
        overload = op.triton
    else:
        overload = op.default
    return overload


def backend_of(op_name: str, device: torch.device | str) -> str:
    """What runs op `op_name` on `device` right now, in words: "cpu (C++ avx512)", "triton" or "reference"."""
    native, forced, device_type = native_library(), _forced_backend.get(), torch.device(device).type
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    has_kernel = key is not None and _has_kernel(op_name, key)
    if forced in ("reference", "triton"):
        return forced
    if device_type == "cuda" and has_kernel and not why_no_gpu():
        return "triton"
    if device_type == "cpu" and has_kernel and native.loaded:
        return f"cpu (C++ {native.capability or 'unusable'})"
    return "reference"


def _has_kernel(overload: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{overload}", key)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with autocast switched off inside: an op's contract fixes the dtype of every step."""

    @functools.wraps(function)
    def kernel(tensor: torch.Tensor, *args: Any) -> Any:
        device_type = tensor.device.type
        if not torch.is_autocast_enabled(device_type):
            return function(tensor, *args)
        with torch.autocast(device_type, enabled=False):
            return function(tensor, *args)

    return kernel


def _overloads(op_name: str) -> tuple[str, ...]:
    return tuple(f"peft_kernels::{op_name}{overload}" for overload in ("", ".reference", ".triton"))
