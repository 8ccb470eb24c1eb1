"""What is built and shipped: against which torch, the wheel's name and content, and a build that fails."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import build_backend
from peft_kernels import __version__
from peft_kernels.core.library import NATIVE_LIBRARY_PATH

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

needs_library = pytest.mark.skipif(
    not NATIVE_LIBRARY_PATH.is_file(), reason="the native library is not built"
)


def fake_torch(folder: Path, version: str) -> Path:
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    return package


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """`sys.path` as in pip's isolated build, without the target's packages; setuptools asks for nothing."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not (Path(folder) / "torch").is_dir()])
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(build_backend.build_meta, hook, lambda config_settings: [])
    return monkeypatch


def test_the_installed_torch_is_found_from_an_isolated_build(isolated: pytest.MonkeyPatch) -> None:
    installed = Path(torch.__file__).parent
    isolated.setattr(build_backend.site, "getsitepackages", lambda: [str(installed.parent)])
    assert build_backend.find_torch() == installed
    assert build_backend.get_requires_for_build_wheel() == []
    assert build_backend.get_requires_for_build_editable() == []


@pytest.mark.parametrize(
    ("version", "usable"), [(None, False), ("2.9.1", False), ("2.10.0+cu128", True), ("3.0.0a0", True)]
)
def test_a_torch_is_asked_for_only_where_none_can_be_used(
    version: str | None, usable: bool, isolated: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    isolated.setattr(build_backend.site, "getsitepackages", lambda: [str(tmp_path)])
    package = None if version is None else fake_torch(tmp_path, version)
    assert build_backend.find_torch() == (package if usable else None)
    expected = [] if usable else [build_backend.REQUIREMENT]
    assert build_backend.get_requires_for_build_wheel() == expected
    assert build_backend.get_requires_for_build_editable() == expected


def test_the_minimum_torch_is_the_same_everywhere() -> None:
    major, minor = build_backend.MINIMUM_TORCH
    assert build_backend.REQUIREMENT in PROJECT["dependencies"]
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" in (ROOT / "CMakeLists.txt").read_text()


def test_the_version_has_an_entry_in_the_changelog() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_is_pinned() -> None:
    pins = {
        line.partition("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if re.match(r"[\w.-]+==\S+$", line)
    }
    extras = PROJECT["optional-dependencies"].values()
    requirements = itertools.chain(PROJECT["dependencies"], *extras)
    names = {Requirement(text).name.lower() for text in requirements} - {PROJECT["name"]}
    assert names <= pins


@needs_library
def test_the_library_depends_on_torch_and_the_c_library_alone() -> None:
    check_dependencies(NATIVE_LIBRARY_PATH, ROOT)


def check_dependencies(library: Path, built_in: Path) -> None:
    """No Python symbol (one binary for every Python), no libtorch_python, no path of the building machine.

    Nor of CUDA: its runtime is inside, where nobody else finds it. What only a CUDA torch has is weak.
    """
    dynamic = subprocess.check_output(["readelf", "--dynamic", "--wide", str(library)], text=True)
    needed = {name.partition(".so")[0] for name in re.findall(r"NEEDED.*\[(.+)\]", dynamic)}
    assert {"libtorch", "libtorch_cpu"} <= needed
    assert needed <= {
        "libtorch",
        "libtorch_cpu",
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    symbols = subprocess.check_output(["nm", "--dynamic", "--undefined-only", str(library)], text=True)
    assert not re.search(r"\b_?Py[A-Z_]\w+", symbols)
    assert not re.search(r" U (?!aoti_torch_device_type_)\w*cuda", symbols)
    exported = subprocess.check_output(["nm", "--dynamic", "--defined-only", str(library)], text=True)
    ours = re.findall(r" [TDBR] (?!_edata|_end|__bss_start)(\w+)", exported)
    assert ours
    assert all(name.startswith("peft_kernels_") for name in ours), ours
    assert str(built_in).encode() not in library.read_bytes()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from, so that the build leaves the real one alone."""
    copy = tmp_path_factory.mktemp("checkout") / "peft_kernels"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


def build_wheel(checkout: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    return subprocess.run(
        [*command, str(folder), str(checkout)],
        env={**os.environ, "PEFT_KERNELS_REQUIRE_NATIVE": "0", "PEFT_KERNELS_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With CUDA C++ kernels where there is nvcc: as PTX alone, which takes seconds."""
    folder = tmp_path_factory.mktemp("wheel")
    cuda = {"PEFT_KERNELS_CUDA": "1", "PEFT_KERNELS_CUDA_ARCHS": "80-virtual"} if shutil.which("nvcc") else {}
    result = build_wheel(checkout, folder, PEFT_KERNELS_REQUIRE_NATIVE="1", **cuda)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_a_wheel_serves_every_python(wheel: Path) -> None:
    assert re.fullmatch(rf"peft_kernels-{re.escape(__version__)}-py3-none-(?!any).+\.whl", wheel.name)


def test_a_wheel_holds_every_module_the_benchmarks_and_the_library(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if not name.startswith(f"peft_kernels-{__version__}")}
    package = ROOT / "peft_kernels"
    modules = {str(path.relative_to(ROOT)) for path in (*package.rglob("*.py"), *package.rglob("README.md"))}
    benchmarks = {
        f"peft_kernels/{path.relative_to(ROOT)}"
        for path in (ROOT / "bench").rglob("*.*")
        if path.suffix in (".py", ".css", ".j2")
    }
    assert modules | benchmarks | {"peft_kernels/_native.so", "peft_kernels/py.typed"} == shipped


def test_no_function_of_an_instruction_set_can_replace_a_portable_one(checkout: Path, wheel: Path) -> None:
    """A weak (inline) function compiled for AVX-512 may be the copy the linker keeps for everybody."""
    objects = list(checkout.glob("build/temp.*/native/**/isa/*.o"))
    assert {path.name.partition(".")[0] for path in objects} >= {"portable"}
    for path in objects:
        symbols = subprocess.check_output(["nm", "-C", "--defined-only", str(path)], text=True)
        assert "::kTable" in symbols
        assert re.findall(r" [WV] .*", symbols) == [], path.name


def run_installed(program: str, installed: Path, folder: Path) -> None:
    """Run a program that prints `pk.__file__`, with the package that lies in `installed`."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(installed / "peft_kernels" / "__init__.py")


def test_the_library_with_cuda_kernels_serves_a_torch_without(
    nvcc: str, checkout: Path, installed: Path, tmp_path: Path
) -> None:
    """It loads, has its schemas and kernels, and runs its CPU part."""
    check_dependencies(installed / "peft_kernels" / "_native.so", checkout)
    program = """if True:
        import pytest, torch
        import peft_kernels as pk
        from peft_kernels.core.backend import backend_of, has_cuda_kernels
        from peft_kernels.core.library import native_library
        assert native_library().loaded, native_library()
        assert native_library().cuda_architectures == ("80",), native_library()
        assert has_cuda_kernels()
        weight = pk.functional.nf4_quantize(torch.ones(4, 64))
        y = pk.functional.nf4_linear(torch.ones(2, 64), weight)
        assert torch.equal(y, torch.full((2, 4), 64.0)), y
        assert backend_of("adapted_linear", "cpu").startswith("cpu (C++")
        op = torch.ops.peft_kernels.nf4_quantize
        assert str(op.cuda._schema).replace(".cuda", "") == str(op.default._schema)
        assert not torch.cuda.is_available()
        with pytest.raises(RuntimeError, match="weight must be on a GPU"):
            op.cuda(torch.ones(4, 64), 64)
        print(pk.__file__)
    """
    run_installed(program, installed, tmp_path)


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
