"""An emulated GPU as Triton's active driver: `kernel[grid](…)` on CPU tensors, unchanged.

Triton asks its driver three things: what the device is, how to load a compiled kernel, and how to launch it.
This driver names an NVIDIA architecture, keeps a kernel's PTX instead of a cubin, and runs it in the
emulator. Everything above it is Triton's own: specialisation on divisibility, autotuning, heuristics, the
compiler. For AMD GPUs it compiles and records, and runs nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends import Backend, backends
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget, Language
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from gpuless.launch import launch


@dataclass(frozen=True)
class Model:
    """A GPU, as far as plans depend on it."""

    name: str
    multiprocessors: int
    shared_memory: int  # bytes that one CTA may have


MODELS: dict[int | str, Model] = {
    80: Model("A100", 108, 166912),
    86: Model("A40", 84, 101376),
    89: Model("L40S", 142, 101376),
    90: Model("H100", 132, 232448),
    100: Model("B200", 148, 232448),  # compiled only: its tensor instructions are not emulated
    120: Model("RTX 5090", 170, 101376),
    # compiled only
    "gfx90a": Model("MI210", 104, 65536),
    "gfx942": Model("MI300X", 304, 65536),
    "gfx1100": Model("RX 7900 XTX", 48, 65536),
}  # CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; AMD's data sheets


@dataclass
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        name: of the kernel.
        arch: it was compiled for, 90 for sm_90, or "gfx942".
        grid: CTAs in x, y, z.
        num_warps, num_stages: its options.
        shared: bytes of dynamic shared memory.
        ptx: the compiled kernel; for AMD GPUs its assembly.
        source: what was compiled, with Triton's specialisation: to compile it again for another target.
        metadata: Triton's facts about it, every compiler option among them.
        tensors: the arguments that are tensors, by name.
        result: what the emulator counted; None where nothing ran.
    """

    name: str
    arch: int | str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    shared: int
    ptx: str = field(repr=False)
    source: ASTSource = field(repr=False)
    metadata: Any = field(repr=False)
    tensors: dict[str, torch.Tensor] = field(repr=False)
    result: Any = None


@dataclass
class EmulatedGPU:
    """What `device()` yields: the device, and all that was launched on it."""

    arch: int | str
    execute: bool
    strict: bool
    counts: bool
    multiprocessors: int
    launches: list[Launch] = field(default_factory=list)


class _PtxCompiler(CUDABackend):
    """Triton's compiler for NVIDIA GPUs, stopped before ptxas."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Language) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:  # of the cache: a kernel without cubin must not be taken for one with
        return f"gpuless-{super().hash()}"


class _AmdCompiler(HIPBackend):
    """Triton's compiler for AMD GPUs, stopped before the assembler."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "amdgcn"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Language) -> None:
        super().add_stages(stages, options, language)
        del stages["hsaco"]

    def hash(self) -> str:
        return f"gpuless-{super().hash()}"


MOST_CTAS_Y_Z = 65535  # CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"


class _Utils:
    def __init__(self, gpu: EmulatedGPU) -> None:
        self._gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": MODELS[self._gpu.arch].shared_memory,
            "multiprocessor_count": self._gpu.multiprocessors,
            "warpSize": target_of(self._gpu.arch).warp_size,
        }

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[Any, str, int, int, int]:
        return object(), ptx.decode(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class _Launcher:
    def __init__(self, source: ASTSource, metadata: Any) -> None:
        self._source, self._metadata = source, metadata
        self._is_argument = [kind != "constexpr" for kind in source.signature.values()]

    def __call__(self, x: int, y: int, z: int, stream: int, ptx: str, *rest: Any) -> None:
        bound = rest[4:]  # after packed and launch metadata, enter and exit hook
        gpu, metadata = triton.runtime.driver.active.gpu, self._metadata
        if y > MOST_CTAS_Y_Z or z > MOST_CTAS_Y_Z:
            raise ValueError(f"grid must be at most {MOST_CTAS_Y_Z} in y and z, got {(x, y, z)}")
        named = zip(self._source.signature, bound, self._is_argument, strict=True)
        given = {name: value for name, value, is_one in named if is_one}
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        record = Launch(
            metadata.name, gpu.arch, (x, y, z), metadata.num_warps, metadata.num_stages, metadata.shared, ptx,
            self._source, metadata, tensors,
        )  # fmt: skip
        gpu.launches.append(record)
        if gpu.execute and x * y * z:
            record.result = launch(
                ptx, (x, y, z), [*given.values()], argument_names=[*given], shared=metadata.shared,
                strict=gpu.strict, counts=gpu.counts,
            )  # fmt: skip


class EmulatedDriver(DriverBase):
    """Triton's view of the emulated GPU."""

    launcher_cls = _Launcher

    def __init__(self, gpu: EmulatedGPU) -> None:
        super().__init__()
        self.gpu, self.utils = gpu, _Utils(gpu)

    @classmethod
    def is_active(cls) -> bool:
        return False  # never found by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no launcher is compiled for an emulated GPU")

    def get_current_target(self) -> GPUTarget:
        return target_of(self.gpu.arch)

    def get_current_device(self) -> int | str:
        return self.gpu.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        """For autotune: runs the call once, for its checks; all configurations are equally fast."""

        def run_once(call: Callable[[], None], *, quantiles: Sequence[float], **_: Any) -> list[float]:
            call()
            return [0.0] * len(quantiles)

        return run_once


def target_of(arch: int | str) -> GPUTarget:
    """Triton's name of an architecture."""
    if isinstance(arch, int):
        return GPUTarget("cuda", arch, 32)
    return GPUTarget("hip", arch, 32 if arch.startswith("gfx11") else 64)


@torch.library.impl("aten::mm.dtype", "CPU")
def _mm(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """What CUDA has and the CPU lacks: a product of 16-bit operands that is not rounded to 16 bits."""
    return torch.mm(left.to(out_dtype), right.to(out_dtype))


@contextlib.contextmanager
def device(
    arch: int | str,
    *,
    execute: bool = True,
    strict: bool = True,
    counts: bool = False,
    multiprocessors: int | None = None,
) -> Iterator[EmulatedGPU]:
    """Make an emulated GPU of compute capability `arch` (90 for sm_90) Triton's device.

    Args:
        arch: 80, 86, 89, 90 or 120; with execute=False also 100, "gfx90a", "gfx942" and "gfx1100".
        execute: False compiles and records the launches without running them: tensors may then be large.
        strict: raise `Report` at the first launch with a finding; otherwise findings stay in its result.
        counts: count instructions, memory transactions and bytes of every launch (slower).
        multiprocessors: that it has; by default those of the model of this architecture.

    Yields:
        The device, with the list of its launches.
    """
    if arch not in MODELS:
        raise ValueError(f"arch must be one of {', '.join(map(str, MODELS))}, got {arch}")
    if execute and isinstance(arch, str):
        raise ValueError(
            f"execute must be False for AMD GPUs, whose code is not emulated, got True for {arch}"
        )
    multiprocessors = multiprocessors or MODELS[arch].multiprocessors
    gpu, config = EmulatedGPU(arch, execute, strict, counts, multiprocessors), triton.runtime.driver
    before, originals = config._active, dict(backends)
    backends["nvidia"] = Backend(_PtxCompiler, originals["nvidia"].driver)
    backends["amd"] = Backend(_AmdCompiler, originals["amd"].driver)
    config.set_active(EmulatedDriver(gpu))
    try:
        yield gpu
    finally:
        config._active = before
        backends.update(originals)
