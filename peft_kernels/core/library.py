"""The native library `peft_kernels/_native.so`: load it once, and say plainly when it cannot be."""

import ctypes
import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

NATIVE_LIBRARY_PATH = Path(__file__).resolve().parent.parent / "_native.so"
BUILD_FAILURE_NOTE = "_native_build_failure.txt"  # in its place, left by setup.py where the build failed
CUDA_FAILURE_NOTE = "_native_cuda_failure.txt"  # beside it, where it had to be built without CUDA C++ kernels


@dataclass(frozen=True)
class NativeLibrary:
    """What became of the native library in this process.

    Attributes:
        path: where the library is, or should be.
        loaded: whether its kernels are registered with the dispatcher.
        reason: why it is not loaded; None when it is.
        capability: instruction set its CPU kernels use, for example "avx512"; None when not loaded, and
            when PEFT_KERNELS_CPU_CAPABILITY names one that this machine lacks (every call then fails).
        capabilities_found: instruction sets it was built for and this machine has; empty when not loaded.
        cuda_architectures: for which it has CUDA C++ kernels, for example ("80", "90a"); empty for none.
    """

    path: Path
    loaded: bool
    reason: str | None
    capability: str | None
    capabilities_found: tuple[str, ...]
    cuda_architectures: tuple[str, ...] = ()


def load_native_library(path: Path) -> NativeLibrary:
    """Load the library at `path`, so that its kernels take over from the reference; warn if that fails.

    The op schemas must be defined before this is called. Set PEFT_KERNELS_CPU_CAPABILITY (say, to
    "avx2") before the first import to force a lower instruction set than the best one found.
    """
    reason = _load(path)
    if reason is not None:
        warnings.warn(
            f"peft_kernels runs WITHOUT its native kernels, on the slow PyTorch reference: {reason}. "
            "Remedy: `make build` in a checkout; else `pip install --force-reinstall --no-deps` the package.",
            RuntimeWarning,
            stacklevel=2,
        )
        return NativeLibrary(path, False, reason, None, ())
    symbols = ctypes.CDLL(str(path))
    found = (_text(symbols, "peft_kernels_cpu_capabilities") or "").split(",")
    architectures = _text(symbols, "peft_kernels_cuda_architectures") or ""
    return NativeLibrary(
        path,
        True,
        None,
        _text(symbols, "peft_kernels_cpu_capability"),
        tuple(found),
        tuple(architectures.split(",")) if architectures else (),
    )


@functools.cache
def native_library() -> NativeLibrary:
    """The record of this installation's native library, loaded by the first call: `import peft_kernels`."""
    return load_native_library(NATIVE_LIBRARY_PATH)


def _load(path: Path) -> str | None:
    """Load the library; the reason when that fails."""
    if path.with_name(BUILD_FAILURE_NOTE).is_file():
        return "it could not be built; `python -m peft_kernels` shows the errors of the build"
    if not path.is_file():
        return f"{path} does not exist"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{path} does not load ({error.__cause__ or error})"
    return None


def _text(symbols: ctypes.CDLL, name: str) -> str | None:
    """What a `const char* name()` of the library returns; None for a null pointer."""
    function = symbols[name]
    function.restype = ctypes.c_char_p
    text: bytes | None = function()
    return None if text is None else text.decode()
