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
    """No Python symbol (one binary for every Python), no libtorch_python, no path of the building machine."""
    dynamic = subprocess.check_output(["readelf", "--dynamic", "--wide", str(NATIVE_LIBRARY_PATH)], text=True)
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
    symbols = subprocess.check_output(
        ["nm", "--dynamic", "--undefined-only", str(NATIVE_LIBRARY_PATH)], text=True
    )
    assert not re.search(r"\b_?Py[A-Z_]\w+", symbols)
    assert str(ROOT).encode() not in NATIVE_LIBRARY_PATH.read_bytes()


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
        env={**os.environ, "PEFT_KERNELS_REQUIRE_NATIVE": "0", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    result = build_wheel(checkout, folder, PEFT_KERNELS_REQUIRE_NATIVE="1")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_serves_every_python(wheel: Path) -> None:
    assert re.fullmatch(rf"peft_kernels-{re.escape(__version__)}-py3-none-(?!any).+\.whl", wheel.name)


def test_a_wheel_holds_every_module_the_benchmarks_and_the_library(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if not name.startswith(f"peft_kernels-{__version__}")}
    package = ROOT / "peft_kernels"
    modules = {str(path.relative_to(ROOT)) for path in (*package.rglob("*.py"), *package.rglob("README.md"))}
    benchmarks = {f"peft_kernels/{path.relative_to(ROOT)}" for path in (ROOT / "bench").rglob("*.py")}
    assert modules | benchmarks | {"peft_kernels/_native.so", "peft_kernels/py.typed"} == shipped


def test_no_function_of_an_instruction_set_can_replace_a_portable_one(checkout: Path, wheel: Path) -> None:
    """A weak (inline) function compiled for AVX-512 may be the copy the linker keeps for everybody."""
    objects = list(checkout.glob("build/temp.*/native/**/isa/*.o"))
    assert {path.name.partition(".")[0] for path in objects} >= {"portable"}
    for path in objects:
        symbols = subprocess.check_output(["nm", "-C", "--defined-only", str(path)], text=True)
        assert "::kTable" in symbols
        assert re.findall(r" [WV] .*", symbols) == [], path.name


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
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(installed / "peft_kernels" / "__init__.py")


def test_a_required_library_that_cannot_be_built_is_an_error(checkout: Path, tmp_path: Path) -> None:
    result = build_wheel(checkout, tmp_path, CXX="/bin/false", PEFT_KERNELS_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "THE NATIVE LIBRARY OF peft_kernels WAS NOT BUILT" in result.stdout + result.stderr
