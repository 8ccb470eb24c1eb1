"""`python -m gpuless.cubins _native.so`: registers and stack of the CUDA C++ kernels in it, by architecture.

It fails where a kernel keeps anything in local memory: nothing spills, nothing has a stack.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from gpuless.cuda import demangled
from gpuless.sass import tool

Usage = dict[str, dict[str, tuple[int, int]]]  # kernel -> architecture -> registers, bytes of local memory


def usage(library: Path) -> Usage:
    """What cuobjdump says of the kernels for real architectures."""
    command = [tool("cuobjdump"), "-res-usage", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: Usage = {}
    pattern = r"^arch = (sm_\w+)$|^ Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    for arch, kernel, registers, stack, local in re.findall(pattern, text, re.MULTILINE):
        if arch:
            current = arch
        else:
            found.setdefault(kernel, {})[current] = (int(registers), int(stack) + int(local))
    return found


def table(found: Usage) -> str:
    """A row for each kernel."""
    archs = sorted({arch for row in found.values() for arch in row}, key=lambda a: int(re.sub(r"\D", "", a)))
    rows = [["registers of a thread", *archs]]
    for kernel in sorted(found, key=demangled):
        cells = (found[kernel].get(arch) for arch in archs)
        rows.append(
            [
                demangled(kernel),
                *("–" if c is None else f"{c[0]}{f' +{c[1]} B!' if c[1] else ''}" for c in cells),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(library: Path) -> int:
    """Print the table; 1 where a kernel has local memory."""
    found = usage(library)
    print(table(found))
    bad = [kernel for kernel, row in found.items() if any(local for _, local in row.values())]
    print(f"{len(found)} kernels, {len(bad)} with local memory; {library.stat().st_size / 2**20:.1f} MiB")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
