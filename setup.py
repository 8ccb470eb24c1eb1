"""Packages and native build. Metadata is in pyproject.toml; CMakeLists.txt describes the native library.

The library talks to torch's stable C++ ABI and never to Python, so a wheel serves every Python 3 and every
torch >= 2.10 of its platform. Where it cannot be built the package installs without it, says so, and runs on
the reference; PEFT_KERNELS_REQUIRE_NATIVE=1 makes that an error. CXX, CUDACXX and CMAKE_ARGS reach CMake.

Kernels in CUDA C++ are in the library where nvcc and a CUDA build of torch were found. Where nvcc then fails,
the library is built without them, and setup says so. PEFT_KERNELS_CUDA=1 builds them for any torch, and makes
it an error where that cannot be done; PEFT_KERNELS_CUDA=0 leaves them out. PEFT_KERNELS_CUDA_ARCHS says for
which GPUs, as CMAKE_CUDA_ARCHITECTURES does: "90a-real", for example.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "_native.so"
FAILURE_NOTE = "_native_build_failure.txt"  # shipped instead of the library, for `python -m peft_kernels`
CUDA_FAILURE_NOTE = "_native_cuda_failure.txt"  # shipped beside one that had to do without CUDA C++ kernels
REMEDY = (
    "Without it every operation runs on the slow reference implementation. Install a C++20 compiler "
    "(Debian: apt-get install g++) and install this package again. If it is nvcc that fails, "
    "PEFT_KERNELS_CUDA=0 builds the library without CUDA C++ kernels; Triton's then serve GPUs."
)
CUDA_REMEDY = (
    "The library is now built without them; Triton's kernels serve GPUs. To build them, install a CUDA "
    "toolkit and a host compiler that go together, and this package again."
)
CUDA = os.environ.get("PEFT_KERNELS_CUDA") or "AUTO"
REQUIRE_NATIVE = os.environ.get("PEFT_KERNELS_REQUIRE_NATIVE", "0") not in ("", "0") or CUDA not in (
    "0",
    "AUTO",
)
LOG = "build.log"
WITH_CUDA = "-- CUDA C++ kernels: nvcc"  # csrc/cuda/cuda.cmake says it


class NativeBuildError(RuntimeError):
    """The native library could not be built; the message holds the end of the log."""


class CleanBuild(build):
    """Build into an empty folder, so that a wheel never picks up a file that the sources no longer have."""

    def run(self) -> None:
        """Empty the folder, then build."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NativeBuild(build_ext):
    """Run CMake and ninja; put the library into the package, or beside it a note why there is none."""

    @property
    def package_folder(self) -> Path:
        """The folder that the library goes to: in the source tree if editable, else in the build folder."""
        return ROOT / "peft_kernels" if self.inplace else Path(self.build_lib).resolve() / "peft_kernels"

    def run(self) -> None:
        """Build in place (incremental) or into the build folder (from scratch)."""
        build_dir = ROOT / "build" / "native" if self.inplace else Path(self.build_temp).resolve() / "native"
        if not self.inplace:
            shutil.rmtree(build_dir, ignore_errors=True)
        for note in (FAILURE_NOTE, CUDA_FAILURE_NOTE):
            (self.package_folder / note).unlink(missing_ok=True)
        try:
            self.build(build_dir)
        except NativeBuildError as error:
            (self.package_folder / LIBRARY).unlink(missing_ok=True)
            self.report(error, "THE NATIVE LIBRARY OF peft_kernels WAS NOT BUILT", REMEDY, FAILURE_NOTE)
            if REQUIRE_NATIVE:
                sys.exit(1)

    def build(self, build_dir: Path) -> None:
        """Build the library; without CUDA C++ kernels if it has them by itself only, and fails with them."""
        try:
            build_native(build_dir, self.package_folder, CUDA)
        except NativeBuildError as error:
            if REQUIRE_NATIVE or CUDA != "AUTO" or WITH_CUDA not in (build_dir / LOG).read_text():
                raise
            headline = "THE CUDA C++ KERNELS OF peft_kernels WERE NOT BUILT"
            self.report(error, headline, CUDA_REMEDY, CUDA_FAILURE_NOTE)
            build_native(build_dir, self.package_folder, "0")

    def report(self, error: NativeBuildError, headline: str, remedy: str, note: str) -> None:
        """Say what failed, and leave a note in the package for `python -m peft_kernels`."""
        self.package_folder.mkdir(parents=True, exist_ok=True)
        (self.package_folder / note).write_text(f"{error}\n")
        frame = "!" * 100
        print(f"{frame}\n{headline}\n\n{error}\n{remedy}\n{frame}", flush=True)

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's place in the package: no Python ABI in its name."""
        return fullname.replace(".", "/") + ".so"


class StableAbiWheel(bdist_wheel):
    """Tag the wheel py3-none-<platform>, or py3-none-any where the library was not built."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return (python, abi, platform)."""
        library = self.get_finalized_command("build_ext").package_folder / LIBRARY
        return "py3", "none", super().get_tag()[2] if library.is_file() else "any"


def build_native(build_dir: Path, package: Path, cuda: str) -> None:
    """Configure and build CMakeLists.txt in `build_dir`, writing the library into the folder `package`."""
    build_dir.mkdir(parents=True, exist_ok=True)
    log = build_dir / LOG
    log.write_text("")
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    configure = [
        *(cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir)),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPEFT_KERNELS_OUTPUT_DIR={package}",
        f"-DPEFT_KERNELS_CUDA={cuda}",
        *cuda_architectures(),
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    for command in (configure, [cmake, "--build", str(build_dir)]):
        run_logged(command, log)


def cuda_architectures() -> list[str]:
    """Return the option that chooses GPUs: none for all of them."""
    chosen = os.environ.get("PEFT_KERNELS_CUDA_ARCHS")
    return [f"-DPEFT_KERNELS_CUDA_ARCHS={chosen}"] if chosen else ["-UPEFT_KERNELS_CUDA_ARCHS"]


def find_tool(name: str) -> str:
    """Return the path of a build tool: this Python's own (from PyPI) first, then PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise NativeBuildError(f"{name} was not found: pip install {name}")
    return path


def run_logged(command: list[str], log: Path) -> None:
    """Run `command`, showing its output and appending it to `log`; raise with the log's end if it fails."""
    lines = [f"+ {shlex.join(command)}\n"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    with log.open("a") as file:
        file.writelines(lines)
    if process.returncode:
        ending = f"\n\n{''.join(lines[-40:])}"
        raise NativeBuildError(f"{shlex.join(command)}\nexited with {process.returncode}. Log: {log}{ending}")


setup(
    packages=[
        *find_packages(include=["peft_kernels", "peft_kernels.*"]),
        *(f"peft_kernels.{name}" for name in find_packages(include=["bench", "bench.*"])),
    ],
    package_dir={"peft_kernels.bench": "bench"},
    ext_modules=[Extension("peft_kernels._native", sources=[], optional=not REQUIRE_NATIVE)],
    cmdclass={"build": CleanBuild, "build_ext": NativeBuild, "bdist_wheel": StableAbiWheel},
)
