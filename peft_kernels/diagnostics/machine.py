"""The facts about this machine and installation on which advice depends, gathered in one place."""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from packaging.requirements import Requirement

from peft_kernels.core import gpu
from peft_kernels.core.library import NATIVE_LIBRARY_PATH, NativeLibrary, native_library
from peft_kernels.ops.linear import regimes, triton_plan

EXTRAS = ("peft", "adapters", "triton")  # of pyproject.toml: the versions that this package works with


@dataclass(frozen=True)
class Machine:
    """What a rule of `advice.py` may look at.

    Attributes:
        native: the record of the native library.
        install: the command that builds and installs this package again.
        libraries: the version of every library of `requirements` that is installed.
        requirements: what the extras of this package ask for, by extra.
        torch_cuda: the version of CUDA that torch is built for; None for a build without.
        system_gpus: names of the GPUs that `nvidia-smi` lists; asked only where torch sees none.
        torch_gpus: names of the GPUs that torch sees.
        triton_found: whether there is a module `triton`, whatever it was installed as.
        triton_refuses: why Triton kernels cannot run, `core.gpu.why_no_gpu`.
        cuda_kernels_run: whether the CUDA C++ kernels have code for the current GPU.
        processors: how many logical ones this process may use: its affinity, and its cgroup's quota.
        cores: how many physical ones those are; None where the system does not say.
        threads: `torch.get_num_threads()`.
        openmp: files of the OpenMP runtimes in this process.
        allocator: "glibc", or the file of another allocator that is loaded; "" for another C library.
        environment: the environment variables.
    """

    native: NativeLibrary
    install: str
    libraries: dict[str, str]
    requirements: dict[str, tuple[Requirement, ...]]
    torch_cuda: str | None
    system_gpus: tuple[str, ...]
    torch_gpus: tuple[str, ...]
    triton_found: bool
    triton_refuses: str | None
    cuda_kernels_run: bool
    processors: int
    cores: int | None
    threads: int
    openmp: tuple[str, ...]
    allocator: str
    environment: dict[str, str]


def this_machine() -> Machine:
    """Gather the facts."""
    requirements = required()
    torch_gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    loaded = loaded_libraries()
    return Machine(
        native=native_library(),
        install=install_command(NATIVE_LIBRARY_PATH.parent.parent),
        libraries=installed([r.name for group in requirements.values() for r in group]),
        requirements=requirements,
        torch_cuda=torch.version.cuda,
        system_gpus=() if torch_gpus else nvidia_smi(),
        torch_gpus=torch_gpus,
        triton_found=importlib.util.find_spec("triton") is not None,
        triton_refuses=gpu.why_no_gpu(),
        cuda_kernels_run=bool(torch_gpus) and runs_cuda_kernels(),
        processors=usable_processors(),
        cores=physical_cores(),
        threads=torch.get_num_threads(),
        openmp=tuple(path for path in loaded if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name)),
        allocator=allocator(loaded),
        environment=dict(os.environ),
    )


def required(distribution: str = "peft_kernels") -> dict[str, tuple[Requirement, ...]]:
    """What each extra of this package asks for; nothing where it is not installed, so has no metadata."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(distribution) or ()]
    except importlib.metadata.PackageNotFoundError:
        return {}
    extras = {
        extra: tuple(r for r in requirements if r.marker and r.marker.evaluate({"extra": extra}))
        for extra in EXTRAS
    }
    return {extra: group for extra, group in extras.items() if group}


def installed(names: list[str]) -> dict[str, str]:
    """The versions of those distributions that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def install_command(root: Path) -> str:
    """How the package in folder `root` is built again: from its tree, or from where pip says that it came."""
    if (root / "setup.py").is_file():
        return "make build"
    try:
        origin = importlib.metadata.distribution("peft_kernels").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        origin = None
    record: dict[str, Any] = json.loads(origin) if origin else {"url": "peft_kernels"}
    source: str = record["url"]
    if "vcs_info" in record:  # the URL is the repository's, without what told pip so
        source = f"{record['vcs_info']['vcs']}+{source}@{record['vcs_info']['commit_id']}"
    elif source.startswith("file://"):
        source = unquote(source.removeprefix("file://"))
    return f"pip install -v --force-reinstall --no-deps --no-cache-dir {shlex.quote(source)}"


def nvidia_smi() -> tuple[str, ...]:
    """The GPUs that the driver's own tool lists, by name; none where there is no such tool."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", listed.stdout, re.MULTILINE))


def runs_cuda_kernels() -> bool:
    """Whether the library's CUDA C++ kernels take a product that every GPU they have code for can take."""
    if not native_library().cuda_architectures or gpu.why_no_gpu():
        return False
    product = triton_plan.Product(1, 4096, 4096, 64, torch.bfloat16)
    return regimes.cuda_method(product, backward=False) is not None


def usable_processors(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Logical processors that this process may use: by its affinity, and by its cgroup's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lines = own.read_text().splitlines() if own.is_file() else []
    quotas = [quota for line in lines for quota in _quotas(cgroups, line)]
    return max(1, min([allowed, *map(math.ceil, quotas)]))


def _quotas(cgroups: Path, line: str) -> list[float]:
    """Processors' worth of time that one line of /proc/self/cgroup, and what is above it, allows."""
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return []
    folder = cgroups / controllers / path.lstrip("/")
    quotas = []
    while folder != cgroups.parent:
        if (limit := folder / "cpu.max").is_file():  # version 2: "quota period"
            quota, period = limit.read_text().split()
            quotas += [] if quota == "max" else [int(quota) / int(period)]
        elif (limit := folder / "cpu.cfs_quota_us").is_file():  # version 1: -1 for no limit
            quota, period = limit.read_text(), (folder / "cpu.cfs_period_us").read_text()
            quotas += [] if int(quota) < 0 else [int(quota) / int(period)]
        folder = folder.parent
    return quotas


def physical_cores(system: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Physical cores behind the logical processors that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    files = [system / f"cpu{cpu}/topology/thread_siblings_list" for cpu in os.sched_getaffinity(0)]
    return len({file.read_text() for file in files}) if all(file.is_file() for file in files) else None


def loaded_libraries(maps: Path = Path("/proc/self/maps")) -> tuple[str, ...]:
    """The files of the shared libraries in this process, in order of address; none but on Linux."""
    lines = maps.read_text().splitlines() if maps.is_file() else []
    paths = (line.split(maxsplit=5)[5] for line in lines if ".so" in line)
    return tuple(dict.fromkeys(paths))


def allocator(loaded: tuple[str, ...]) -> str:
    """Who serves `malloc`: a library that is made for it, or glibc."""
    others = [path for path in loaded if re.match(r"lib(jemalloc|tcmalloc|mimalloc)", Path(path).name)]
    return others[0] if others else platform.libc_ver()[0]
