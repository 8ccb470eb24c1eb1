"""The limits of this machine, measured in the same run with torch: memory bandwidth and arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .case import Prepared
from .device import Device
from .machine import last_level_cache

_REPEATS = 5  # a limit is the best of these
_LARGEST_BUFFER = 1 << 30
_MATRIX, _GPU_MATRIX = 1536, 8192
_CHANNELS, _PIXELS = 256, 30


@dataclass(frozen=True)
class Roofline:
    """Bandwidth of DRAM in GB/s (1e9) and peak GFLOP/s by data type, with `threads` threads."""

    threads: int
    read_gb_s: float
    write_gb_s: float
    gflop_s: dict[str, float]

    def milliseconds(self, prepared: Prepared, dtype: str) -> tuple[float, str]:
        """Shortest time of a case: max(bytes / bandwidth, flops / peak), and which of the two bounds it."""
        memory = prepared.read_bytes / (self.read_gb_s * 1e6) + prepared.write_bytes / (self.write_gb_s * 1e6)
        compute = prepared.flops / (max(self.gflop_s["float32"], self.gflop_s[dtype]) * 1e6)
        return max((memory, "memory"), (compute, "compute"))


def measure_gpu_roofline(dtypes: Iterable[str], device: Device) -> Roofline:
    """Measure the limits of a GPU, as those of one thread; under a second."""

    def best(call: Callable[[], Any]) -> float:
        def finished() -> None:
            call()
            device.synchronize()

        return _best(finished)

    def peak(dtype: torch.dtype) -> float:
        matrix = torch.ones(_GPU_MATRIX, _GPU_MATRIX, dtype=dtype)
        return 2 * _GPU_MATRIX**3 / best(lambda: matrix @ matrix) / 1e9

    with device.tensors():
        buffer = torch.ones(_LARGEST_BUFFER // 4)
        read, write = best(buffer.sum), best(lambda: buffer.fill_(2.0))
        peaks = {name: peak(getattr(torch, name)) for name in sorted({"float32", *dtypes})}
        return Roofline(1, buffer.nbytes / read / 1e9, buffer.nbytes / write / 1e9, peaks)


def measure_roofline(threads: int, dtypes: Iterable[str]) -> Roofline:
    """Measure the limits with `threads` threads; about a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        elements = max(64 << 20, min(_LARGEST_BUFFER, 4 * last_level_cache())) // 4
        buffer = torch.ones(elements)
        read = min(_best(lambda: torch.dot(buffer, buffer)), _best(buffer.sum))
        write = _best(lambda: buffer.fill_(2.0))
        peaks = {name: _peak(getattr(torch, name)) for name in {"float32", *dtypes}}
        return Roofline(threads, buffer.nbytes / read / 1e9, buffer.nbytes / write / 1e9, peaks)
    finally:
        torch.set_num_threads(before)


def _peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the better of a matrix product and a 3 x 3 convolution.

    The two come from different libraries (MKL and oneDNN), and MKL leaves half of some processors unused.
    """
    matrix = torch.ones(_MATRIX, _MATRIX, dtype=dtype)
    product = 2 * _MATRIX**3 / _best(lambda: matrix @ matrix)
    image = torch.ones(1, _CHANNELS, _PIXELS + 2, _PIXELS + 2, dtype=dtype).to(
        memory_format=torch.channels_last
    )
    filters = torch.ones(_CHANNELS, _CHANNELS, 3, 3, dtype=dtype)
    with torch.no_grad():
        convolution = 18 * (_CHANNELS * _PIXELS) ** 2 / _best(lambda: F.conv2d(image, filters))
    return max(product, convolution) / 1e9


def _best(call: Callable[[], Any]) -> float:
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
