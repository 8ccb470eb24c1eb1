"""Advice: each rule speaks where its fault is, and only there; the facts read of the machine are right."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from peft_kernels.core.library import CUDA_FAILURE_NOTE, NativeLibrary, native_library
from peft_kernels.diagnostics import Machine, advise, machine, this_machine
from peft_kernels.diagnostics.advice import RULES

ROOT = Path(__file__).resolve().parent.parent
SETS = ("portable", "avx2", "avx512")
LOADED = NativeLibrary(Path("/site/peft_kernels/_native.so"), True, None, "avx512", SETS)
FOR_H100 = dataclasses.replace(LOADED, cuda_architectures=("90a",))
MISSING = NativeLibrary(LOADED.path, False, "it could not be built", None, ())
REQUIREMENTS = {
    "peft": (Requirement("peft>=0.17"), Requirement("bitsandbytes>=0.48")),
    "adapters": (Requirement("adapters>=1.2"),),
    "triton": (Requirement("triton>=3.4"),),
}
LIBRARIES = {"peft": "0.21.2", "bitsandbytes": "0.50.2", "adapters": "1.3.0", "triton": "3.9.0"}

GOOD = Machine(
    native=LOADED,
    install="pip install peft_kernels",
    libraries=LIBRARIES,
    requirements=REQUIREMENTS,
    torch_cuda=None,
    system_gpus=(),
    torch_gpus=(),
    triton_found=True,
    triton_refuses="Triton finds none on this machine",
    cuda_kernels_run=False,
    processors=8,
    cores=8,
    threads=8,
    openmp=("/site/torch/lib/libgomp.so.1",),
    allocator="glibc",
    environment={"MALLOC_MMAP_MAX_": "0"},
)
GOOD_GPU = dataclasses.replace(
    GOOD,
    native=FOR_H100,
    torch_cuda="13.0",
    torch_gpus=("NVIDIA H100",),
    triton_refuses=None,
    cuda_kernels_run=True,
    environment={},
)


def without(name: str) -> dict[str, str]:
    return {library: version for library, version in LIBRARIES.items() if library != name}


FAULTS: list[tuple[str, Machine, dict[str, Any], str]] = [
    ("native-library-missing", GOOD, {"native": MISSING}, "it could not be built"),
    ("native-library-missing", GOOD, {"native": MISSING, "install": "make build"}, "`make build`"),
    (
        "capability-unknown",
        GOOD,
        {
            "native": dataclasses.replace(LOADED, capability=None),
            "environment": {**GOOD.environment, "PEFT_KERNELS_CPU_CAPABILITY": "sse"},
        },
        "PEFT_KERNELS_CPU_CAPABILITY=sse names no instruction set of this machine: portable, avx2, avx512",
    ),
    ("capability-capped", GOOD, {"native": dataclasses.replace(LOADED, capability="avx2")}, "3.0 times"),
    ("gpu-without-cuda-torch", GOOD, {"system_gpus": ("NVIDIA L4",)}, "NVIDIA L4"),
    ("gpu-out-of-reach", GOOD, {"system_gpus": ("NVIDIA L4",), "torch_cuda": "13.0"}, "the driver is older"),
    (
        "gpu-out-of-reach",
        GOOD,
        {
            "system_gpus": ("NVIDIA L4",),
            "torch_cuda": "13.0",
            "environment": {**GOOD.environment, "CUDA_VISIBLE_DEVICES": "0"},
        },
        "the driver is older",
    ),
    (
        "gpu-out-of-reach",
        GOOD,
        {
            "system_gpus": ("NVIDIA L4",),
            "torch_cuda": "13.0",
            "environment": {**GOOD.environment, "CUDA_VISIBLE_DEVICES": ""},
        },
        "`unset CUDA_VISIBLE_DEVICES`",
    ),
    (
        "triton-missing",
        GOOD_GPU,
        {
            "libraries": without("triton"),
            "triton_found": False,
            "triton_refuses": "Triton is not installed",
            "cuda_kernels_run": False,
        },
        "pip install 'triton>=3.4'",
    ),
    ("triton-missing", GOOD_GPU, {"libraries": {**LIBRARIES, "triton": "3.3.1"}}, "Triton is 3.3.1"),
    ("triton-interpreted", GOOD_GPU, {"environment": {"TRITON_INTERPRET": "1"}}, "`unset TRITON_INTERPRET`"),
    ("cuda-kernels-missing", GOOD_GPU, {"native": LOADED, "cuda_kernels_run": False}, "PEFT_KERNELS_CUDA=1"),
    ("cuda-kernels-missing", GOOD_GPU, {"cuda_kernels_run": False}, "built for sm_90a, and have no code for"),
    (
        "few-threads",
        GOOD,
        {"threads": 1, "environment": {**GOOD.environment, "OMP_NUM_THREADS": "1"}},
        "`export OMP_NUM_THREADS=8`",
    ),
    (
        "few-threads",
        GOOD,
        {"threads": 2, "cores": 4, "environment": {**GOOD.environment, "MKL_NUM_THREADS": "2"}},
        "`export MKL_NUM_THREADS=4`",
    ),
    ("too-many-threads", GOOD, {"processors": 2, "cores": None}, "`export OMP_NUM_THREADS=2`"),
    ("threads-share-cores", GOOD, {"cores": 4}, "`export OMP_NUM_THREADS=4`"),
    ("two-openmp-runtimes", GOOD, {"openmp": (*GOOD.openmp, "/opt/libiomp5.so")}, "/opt/libiomp5.so"),
    ("library-too-old", GOOD, {"libraries": {**LIBRARIES, "peft": "0.16.0"}}, "pip install 'peft>=0.17'"),
    ("library-missing", GOOD, {"libraries": without("adapters")}, "pip install 'adapters>=1.2'"),
    ("default-allocator", GOOD, {"environment": {}}, "fused layers do not"),
]


@pytest.mark.parametrize("good", [GOOD, GOOD_GPU], ids=["cpu", "gpu"])
def test_where_all_is_well_nothing_is_advised(good: Machine) -> None:
    assert advise(good) == []


@pytest.mark.parametrize(("name", "good", "fault", "says"), FAULTS)
def test_each_fault_is_noticed_and_nothing_else(
    name: str, good: Machine, fault: dict[str, Any], says: str
) -> None:
    (advice,) = advise(dataclasses.replace(good, **fault))
    assert advice.name == name
    assert says in " ".join((advice.what, advice.why, advice.remedy, advice.gain or ""))


def test_every_rule_has_a_fault_and_an_entry_in_the_docs() -> None:
    names = {name for name, *_ in FAULTS}
    assert names == {rule.__name__.replace("_", "-") for rule in RULES}
    documented = set(
        re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs/diagnostics.md").read_text(), re.MULTILINE)
    )
    assert documented == names


@pytest.mark.parametrize(
    ("good", "change"),
    [
        (GOOD, {"threads": 1}),  # by torch.set_num_threads: the user's own choice
        (GOOD, {"threads": 1, "cores": 1, "environment": {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}}),
        (GOOD, {"environment": {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"}}),
        (GOOD, {"environment": {}, "allocator": "/usr/lib/libjemalloc.so.2"}),
        (GOOD, {"environment": {}, "libraries": without("bitsandbytes"), "requirements": {}}),
        (GOOD, {"requirements": {}, "libraries": {}}),  # run from a tree that is not installed
        (GOOD, {"libraries": without("triton")}),  # no GPU to serve
        (GOOD, {"libraries": {**LIBRARIES, "peft": "0.22.0.dev0"}}),
        (GOOD, {"cores": None}),
        (GOOD_GPU, {"triton_refuses": "it has compute capability 7.5", "cuda_kernels_run": False}),
        (GOOD_GPU, {"libraries": without("triton")}),  # it goes by another name, pytorch-triton-rocm
        (GOOD_GPU, {"torch_cuda": None, "cuda_kernels_run": False, "native": LOADED}),  # AMD's
    ],
)
def test_what_is_no_fault_is_left_alone(good: Machine, change: dict[str, Any]) -> None:
    assert advise(dataclasses.replace(good, **change)) == []


def test_problems_come_first() -> None:
    worst = dataclasses.replace(
        GOOD, native=MISSING, threads=9, environment={}, libraries=without("adapters")
    )
    assert [advice.level for advice in advise(worst)] == ["problem", "slower", "hint", "hint"]


def test_a_build_of_the_cuda_kernels_that_failed_is_named(tmp_path: Path) -> None:
    native = dataclasses.replace(LOADED, path=tmp_path / "_native.so")
    (tmp_path / CUDA_FAILURE_NOTE).touch()
    (advice,) = advise(dataclasses.replace(GOOD_GPU, native=native, cuda_kernels_run=False))
    assert "nvcc failed" in advice.what


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0])
def test_commands_are_shell(fault: tuple[str, Machine, dict[str, Any], str]) -> None:
    _, good, change, _ = fault
    (advice,) = advise(dataclasses.replace(good, **change))
    commands = [c for c in re.findall(r"`(.+?)`", advice.remedy) if not c.startswith("torch.")]
    assert commands
    for command in commands:
        assert shlex.split(command)
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_following_the_advice_makes_it_go_away() -> None:
    """On this machine, for all that environment variables can do."""
    if native_library().capability in (None, "portable") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is nothing to cap on this machine")
    program = (
        "from peft_kernels import diagnostics as d; print(*(a.name for a in d.advise(d.this_machine())))"
    )
    caps = {"PEFT_KERNELS_CPU_CAPABILITY": "portable", "OMP_NUM_THREADS": "1"}
    clean = {name: value for name, value in os.environ.items() if name not in caps}

    def advised(**variables: str) -> set[str]:
        command, environment = [sys.executable, "-c", program], {**clean, **variables}
        return set(subprocess.check_output(command, env=environment, text=True).split())

    assert advised(**caps) >= {"capability-capped", "few-threads"}
    after = advised(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="17179869184")
    assert not after & {"capability-capped", "few-threads", "default-allocator"}


def test_this_machine_is_what_it_is() -> None:
    here = this_machine()
    assert here.native == native_library()
    assert here.install == "make build"
    assert here.threads == torch.get_num_threads()
    assert 1 <= here.processors <= (os.cpu_count() or 1)
    assert here.libraries["peft"]
    assert any("torch" in path for path in here.openmp)
    assert str(next(iter(here.requirements["peft"])).specifier).startswith(">=")


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        (None, "peft_kernels"),
        ({"url": "file:///home/me/a%20b", "dir_info": {}}, "'/home/me/a b'"),
        ({"url": "https://host/x.whl", "archive_info": {}}, "https://host/x.whl"),
        (
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}},
            "git+https://host/x.git@0123abc",
        ),
    ],
)
def test_it_is_installed_again_from_where_it_came(
    origin: dict[str, Any] | None, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "peft_kernels-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: peft_kernels\nVersion: 0.1.0\n")
    if origin:
        (metadata / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    command = f"pip install -v --force-reinstall --no-deps --no-cache-dir {source}"
    assert machine.install_command(tmp_path) == command
    (tmp_path / "setup.py").touch()
    assert machine.install_command(tmp_path) == "make build"


def cgroup(folder: Path, line: str, files: dict[str, str]) -> int:
    own = folder / "cgroup"
    own.write_text(line)
    for name, content in files.items():
        (folder / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "fs" / name).write_text(content)
    return machine.usable_processors(folder / "fs", own)


@pytest.mark.parametrize(
    ("line", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 64),
        (
            "4:memory:/x\n1:cpu:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            "1:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1"} | {"cpu,cpuacct/cpu.cfs_period_us": "1"},
            64,
        ),
        ("1:cpu:/gone\n", {}, 64),
    ],
)
def test_a_containers_share_of_processors_counts(
    line: str, files: dict[str, str], quota: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert cgroup(tmp_path, line, files) == quota


def test_cores_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4})
    assert machine.physical_cores(tmp_path) is None
    for cpu, siblings in ((0, "0,4"), (1, "1,5"), (4, "0,4")):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings)
    assert machine.physical_cores(tmp_path) == 2


def test_gpus_are_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_smi() == ()
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1-2)'\necho '  MIG 1g (UUID: x)'\n"
    )
    tool.chmod(0o755)
    assert machine.nvidia_smi() == ("NVIDIA H100 80GB HBM3",)
    tool.write_text(
        "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk to the driver.'\nexit 9\n"
    )
    assert machine.nvidia_smi() == ()


def test_loaded_libraries_are_told_apart(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 fe:01 12 {}\n"
    files = ("/a b/libgomp.so.1", "/a b/libgomp.so.1", "/usr/lib/libtcmalloc_minimal.so.4", "[heap]")
    maps.write_text("".join(line.format(" " * 10 + file) for file in files) + "7f02-7f03 rw-p 0 00:00 0\n")
    loaded = machine.loaded_libraries(maps)
    assert loaded == files[1:3]
    assert machine.allocator(loaded) == "/usr/lib/libtcmalloc_minimal.so.4"
    assert machine.allocator(loaded[:1]) == machine.allocator(()) == "glibc"
    assert machine.loaded_libraries(tmp_path / "none") == ()
