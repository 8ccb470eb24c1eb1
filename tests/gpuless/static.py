"""What a compiled kernel needs of a GPU, known without one: registers, spills, shared memory, occupancy.

Everything here is exact: counts of the code that the GPU's own assembler made. How fast it is, is not said.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from gpuless import sass
from gpuless.driver import Launch, device, target_of
from gpuless.occupancy import COMPUTE_UNITS, MULTIPROCESSORS, Occupancy, amd_occupancy, occupancy

TARGETS: tuple[int | str, ...] = (*MULTIPROCESSORS, *COMPUTE_UNITS)
# What a launch asks of the compiler and its target does not decide.
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")
_NVIDIA_OPTIONS = (*_OPTIONS, "maxnreg")
_SYSTEM_SHARED = 1024  # of sm_90 and later: cuobjdump adds it to what a kernel has, unless that is nothing


@dataclass(frozen=True)
class Budget:
    """What one CTA of a kernel takes.

    Attributes:
        name: of the kernel.
        target: "sm_90", "gfx942".
        threads: of a CTA.
        registers: of a thread; on AMD vector registers, accumulation registers among them.
        scalar_registers: of a wave; None on NVIDIA, whose uniform registers cost nothing.
        spill_bytes: that a thread stores and loads for want of registers, each place in the code counted
            once; None for a cubin, which does not tell a spill from another use of local memory.
        stack_bytes: local memory of a thread.
        local_instructions: loads from and stores to local memory, in the whole kernel.
        shared_bytes: shared memory (LDS), static and dynamic.
        occupancy: CTAs of a multiprocessor.
        loop: what a warp issues in a turn of the hot loop.
    """

    name: str
    target: str
    threads: int
    registers: int
    scalar_registers: int | None
    spill_bytes: int | None
    stack_bytes: int
    local_instructions: int
    shared_bytes: int
    occupancy: Occupancy
    loop: sass.Mix

    @property
    def in_registers(self) -> bool:
        """Whether nothing is kept in local memory: no spill, no stack."""
        return not (self.spill_bytes or self.stack_bytes or self.local_instructions)


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a target: PTX or AMD assembly, and Triton's facts about it."""

    target: int | str
    code: str
    metadata: Any


