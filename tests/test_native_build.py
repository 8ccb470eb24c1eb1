"""How the native library is built: with CUDA C++ kernels or without, by which options; builds that fail."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools

from packages import ROOT, build_wheel, fake_torch, run_installed, tree_copy
from peft_kernels.core.library import BUILD_FAILURE_NOTE, CUDA_FAILURE_NOTE


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree_copy(tmp_path_factory.mktemp("checkout") / "peft_kernels")


def configure(folder: Path, **options: str) -> subprocess.CompletedProcess[str]:
    """CMake's first step, as setup.py does it."""
    chosen = [f"-D{name}={value}" for name, value in options.items()]
    python = f"-DPython_EXECUTABLE={sys.executable}"
    command = [
        shutil.which("cmake"),
        "-G",
        "Ninja",
        "-S",
        str(ROOT),
        "-B",
        str(folder / "build"),
        python,
        *chosen,
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder)}  # a torch of the test's comes first
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("sign", ["version", "library"])
def test_cuda_kernels_are_built_for_a_cuda_torch(nvcc: str, tmp_path: Path, sign: str) -> None:
    torch_folder = fake_torch(tmp_path, "2.12.0+cu130")
    if sign == "version":
        with (torch_folder / "version.py").open("a") as file:
            file.write("cuda: Optional[str] = '13.0'\n")
    else:
        (torch_folder / "lib").mkdir()
        (torch_folder / "lib" / "libtorch_cuda.so").touch()
    said = configure(tmp_path).stdout
    assert re.search(
        r"CUDA C\+\+ kernels: nvcc [\d.]+ for 80-real;86-real;89-real;90a-real.*;80-virtual", said
    )
    said = configure(tmp_path, PEFT_KERNELS_CUDA_ARCHS="90a-real,80-virtual").stdout
    assert re.search(r"CUDA C\+\+ kernels: nvcc [\d.]+ for 90a-real;80-virtual", said)
    assert "CUDA C++ kernels: none (PEFT_KERNELS_CUDA=0)" in configure(tmp_path, PEFT_KERNELS_CUDA="0").stdout


def test_cuda_kernels_are_left_out_for_a_torch_without(tmp_path: Path) -> None:
    with (fake_torch(tmp_path, "2.12.0+cpu") / "version.py").open("a") as file:
        file.write("cuda: Optional[str] = None\n")
    assert "CUDA C++ kernels: none (torch is a build without CUDA)" in configure(tmp_path).stdout


def test_required_cuda_kernels_that_cannot_be_built_are_an_error(checkout: Path, tmp_path: Path) -> None:
    """Even where the native library is not required."""
    result = build_wheel(checkout, tmp_path, PEFT_KERNELS_CUDA="1", CUDACXX="/bin/false")
    assert result.returncode != 0
    said = " ".join((result.stdout + result.stderr).split())  # CMake wraps its lines
    assert "PEFT_KERNELS_CUDA=1, but nvcc was not found; put it on PATH, or set CUDACXX" in said


def test_kernels_are_emulated_as_they_are_built() -> None:
    from gpuless.toolchain import CUDA_FLAGS

    flags = set(CUDA_FLAGS) - {"-O3", "-DNDEBUG", "-std=c++17"}  # CMake's own: Release, CUDA_STANDARD
    assert all(flag in (ROOT / "CMakeLists.txt").read_text() for flag in flags)


def test_without_a_compiler_it_installs_says_so_once_and_runs_on_the_reference(
    checkout: Path, tmp_path: Path
) -> None:
    result = build_wheel(checkout, tmp_path, CXX="/bin/false")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert not list(installed.rglob("*.so"))
    assert "/bin/false" in (installed / "peft_kernels" / "_native_build_failure.txt").read_text()

    program = """if True:
        import torch, warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import peft_kernels as pk
            weight = pk.functional.nf4_quantize(torch.ones(4, 64))
            y = pk.functional.nf4_linear(torch.ones(2, 64), weight)
        ours = [str(w.message) for w in caught if "peft_kernels" in str(w.message)]
        assert len(ours) == 1 and "WITHOUT its native kernels" in ours[0], ours
        assert torch.equal(y, torch.full((2, 4), 64.0)), y
        print(pk.__file__)
    """
    run_installed(program, installed, tmp_path)


