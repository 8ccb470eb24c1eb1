"""Facts about the machine and the software that a result is worth nothing without."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import peft_kernels
from peft_kernels.core.library import native_library

_CPU = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_LAST_LEVEL = 32 << 20
# Smaller weights live in a cache in a real model too: MiniLM's are 0.1 to 0.4 MB each.
ROTATED_BYTES = 1 << 20
MAX_COPIES = 64


@dataclass(frozen=True)
class Machine:
    """Processor, its caches in bytes (level -> size), processors this process may use, and versions.

    `gpu`: what is measured on instead, in words.
    """

    cpu: str
    system: str
    processors: int
    caches: dict[str, int]
    torch_capability: str
    native_capability: str | None
    native_reason: str | None
    versions: dict[str, str | None]
    gpu: str | None


def machine_facts(gpu: str | None = None) -> Machine:
    """Collect the facts of this machine; `gpu` where one is measured."""
    native = native_library()
    names = (
        "torch",
        "bitsandbytes",
        "peft",
        "transformers",
        "adapters",
        *(("triton", "unsloth") if gpu else ()),
    )
    libraries = {name: _version(name) for name in names}
    return Machine(
        cpu=_cpu_model(),
        system=" ".join((platform.system(), platform.release(), platform.machine(), *platform.libc_ver())),
        processors=usable_processors(),
        caches=cache_sizes(),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        native_capability=native.capability,
        native_reason=native.reason,
        versions={"python": platform.python_version(), "peft_kernels": peft_kernels.__version__, **libraries},
        gpu=gpu,
    )


def usable_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cache_sizes() -> dict[str, int]:
    """Data and unified caches of one processor, `{"L1": bytes, ...}`; empty where the system does not say."""
    sizes = {}
    for index in sorted(_CPU.glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            size = (index / "size").read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            sizes["L" + (index / "level").read_text().strip()] = int(size.rstrip("KM")) * unit
    return sizes


def last_level_cache() -> int:
    """Bytes of the last-level cache (32 MiB where unknown)."""
    return max(cache_sizes().values(), default=_UNKNOWN_LAST_LEVEL)


def weight_copies(weight_bytes: int) -> int:
    """Copies of a weight to rotate over, so that none is still in the last-level cache when its turn comes.

    Together they are twice the cache. One copy for weights below `ROTATED_BYTES`, and on a GPU, whose timer
    flushes the cache.
    """
    if weight_bytes < ROTATED_BYTES or torch.get_default_device().type != "cpu":
        return 1
    return min(MAX_COPIES, -(-2 * last_level_cache() // weight_bytes))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()
