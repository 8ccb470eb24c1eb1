"""The GPU that Triton kernels run on, as far as their plans depend on it."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch

from peft_kernels.core.checks import check_dtype

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REGISTERS = 65536  # of a multiprocessor, for NVIDIA's GPUs of these architectures
OLDEST_ARCH = 80  # tensor cores that take bf16 and TF32


@dataclass(frozen=True)
class GPU:
    """One GPU, as Triton's driver describes it.

    Attributes:
        backend: "cuda" or "hip".
        arch: compute capability, 90 for sm_90; on AMD its name, "gfx942".
        multiprocessors: how many it has.
        shared_memory: bytes that one CTA may have.
    """

    backend: str
    arch: int | str
    multiprocessors: int
    shared_memory: int

    @property
    def tile_rows(self) -> int:
        """Rows that a tile of a product may have.

        With 64 Triton takes tcgen05 on a B200 and B300, which our emulator does not have, and on AMD's GPUs
        products in fp32, which have no TF32 there, spill.
        """
        return 32 if self.arch in (100, 103) or self.backend == "hip" else 64

    @property
    def fp32_precision(self) -> str:
        """How `tl.dot` takes fp32 operands at fp32's accuracy: as three TF32 products where there are any."""
        return "tf32x3" if self.backend == "cuda" else "ieee"


def gpu() -> GPU:
    """The current GPU.

    Raises:
        RuntimeError: there is none, or no Triton.
    """
    driver = _driver()
    return _describe(driver, driver.get_current_device())


def launch_options(warps: int, stages: int = 1, registers: int | None = None) -> dict[str, Any]:
    """Options of a Triton launch: no contraction, and `registers`, or as many as let two CTAs fit.

    Contraction would decide by itself where a product is rounded. In a sum over lanes, x y + (the same of
    another lane), it would do so differently from lane to lane, and copies of one sum would differ.
    """
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if gpu().backend == "cuda":  # left to itself, ptxas aims at one more CTA and spills for it
        options["maxnreg"] = registers or min(255, REGISTERS // (2 * 32 * warps))
    return options


def check_kernel_dtype(name: str, tensor: torch.Tensor) -> None:
    """Require a dtype that Triton kernels take: float64 is the reference's."""
    check_dtype(name, tensor, KERNEL_DTYPES, "or leave use_backend('triton') for this call")


def with_plain_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The same matrix: its rows may lie anywhere, but their elements lie side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def why_no_gpu() -> str | None:
    """Why Triton kernels cannot run here, in words; None where they can."""
    try:
        _driver()
    except ImportError as error:
        return f"Triton is not installed ({error})"
    except RuntimeError:  # "0 active drivers"
        return "Triton finds none on this machine"
    arch = gpu().arch
    if isinstance(arch, int) and arch < OLDEST_ARCH:
        return f"it has compute capability {arch / 10}, and {OLDEST_ARCH / 10} is needed"
    return None


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one: kernels are launched there, on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


@functools.lru_cache(maxsize=8)
def _describe(driver: Any, device: int) -> GPU:
    target, properties = driver.get_current_target(), driver.utils.get_device_properties(device)
    return GPU(target.backend, target.arch, properties["multiprocessor_count"], properties["max_shared_mem"])