def test_a_required_library_that_cannot_be_built_is_an_error(checkout: Path, tmp_path: Path) -> None:
    result = build_wheel(checkout, tmp_path, CXX="/bin/false", PEFT_KERNELS_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "THE NATIVE LIBRARY OF peft_kernels WAS NOT BUILT" in result.stdout + result.stderr


@pytest.fixture
def project_setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py as a module, as users run it: the native library is not required."""
    for name in ("PEFT_KERNELS_REQUIRE_NATIVE", "PEFT_KERNELS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: None)
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("cuda", "required", "built"),
    [("AUTO", False, ["AUTO", "0"]), ("AUTO", True, ["AUTO"]), ("1", True, ["1"]), ("0", False, ["0"])],
)
def test_where_nvcc_fails_the_library_is_built_without_it_and_says_so(
    cuda: str,
    required: bool,
    built: list[str],
    project_setup: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Unless the library is required: then a failure is a failure."""
    attempts = []

    def build_native(build_dir: Path, package: Path, cuda: str) -> None:
        attempts.append(cuda)
        build_dir.mkdir(parents=True, exist_ok=True)
        (build_dir / project_setup.LOG).write_text(
            "-- CUDA C++ kernels: nvcc 13.0.88 for 80-real\n" * (cuda != "0")
        )
        if cuda != "0":
            raise project_setup.NativeBuildError("nvcc fatal : unsupported host compiler")
        (package / "_native.so").touch()

    for name, value in (("build_native", build_native), ("CUDA", cuda), ("REQUIRE_NATIVE", required)):
        monkeypatch.setattr(project_setup, name, value)
    command = project_setup.NativeBuild(setuptools.Distribution())
    command.inplace, command.build_lib, command.build_temp = False, tmp_path / "lib", tmp_path / "temp"
    package = tmp_path / "lib" / "peft_kernels"
    package.mkdir(parents=True)
    if required:
        with pytest.raises(SystemExit):
            command.run()
    else:
        command.run()
    assert attempts == built
    assert (package / "_native.so").is_file() is (not required)
    said, note = capsys.readouterr().out, package / CUDA_FAILURE_NOTE
    assert note.is_file() is (len(built) == 2)
    assert ("THE CUDA C++ KERNELS OF peft_kernels WERE NOT BUILT" in said) is (len(built) == 2)
    if len(built) == 2:
        assert "unsupported host compiler" in note.read_text()
        assert "unsupported host compiler" in said


def test_a_library_that_fails_without_nvcc_is_not_tried_twice(
    project_setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def build_native(build_dir: Path, package: Path, cuda: str) -> None:
        attempts.append(cuda)
        build_dir.mkdir(parents=True)
        (build_dir / project_setup.LOG).write_text(
            "-- CUDA C++ kernels: none (torch is a build without CUDA)\n"
        )
        raise project_setup.NativeBuildError("g++: fatal error")

    monkeypatch.setattr(project_setup, "build_native", build_native)
    command = project_setup.NativeBuild(setuptools.Distribution())
    command.inplace, command.build_lib, command.build_temp = False, tmp_path / "lib", tmp_path / "temp"
    command.run()
    assert attempts == ["AUTO"]
    assert "g++: fatal error" in (tmp_path / "lib" / "peft_kernels" / BUILD_FAILURE_NOTE).read_text()


def test_make_builds_anew_for_other_options(tmp_path: Path) -> None:
    """What PEFT_KERNELS_CUDA* say is kept in a file that changes when they do, and only then."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    options = tmp_path / ".venv" / "options"
    options.parent.mkdir()
    (options.parent / "tools").touch()

    def written(**variables: str) -> bool:
        """Whether make writes the file anew."""
        os.utime(options, (1, 1))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", "--silent", "--old-file=.venv/tools", ".venv/options"]
        subprocess.run(command, cwd=tmp_path, env={**environment, **variables}, check=True)
        return options.stat().st_mtime > 1

    options.touch()
    assert written(PEFT_KERNELS_CUDA="0")
    assert not written(PEFT_KERNELS_CUDA="0")
    assert written(PEFT_KERNELS_CUDA="1")
    assert written(PEFT_KERNELS_CUDA="1", PEFT_KERNELS_CUDA_ARCHS="90a-real")
    assert not written(PEFT_KERNELS_CUDA="1", PEFT_KERNELS_CUDA_ARCHS="90a-real")
