"""Memory: bytes saved for backward, and the peak of resident memory that a call needs beyond its results."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .case import Program

_PROC = Path("/proc/self")


def saved_bytes(program: Program) -> int | None:
    """Bytes that one forward of a case keeps alive for its backward; None where nothing is differentiated."""
    return None if program.forward is None else saved_by(program.forward, program.frozen)


def saved_by(forward: Callable[[], Any], excluded: Iterable[Tensor]) -> int:
    """Bytes that `forward` keeps alive for its backward: whole storages, those of `excluded` left out.

    Args:
        forward: the call; its input counts, since it must stay alive.
        excluded: weights and parameters, which are there anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    saved: dict[int, int] = {}  # address of a storage -> bytes: what is saved twice is there once

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept until all is counted: a freed storage's address could be used again
    del result
    return sum(saved.values())


def can_measure_scratch() -> bool:
    """Whether this system resets its high-water mark of resident memory (Linux)."""
    return (_PROC / "clear_refs").exists() and (_PROC / "smaps_rollup").exists()


def scratch_bytes(program: Program, result_bytes: int) -> int:
    """Peak resident memory of a call beyond its results: temporaries, and buffers that the first call leaves.

    All memory counts, whoever allocated it (torch, C++, MKL). Left behind: anonymous memory after the first
    call less that before it. Temporary: high-water mark of the second call over what was resident, less
    `result_bytes`. Freed heap pages are handed back to the system first, so that reusing them is not free.
    To be called in a process of its own (see worker.py), in which nothing else allocates.
    """
    _trim_heap()
    before = _kilobytes("smaps_rollup", "Anonymous")
    program.call()
    _trim_heap()
    retained = _kilobytes("smaps_rollup", "Anonymous") - before
    (_PROC / "clear_refs").write_text("5")  # reset VmHWM
    resident = _kilobytes("status", "VmRSS")
    program.call()
    peak = _kilobytes("status", "VmHWM") - resident
    return max(0, retained * 1024) + max(0, peak * 1024 - result_bytes)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *grads: Any) -> Any:
        return grads[0]


def warm_up() -> None:
    """Let torch do what it does once: start threads, load the autograd engine (30 MB)."""
    x = torch.ones(256, 256, requires_grad=True)
    y = _Identity.apply(x @ x)  # type: ignore[no-untyped-call]
    torch.autograd.grad(y, x, torch.ones_like(y))


def _kilobytes(file: str, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", (_PROC / file).read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/{file} must have a line {field}, has none")
    return int(match[1])


def _trim_heap() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc; elsewhere reused pages stay uncounted
        libc.malloc_trim(0)
