"""The native library: loaded where it is there, and a loud, working fallback where it is not."""

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import peft_kernels as pk
from peft_kernels.core.library import (
    BUILD_FAILURE_NOTE,
    NATIVE_LIBRARY_PATH,
    load_native_library,
    native_library,
)

PACKAGE = Path(pk.__file__).parent
IMPORT_AND_RUN = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_kernels as pk
    import peft_kernels.nn, peft_kernels.surgery
    from peft_kernels.core.library import BUILD_FAILURE_NOTE, native_library
    native_library()
import torch
w = pk.functional.nf4_quantize(torch.randn(16, 64), double_quant=True)
y = pk.functional.nf4_linear(torch.randn(2, 64), w)
ours = [w for w in caught if "peft_kernels" in str(w.message)]
print(native_library().loaded, tuple(y.shape), len(ours), ours[0].category.__name__, ours[0].message)
"""


def test_record_is_frozen_and_cached() -> None:
    record = native_library()
    assert record is native_library()
    assert record.path == NATIVE_LIBRARY_PATH
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.loaded = False  # type: ignore[misc]


@pytest.mark.skipif(not native_library().loaded, reason="native library not loaded")
def test_loaded_record_names_the_instruction_sets() -> None:
    record = native_library()
    assert record.reason is None
    assert record.capability in record.capabilities_found


def test_missing_library_is_reported_with_a_remedy(tmp_path: Path) -> None:
    with pytest.warns(
        RuntimeWarning, match=r"WITHOUT its native kernels.*_native.so does not exist.*make build"
    ):
        record = load_native_library(tmp_path / "_native.so")
    assert not record.loaded
    assert record.reason == f"{tmp_path / '_native.so'} does not exist"
    assert (record.capability, record.capabilities_found) == (None, ())


def test_failed_build_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / BUILD_FAILURE_NOTE).write_text("g++: fatal error\n")
    with pytest.warns(RuntimeWarning, match="could not be built; `python -m peft_kernels` shows the errors"):
        assert not load_native_library(tmp_path / "_native.so").loaded


def test_broken_library_is_reported_with_the_loaders_words(tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="does not load .*(file too short|invalid ELF header)"):
        assert not load_native_library(broken).loaded


@pytest.mark.slow
@pytest.mark.parametrize("contents", [None, b"not a library"], ids=["missing", "broken"])
def test_package_imports_warns_once_and_works_without_it(tmp_path: Path, contents: bytes | None) -> None:
    copy = tmp_path / "peft_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if contents is not None:
        (copy / "_native.so").write_bytes(contents)
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_RUN],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False (2, 16) 1 RuntimeWarning peft_kernels runs WITHOUT"), result.stdout


@pytest.mark.skipif(not native_library().loaded, reason="native library not loaded")
def test_loading_a_good_library_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_native_library(NATIVE_LIBRARY_PATH).loaded
