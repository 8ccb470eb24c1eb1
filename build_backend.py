"""PEP 517 build backend: setuptools, plus a request for torch only where none is installed.

The native library is compiled against torch's headers. Naming torch in `build-system.requires` would make
every isolated build download a torch of its own (several GB for a CUDA one), and not the one the user has.
So `find_torch` looks for the torch of the environment that pip installs into, and torch is requested for the
build environment only when there is none. Run as a script, this file prints the folder of that torch
(CMakeLists.txt asks it).
"""

from __future__ import annotations

import importlib.machinery
import re
import site
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that this backend leaves as they are)

MINIMUM_TORCH = (2, 10)  # the first release with the stable C++ ABI that python_bindings/ is written against
REQUIREMENT = "torch>={}.{}".format(*MINIMUM_TORCH)

ConfigSettings = dict[str, str | list[str] | None] | None


def find_torch() -> Path | None:
    """Return the folder of the torch to build against, or None where there is none that is recent enough.

    pip's isolated build runs the target environment's interpreter with that environment's site-packages taken
    off `sys.path`; `site` still knows where they are. torch is looked up, not imported: what it depends on is
    hidden too, and only its headers and libraries are needed.
    """
    folders = [*sys.path, *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # not a virtual environment: `pip install --user` counts as well
        folders.append(site.getusersitepackages())
    spec = importlib.machinery.PathFinder.find_spec("torch", folders)
    if spec is None or spec.origin is None:
        return None
    torch = Path(spec.origin).parent
    return torch if _version(torch) >= MINIMUM_TORCH else None


def _version(torch: Path) -> tuple[int, int]:
    """Return (major, minor) as torch/version.py states it; (0, 0) for a folder that is no torch."""
    version_file = torch / "version.py"
    if not version_file.is_file():
        return 0, 0
    match = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _torch_requirement() -> list[str]:
    return [] if find_torch() else [REQUIREMENT]


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """Return what a wheel build needs besides `build-system.requires`."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    """Return what an editable build needs besides `build-system.requires`."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_requirement()]


if __name__ == "__main__":
    torch_folder = find_torch()
    if torch_folder is None:
        sys.exit(f"no {REQUIREMENT} was found for {sys.executable}: pip install '{REQUIREMENT}'")
    print(torch_folder)
