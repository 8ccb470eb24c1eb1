"""The structure that CONTRIBUTING.md promises: who may import whom, and what exists only once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("csrc", "python_bindings", "peft_kernels", "bench", "examples", "tests")
MAXIMUM_LINES = 400

SOURCES = sorted(
    path
    for folder in SOURCE_FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
)


def names_of(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_imports_flow_one_way() -> None:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as c; c()",
        "--no-cache",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("what", "pattern", "homes"),
    [
        ("NF4 table", r"0\.69619", ["csrc/common/nf4.h", "peft_kernels/ops/nf4/reference.py"]),
        (
            "Philox multiplier",
            r"(?i)0xD2511F53",
            ["bench/oracle.py", "csrc/common/philox.h", "peft_kernels/ops/dropout/reference.py"],
        ),
    ],
)
def test_a_constant_has_one_home_per_language(what: str, pattern: str, homes: list[str]) -> None:
    """One copy in C++, one in Python; independent oracles (bench/oracle.py, tests) are the exception."""
    shipped = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tests"]
    found = [path for path in shipped if re.search(pattern, path.read_text())]
    assert names_of(found) == homes, f"copies of the {what}"


def test_only_the_bindings_see_torch_and_no_cpp_sees_python() -> None:
    cpp = [path for path in SOURCES if path.suffix != ".py"]
    includes = {path: re.findall(r'#include\s*[<"]([^>"]+)', path.read_text()) for path in cpp}
    bindings = (
        ROOT / "python_bindings",
        ROOT / "tests" / "gpuless" / "toy",
    )  # the emulator's own, for its tests
    outside = [path for path in cpp if not any(path.is_relative_to(folder) for folder in bindings)]
    see_torch = [
        path
        for path in outside
        if any(name.startswith(("torch/", "ATen/", "c10/")) for name in includes[path])
    ]
    see_python = [
        path for path in cpp if any("Python.h" in name or "pybind11" in name for name in includes[path])
    ]
    assert cpp, "no C++ sources found"
    assert names_of(see_torch) == []
    assert names_of(see_python) == []


def test_every_file_can_be_read_in_one_sitting() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert names_of([path for path, lines in lengths.items() if lines > MAXIMUM_LINES]) == []
