"""Ops and their implementations: how they are registered, and which one runs.

Each op has a reference in plain PyTorch, registered as its default kernel. Where the native library is
loaded, its kernels are registered for the CPU key, and for the CUDA key its CUDA C++ kernels, where it was
built with them, or Triton's; the dispatcher prefers them, unless `use_backend` forces something else. float64
always runs on the reference: the kernels compute in float32.

An op has overloads of one schema: `peft_kernels::<op>`, `.reference` with the reference alone behind it,
`.triton` with the Triton kernels and `.cuda` with the CUDA C++ ones, so that a forced backend is an op like
any other: opaque to torch.compile, and open to opcheck. Problems that the CUDA C++ kernels of an op do not
take go on to `.triton`.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from peft_kernels.core.checks import check_device, check_memory, check_tensor
from peft_kernels.core.gpu import on_device, why_no_gpu
from peft_kernels.core.library import native_library

BACKENDS = ("reference", "cpu", "triton", "cuda")

_forced_backend: ContextVar[str | None] = ContextVar("peft_kernels_forced_backend", default=None)


def define_op(op_name: str, signature: str, triton: str | None = None, cuda: str | None = None) -> None:
    """Define `peft_kernels::<op_name>` and its overloads.

    Args:
        op_name: of the op.
        signature: its schema, without the name.
        triton: module with a function `op_name` that launches Triton kernels, imported by its first call.
        cuda: the same for an op that gets its CUDA C++ kernels by way of Python; others are registered by the
            native library.
    """
    for overload in _overloads(op_name):
        torch.library.define(overload, signature)
    for name, module in (("triton", triton), ("cuda", cuda)):
        if module is not None:
            torch.library.impl(f"peft_kernels::{op_name}.{name}", "default", _launcher(op_name, module))


def serve_gpus() -> None:
    """Register for GPUs what is launched from Python: all that the native library has no kernel for.

    Called once, when the ops are defined and the native library is loaded.
    """
    if importlib.util.find_spec("triton") is None:
        return
    overloads = ("cuda", "triton") if native_library().cuda_architectures else ("triton",)
    for op_name in op_names():
        found = [o for o in overloads if _has_overload(op_name, o)]
        if found and not _has_kernel(op_name, "CUDA"):
            launcher = getattr(getattr(torch.ops.peft_kernels, op_name), found[0])
            torch.library.impl(f"peft_kernels::{op_name}", "CUDA", launcher)


def op_names() -> list[str]:
    """All ops of this package."""
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    return sorted(name.removeprefix("peft_kernels::") for name in names if name.startswith("peft_kernels::"))


def fake_kernel(op_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what `peft_kernels::<op_name>` returns for tensors without data (shapes, dtypes, checks).

    The dispatcher also calls it where one tensor among others is on the meta device. That is refused, or the
    result would be memory that nobody writes.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        names = [argument.name for argument in _arguments(op_name)]

        @functools.wraps(function)
        def kernel(*args: Any) -> Any:
            tensors = [(n, t) for n, t in zip(names, args, strict=True) if isinstance(t, torch.Tensor)]
            for name, tensor in tensors:
                if (tensor.device.type == "meta") != (tensors[0][1].device.type == "meta"):
                    check_device(name, tensor, *tensors[0])
            return function(*args)

        for overload in _overloads(op_name):
            torch.library.register_fake(overload, kernel)
        return function

    return register


def reference_kernel(op_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a plain PyTorch function as the default kernel of `peft_kernels::<op_name>`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        kernel = _in_memory(op_name, _without_autocast(function))
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
        name: "reference" (plain PyTorch, any device), "cpu" (the native library), "triton" (a GPU), "cuda" (a
            GPU: the CUDA C++ kernels, and Triton's for problems that they do not take; see `pk.explain`).

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: this installation does not have that backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name in ("triton", "cuda") and (reason := why_no_gpu()):
        raise RuntimeError(f"backend {name!r} needs a GPU: {reason}; use 'cpu' or 'reference'")
    if name == "cuda" and not has_cuda_kernels():
        raise RuntimeError(
            "backend 'cuda' needs a native library with CUDA C++ kernels: install the package where nvcc and "
            "a CUDA build of torch are (PEFT_KERNELS_CUDA=1 says what is missing), or use 'triton'"
        )
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
            `use_backend("triton")` or `("cuda")`, and the op has no such kernel.
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
    elif forced in ("triton", "cuda"):
        # What the CUDA C++ kernels do not serve at all, Triton's do.
        kernels = ("cuda", "triton") if forced == "cuda" else ("triton",)
        found = [k for k in kernels if _has_overload(op_name, k)]
        if not found:
            raise RuntimeError(
                f"backend {forced!r} is forced, but {op_name} has no {forced.title()} kernel: "
                f"leave use_backend({forced!r}) for this call"
            )
        overload = getattr(op, found[0])
    else:
        overload = op.default
    return overload


def backend_of(op_name: str, device: torch.device | str) -> str:
    """What runs op `op_name` on `device` right now, in words.

    "cpu (C++ avx512)", "cuda" (CUDA C++, and Triton for what it does not take), "triton" or "reference".
    """
    native, forced, device_type = native_library(), _forced_backend.get(), torch.device(device).type
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    has_kernel = key is not None and _has_kernel(op_name, key)
    if forced in ("reference", "triton"):
        return forced
    if forced == "cuda" or (device_type == "cuda" and has_kernel and not why_no_gpu()):
        native_gpu = forced == "cuda" or native.cuda_architectures
        in_cpp = native_gpu and _has_overload(op_name, "cuda")
        return "cuda" if in_cpp else "triton"
    if device_type == "cpu" and has_kernel and native.loaded:
        return f"cpu (C++ {native.capability or 'unusable'})"
    return "reference"


def has_cuda_kernels() -> bool:
    """Whether CUDA C++ kernels are registered."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        "peft_kernels_cuda::plan", "CompositeExplicitAutograd"
    )


def _has_overload(op_name: str, overload: str) -> bool:
    """Whether "cuda" or "triton" kernels of an op are registered."""
    return _has_kernel(f"{op_name}.{overload}", "CompositeExplicitAutograd")


def _has_kernel(overload: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{overload}", key)


def _launcher(op_name: str, module: str) -> Callable[..., Any]:
    """Calls the function `op_name` of `module`, or the reference where no kernel can run."""

    @_without_autocast
    def launcher(tensor: torch.Tensor, *args: Any) -> Any:
        with on_device(tensor.device):
            if why_no_gpu():  # an old one: `python -m peft_kernels` says so
                return getattr(torch.ops.peft_kernels, op_name).reference(tensor, *args)
            return getattr(importlib.import_module(module), op_name)(tensor, *args)

    return launcher


def _in_memory(op_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which requires its tensors to have memory, as native kernels do for themselves."""
    tensors = [
        (index, argument.name, str(argument.type) == "Tensor")
        for index, argument in enumerate(_arguments(op_name))
        if "Tensor" in str(argument.type)
    ]

    @functools.wraps(function)
    def kernel(*args: Any) -> Any:
        for index, name, required in tensors:
            if required or args[index] is not None:  # the dispatcher lets None pass for any tensor
                check_tensor(name, args[index])
                check_memory(name, args[index])
        return function(*args)

    return kernel


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


def _arguments(op_name: str) -> Any:
    """The arguments in the schema of an op."""
    return getattr(torch.ops.peft_kernels, op_name).default._schema.arguments


def _overloads(op_name: str) -> tuple[str, ...]:
    return tuple(f"peft_kernels::{op_name}{overload}" for overload in ("", ".reference", ".triton", ".cuda"))