def compiled_for(launch: Launch, target: int | str) -> Compiled:
    """What was launched, compiled for another target: same function, same specialisation, same options.

    Args:
        launch: a launch on an emulated device.
        target: 90 for sm_90, or the name of an AMD GPU: one of `TARGETS`.

    Raises:
        ValueError: the target is not known.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(map(str, TARGETS))}, got {target}")
    if target == launch.arch:
        return Compiled(target, launch.ptx, launch.metadata)
    names = _NVIDIA_OPTIONS if isinstance(target, int) else _OPTIONS
    options = {name: getattr(launch.metadata, name) for name in names}
    with device(target, execute=False):
        kernel = triton.compile(launch.source, target=target_of(target), options=options)
    return Compiled(target, kernel.kernel.decode(), kernel.metadata)


def budget(launch: Launch, target: int | str | None = None) -> Budget:
    """Budget of a launch, on the architecture it was made for or compiled for another target."""
    compiled = compiled_for(launch, launch.arch if target is None else target)
    metadata = compiled.metadata
    needs = {"threads": metadata.num_warps * metadata.warp_size, "dynamic_shared": metadata.shared}
    if isinstance(compiled.target, str):
        return amdgcn_budget(compiled.code, compiled.target, **needs)
    flags = () if metadata.enable_fp_fusion else ("--fmad=false",)
    return ptx_budget(compiled.code, compiled.target, **needs, flags=flags)


def ptx_budget(
    ptx: str,
    arch: int,
    *,
    threads: int,
    dynamic_shared: int = 0,
    kernel: str | None = None,
    flags: Sequence[str] = (),
) -> Budget:
    """Budget of a kernel in PTX, assembled by the ptxas that Triton uses for `arch`, with Triton's flags.

    Args:
        ptx: the code.
        arch: 90 for sm_90.
        threads: of a CTA; the number in the code's `.reqntid`, where it has one, goes before.
        dynamic_shared: bytes that the launch asks for.
        kernel: its name, where the code has several.
        flags: further ones for ptxas.
    """
    if match := re.search(r"\.reqntid (\d+)(?:, (\d+))?(?:, (\d+))?", ptx):
        threads = 1
        for dimension in match.groups(default="1"):
            threads *= int(dimension)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        target = sm_arch_from_capability(arch)
        options = ["-v", "--regAllocOptLevel=2", f"--gpu-name={target}", *flags]
        command = [get_ptxas(arch).path, *options, str(source), "-o", str(cubin)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"ptxas must take the code for {target}, but said: {run.stderr or run.stdout}")
        found = cubin_budget(
            cubin.read_bytes(), arch, threads=threads, dynamic_shared=dynamic_shared, kernel=kernel
        )
    spills = re.search(
        rf"Function properties for {re.escape(found.name)}\s+\d+ bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads",
        run.stderr + run.stdout,
    )
    assert spills is not None, run.stderr
    return replace(found, spill_bytes=int(spills[1]) + int(spills[2]))


def cubin_budget(
    cubin: bytes, arch: int, *, threads: int, dynamic_shared: int = 0, kernel: str | None = None
) -> Budget:
    """Budget of a kernel in a cubin; arguments as for `ptx_budget`.

    Raises:
        ValueError: the cubin has several kernels and none is named, or not the one that is named.
    """
    functions = sass.disassemble(cubin)
    names = [name for name in functions if kernel in (None, name)]
    if len(names) != 1:
        raise ValueError(f"kernel must name one of {', '.join(functions)}, got {kernel}")
    (name,) = names
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [sass.tool("cuobjdump"), "-res-usage", file.name]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
    usage = re.search(
        rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", run.stdout + run.stderr
    )
    assert usage is not None, run.stdout
    registers, stack, shared = map(int, usage.groups())
    shared = dynamic_shared + (max(shared - _SYSTEM_SHARED, 0) if arch >= 90 else shared)
    code = functions[name]
    return Budget(
        name=name,
        target=f"sm_{arch}",
        threads=threads,
        registers=registers,
        scalar_registers=None,
        spill_bytes=None,
        stack_bytes=stack,
        local_instructions=sum(each.opcode.startswith(("LDL", "STL")) for each in code),
        shared_bytes=shared,
        occupancy=occupancy(arch, registers=registers, threads=threads, shared=shared),
        loop=sass.mix(code),
    )


def amdgcn_budget(assembly: str, arch: str, *, threads: int, dynamic_shared: int = 0) -> Budget:
    """Budget of the kernel in AMD assembly: its metadata, and LLVM's figure of waves that registers allow.

    Args:
        assembly: of one kernel.
        arch: such as "gfx942".
        threads: of a workgroup.
        dynamic_shared: bytes of LDS that the launch asks for.
    """
    facts = dict(re.findall(r"^\s+\.(\w+):\s+(\S+)$", assembly, re.MULTILINE))
    waves = re.search(r"^; Occupancy: (\d+)", assembly, re.MULTILINE)
    vector_registers = re.search(r"^; TotalNumVgprs: (\d+)", assembly, re.MULTILINE)
    assert waves is not None, assembly[-2000:]
    registers = int(vector_registers[1]) if vector_registers else int(facts["vgpr_count"])
    shared = int(facts["group_segment_fixed_size"]) + dynamic_shared
    code = sass.parse_amdgcn(assembly)
    fits = amd_occupancy(
        arch, waves=int(waves[1]), threads=threads, wave_size=int(facts["wavefront_size"]), shared=shared
    )
    return Budget(
        name=facts["name"],
        target=arch,
        threads=threads,
        registers=registers,
        scalar_registers=int(facts["sgpr_count"]),
        spill_bytes=4 * int(facts["vgpr_spill_count"]),  # scalar registers go to lanes of vector registers
        stack_bytes=int(facts["private_segment_fixed_size"]),
        local_instructions=sum(each.opcode.startswith("scratch_") for each in code),
        shared_bytes=shared,
        occupancy=fits,
        loop=sass.mix(code),
    )
