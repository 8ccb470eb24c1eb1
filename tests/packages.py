"""Building the package, and running what was built: for test_packaging.py and test_native_build.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tree_copy(folder: Path) -> Path:
    """A copy of the sources in `folder`, so that a build leaves the real tree alone."""
    ignore = shutil.ignore_patterns(
        *(".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    )
    return shutil.copytree(ROOT, folder, ignore=ignore)


def fake_torch(folder: Path, version: str) -> Path:
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    return package


def build_wheel(checkout: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    return subprocess.run(
        [*command, str(folder), str(checkout)],
        env={**os.environ, "PEFT_KERNELS_REQUIRE_NATIVE": "0", "PEFT_KERNELS_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


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
