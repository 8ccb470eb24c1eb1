"""nvcc and g++ with a cache: CUDA sources to PTX, and to a library with their host code for the emulator."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "gpuless"
TORCH = Path(torch.__file__).parent
RUNTIME = Path(__file__).with_name("cuda_runtime.cpp")
# As in CMakeLists.txt.
CUDA_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", "--expt-relaxed-constexpr")
_SPECIFIC = (90, 100)  # compiled for their own instructions, as sm_90a
_HOST_FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"),
    *("-DPEFT_KERNELS_CUDA", "-DPEFT_KERNELS_EMULATED_CUDA", f"-isystem{TORCH}/include"),
)


class CompileError(RuntimeError):
    """A compiler refused; the message holds what it said."""


@dataclass(frozen=True)
class Sources:
    """What becomes a library.

    Attributes:
        kernels: .cu files: kernels and their launchers.
        bindings: .cpp files that see torch.
        include: folders; every file in them counts as a header of every source.
    """

    kernels: tuple[Path, ...]
    bindings: tuple[Path, ...]
    include: tuple[Path, ...]

    @classmethod
    def of_the_project(cls) -> Sources:
        """The package's own."""
        bindings = ROOT / "python_bindings"
        return cls(
            kernels=tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu"))),
            bindings=(*sorted((bindings / "cuda").glob("*.cpp")), bindings / "tensors.cpp"),
            include=(ROOT / "csrc", bindings),
        )


def nvcc() -> str | None:
    """Path of nvcc."""
    return shutil.which("nvcc")


def ptx(source: Path, arch: int, include: Sequence[Path] = (ROOT / "csrc",)) -> str:
    """A .cu file compiled for an architecture, 90 for sm_90a; from the cache where nothing has changed."""
    target = f"compute_{arch}{'a' if arch in _SPECIFIC else ''}"
    flags = [*CUDA_FLAGS, *(f"-I{folder}" for folder in include)]
    command = [_nvcc(), "-ptx", f"-arch={target}", *flags, str(source)]
    return _cached(source.stem + ".ptx", command, _inputs(source, include)).read_text()


def cubin(source: Path, arch: int, include: Sequence[Path] = (ROOT / "csrc",)) -> bytes:
    """A .cu file assembled for an architecture, as it ships."""
    target = f"sm_{arch}{'a' if arch in _SPECIFIC else ''}"
    flags = [*CUDA_FLAGS, *(f"-I{folder}" for folder in include)]
    command = [_nvcc(), "-cubin", f"-arch={target}", *flags, str(source)]
    return _cached(source.stem + ".cubin", command, _inputs(source, include)).read_bytes()


def library(sources: Sources) -> Path:
    """The shared library of all sources and the emulator's CUDA runtime."""
    if not sources.kernels:
        raise CompileError("sources must have .cu files, got none")
    include = [f"-I{folder}" for folder in sources.include]
    host = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=none", "-c"]
    device = [_nvcc(), "-gencode=arch=compute_80,code=compute_80", *CUDA_FLAGS, *include, *host]
    commands = [(path, [*device, str(path)]) for path in sources.kernels]
    commands += [(path, ["g++", *_HOST_FLAGS, *include, "-c", str(path)]) for path in sources.bindings]
    commands += [(RUNTIME, [_nvcc(), "-std=c++17", *host, str(RUNTIME)])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = pool.map(
            lambda item: _cached(f"{item[0].stem}.o", item[1], _inputs(item[0], sources.include)), commands
        )
        objects = [*objects]
    link = ["g++", "-shared", "-Wl,-z,defs", "-Wl,--no-as-needed", *map(str, objects)]
    link += [f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    return _cached("emulated_cuda.so", link, objects)


def source_of(kernel: str, sources: Sources) -> Path:
    """The file that a kernel is in: nvcc's host code registers it by the name that it has in the PTX."""
    found = [path for path in sources.kernels if kernel in _entries(path, sources.include)]
    if len(found) != 1:
        raise CompileError(f"kernel must be in one source, got {kernel} in {found or 'none'}")
    return found[0]


@functools.lru_cache(maxsize=64)
def _entries(path: Path, include: tuple[Path, ...]) -> frozenset[str]:
    return frozenset(re.findall(r"\.entry\s+([$\w]+)", ptx(path, 80, include)))


def _nvcc() -> str:
    path = nvcc()
    if path is None:
        raise CompileError("nvcc is not on PATH")
    return path


def _inputs(source: Path, include: Sequence[Path]) -> list[Path]:
    headers = {path for folder in include for suffix in ("h", "cuh") for path in folder.rglob(f"*.{suffix}")}
    return [source, *sorted(headers)]


def _cached(name: str, command: list[str], inputs: Iterable[Path]) -> Path:
    """What `command -o name` makes, unless it was made of the same inputs before."""
    key = hashlib.sha256("\0".join([sys.version, *_versions(), *command]).encode())
    for path in inputs:
        key.update(f"\0{path}\0".encode() + path.read_bytes())
    result = CACHE / key.hexdigest()[:32] / name
    if not result.is_file():
        result.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=result.parent) as folder:  # other processes may be here too
            made = Path(folder) / name
            run = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if run.returncode:
                raise CompileError(f"{shlex.join(command)}\n{run.stdout}{run.stderr}")
            made.replace(result)
    return result


@functools.cache
def _versions() -> tuple[str, str, str]:
    def say(compiler: str) -> str:
        return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout

    return torch.__version__, say("g++"), say(_nvcc())
