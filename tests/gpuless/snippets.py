"""Small PTX kernels for the emulator's own tests: one instruction over many operands, or a body of
statements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpuless.launch import Result, launch

THREADS = 128
_REGISTERS = """
  .reg .pred %p<20>;
  .reg .b16 %rs<40>;
  .reg .b32 %r<100>;
  .reg .b64 %rd<60>;
"""
_PREFIX = {1: "%r", 2: "%rs", 4: "%r", 8: "%rd"}


def module(
    body: str, parameters: int, *, threads: int = THREADS, declarations: str = "", target: str = "sm_90a"
) -> str:
    """An entry with pointers p0, p1, … in %rd50, %rd51, …, the thread in %r90, the CTA in %r91, 4·thread in
    %rd40.
    """
    names = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"  ld.param.u64 %rd{50 + i}, [p{i}];" for i in range(parameters))
    return f"""
.version 8.7
.target {target}
.address_size 64
{declarations}
.visible .entry snippet({names})
.reqntid {threads}
{{
{_REGISTERS}
{loads}
  mov.u32 %r90, %tid.x;
  mov.u32 %r91, %ctaid.x;
  mul.wide.u32 %rd40, %r90, 4;
{body}
  ret;
}}
"""


def run(
    body: str,
    arguments: Sequence[NDArray],
    *,
    grid: int = 1,
    threads: int = THREADS,
    declarations: str = "",
    shared: int = 0,
    strict: bool = True,
    counts: bool = False,
) -> Result:
    """Run a body of statements (see module) on arrays."""
    ptx = module(body, len(arguments), threads=threads, declarations=declarations)
    return launch(ptx, (grid,), arguments, shared=shared, strict=strict, counts=counts)


def evaluate(statement: str, inputs: Sequence[NDArray], result: type | np.dtype) -> NDArray:
    """Run `statement`, which computes {d} from {a}, {b}, {c}, {e}, for each element of the inputs."""
    count = len(inputs[0])
    padded = -(-count // THREADS) * THREADS
    arrays = [np.resize(x, padded) for x in inputs]
    out = np.zeros(padded, result)
    lines = [f"  mad.lo.u32 %r92, %r91, {THREADS}, %r90;", "  cvt.u64.u32 %rd41, %r92;"]
    names = {}
    for i, (letter, array) in enumerate(zip("abce", arrays, strict=False)):
        size = array.itemsize
        names[letter] = f"{_PREFIX[size]}{i + 1}"
        lines.append(f"  mad.lo.u64 %rd42, %rd41, {size}, %rd{50 + i};")
        lines.append(f"  ld.global.b{8 * size} {names[letter]}, [%rd42];")
    names["d"] = f"{_PREFIX[out.itemsize]}10"
    lines.append("  " + statement.format(**names, p="%p1"))
    lines.append(f"  mad.lo.u64 %rd42, %rd41, {out.itemsize}, %rd{50 + len(arrays)};")
    lines.append(f"  st.global.b{8 * out.itemsize} [%rd42], {names['d']};")
    run("\n".join(lines), [*arrays, out], grid=padded // THREADS)
    return out[:count]
