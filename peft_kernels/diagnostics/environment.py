"""What is here and what runs where: versions, hardware, the native library, a backend for every op."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from peft_kernels import __version__
from peft_kernels.core.backend import backend_of, op_names
from peft_kernels.core.gpu import gpu, why_no_gpu
from peft_kernels.core.library import BUILD_FAILURE_NOTE, CUDA_FAILURE_NOTE, native_library

LIBRARIES = ("torch", "triton", "bitsandbytes", "peft", "adapters", "transformers", "numpy")
ENVIRONMENT = re.compile(  # variables that change what runs, or how fast
    "PEFT_KERNELS_.*|(OMP|GOMP|KMP|MKL|MALLOC|TRITON)_.*|GLIBC_TUNABLES|LD_PRELOAD|CUDA_VISIBLE_DEVICES"
)

ABSENT = "not installed"

GPU_PARTS = ("nf4_linear_backward_input",)  # ops that only other ops call, and on GPUs alone

Section = dict[str, str]


def versions() -> Section:
    """Versions of Python and of every library that matters here."""
    return {
        "peft_kernels": __version__,
        "python": f"{platform.python_version()} ({platform.platform()})",
        **{name: _version(name) for name in LIBRARIES},
    }


def hardware() -> Section:
    """Processor, threads, GPU, and the environment variables that change what runs on them."""
    native = native_library()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cuda_build = torch.version.cuda or torch.version.hip or "no: this torch is built for CPUs only"
    return {
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "instruction sets found": ", ".join(native.capabilities_found) or "unknown (no native library)",
        "instruction set used": native.capability or "none (see native library)",
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
        "CUDA in torch": cuda_build,
        "GPUs": ", ".join(gpus) or "none visible",
        "Triton": f"idle: {reason}" if (reason := why_no_gpu()) else f"ready for {gpu().arch}",
        **{name: os.environ[name] for name in sorted(os.environ) if ENVIRONMENT.fullmatch(name)},
    }


def native() -> Section:
    """The native library: where it was loaded from and whom it serves, or why not."""
    record = native_library()
    if not record.loaded:
        return {"NOT LOADED": str(record.reason), **_note(record.path, BUILD_FAILURE_NOTE)}
    if record.capability is None:
        name = os.environ.get("PEFT_KERNELS_CPU_CAPABILITY")
        return {
            "loaded from": str(record.path),
            "NOT USABLE": f"PEFT_KERNELS_CPU_CAPABILITY={name} names no instruction set of this machine",
        }
    gpus = ", ".join(f"sm_{arch}" for arch in record.cuda_architectures)
    return {
        "loaded from": str(record.path),
        "CUDA C++ kernels for": gpus or "no GPU: built without them",
        **_note(record.path, CUDA_FAILURE_NOTE),
    }


def backends() -> Section:
    """What runs each op on each kind of device that is here."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    ops = [op for op in op_names() if op not in GPU_PARTS]
    return {
        op: ", ".join(f"{backend_of(op, device)} for {device} tensors" for device in devices) for op in ops
    }


def inventory() -> dict[str, Section]:
    """All of it, by section title."""
    return {
        "versions": versions(),
        "hardware": hardware(),
        "native library": native(),
        "backends": backends(),
    }


def _note(library: Path, name: str) -> Section:
    """What setup.py left where something could not be built."""
    note = library.with_name(name)
    return {"when it was built": note.read_text().rstrip()} if note.is_file() else {}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty on most distributions
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
