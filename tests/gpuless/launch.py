"""Run a compiled kernel on CPU tensors: `launch`.

A kernel's memory is the host's: pointers are the tensors' own addresses, so that alignment, views and
pointers kept in memory mean what they do on a device. Nothing outside the tensors that were given exists.
"""

from __future__ import annotations

import functools
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuless.machine import Machine
from gpuless.memory_global import Argument, GlobalMemory, Segment
from gpuless.parameters import SLOT, slot
from gpuless.parser import parse
from gpuless.program import Program
from gpuless.provenance import ANYWHERE, reachable, written
from gpuless.report import Finding, Report
from gpuless.statistics import Access

LANES = 8192  # threads that run together: enough to hide numpy's overhead, few enough for the cache
_MACHINES = 6
_machines: OrderedDict[tuple, Machine] = OrderedDict()


@dataclass
class Result:
    """What a launch did.

    Attributes:
        findings: faults; empty unless the launch was not strict.
        instructions: executions by a warp, by opcode (counts=True).
        accesses: one entry per memory instruction (counts=True).
        bytes_read, bytes_written: distinct bytes of each argument that were touched: what must move at least
        (counts=True).
    """

    findings: list[Finding]
    instructions: dict[str, int] = field(default_factory=dict)
    accesses: list[Access] = field(default_factory=list)
    bytes_read: dict[str, int] = field(default_factory=dict)
    bytes_written: dict[str, int] = field(default_factory=dict)


def launch(
    ptx: str,
    grid: Sequence[int],
    arguments: Sequence[Any],
    *,
    block: Sequence[int] | int | None = None,
    shared: int = 0,
    name: str | None = None,
    argument_names: Sequence[str] | None = None,
    extra_memory: Sequence[Any] = (),
    memory: Sequence[Any] | Mapping[str, Any] = (),
    strict: bool = True,
    counts: bool = False,
) -> Result:
    """Run one entry of a PTX module.

    Args:
        ptx: its text.
        grid: CTAs in x, y, z; missing ones are 1.
        arguments: CPU tensors or numpy arrays (passed as pointers), None (a null pointer), integers, floats,
            or bytes (anything, such as a struct; as many as the parameter has). Parameters beyond them are
            zero: Triton adds two pointers for scratch memory.
        block: threads in x, y, z; by default what the kernel requires (.reqntid).
        shared: bytes of dynamic shared memory.
        name: of the entry, or a part of it that only one entry has.
        argument_names: for messages and counts; by default the parameters' names in the PTX.
        extra_memory: tensors that the kernel reaches through pointers stored in memory.
        memory: tensors whose pointers are in arguments that are bytes, by name if names are to be shown: an
            aligned 8-byte slot with the address of one is an argument of its own. Others are left out.
        strict: raise Report for any finding; otherwise they are in the result.
        counts: count instructions, transactions and bytes (slower).

    Returns:
        What was counted and found.

    Raises:
        Report: the kernel did something undefined.
        Unsupported: it has an instruction that is not emulated.
    """
    program = parse(ptx, name)
    grid = (*map(int, grid), 1, 1)[:3]
    threads = _block(program, block)
    if not all(grid):
        return Result([])
    reach, writes = _analysis(program)
    parameters, segments = _pack(program, writes, arguments, argument_names, extra_memory, memory)
    reachable_memory = GlobalMemory(program, segments, reach, counts)
    total = grid[0] * grid[1] * grid[2]
    per_cta = -(-threads[0] * threads[1] * threads[2] // 32) * 32
    machine = _machine(program, threads, min(total, max(1, LANES // per_cta)), shared, counts)
    machine.findings, machine.seen = [], set()
    if machine.counts:
        machine.counts.reset()
    with np.errstate(all="ignore"):
        for first in range(0, total, machine.ctas):
            machine.run(grid, first, min(machine.ctas, total - first), parameters, reachable_memory)
            if machine.findings:
                break
    if machine.findings and strict:
        raise Report(program.name, machine.findings)
    return _result(machine, reachable_memory)


def _block(program: Program, block: Sequence[int] | int | None) -> tuple[int, int, int]:
    if block is None:
        if program.threads is None:
            raise ValueError(f"block must be given: {program.name} does not say how many threads it needs")
        return program.threads
    threads = (*((block,) if isinstance(block, int) else block), 1, 1)[:3]
    count = threads[0] * threads[1] * threads[2]
    if program.threads not in (None, threads) or not 0 < count <= (program.max_threads or 1024):
        limit = program.threads or f"at most {program.max_threads or 1024} threads"
        raise ValueError(f"block must be {limit} for {program.name}, got {threads}")
    return threads


def _machine(program: Program, block: tuple, ctas: int, shared: int, counts: bool) -> Machine:
    key = (id(program), block, ctas, shared, counts)
    if key in _machines and _machines[key].program is program:
        _machines.move_to_end(key)
    else:
        _machines[key] = Machine(program, block, ctas, shared, counts)
        while len(_machines) > _MACHINES:
            _machines.popitem(last=False)
    return _machines[key]


def _pack(
    program: Program,
    writes: frozenset[str],
    arguments: Sequence[Any],
    names: Sequence[str] | None,
    extra: Sequence[Any],
    memory: Sequence[Any] | Mapping[str, Any],
) -> tuple[dict[str, bytes], list[Segment]]:
    """Parameters as bytes, memory as segments."""
    if len(arguments) > len(program.parameters):
        raise ValueError(f"{program.name} takes {len(program.parameters)} arguments, got {len(arguments)}")
    parameters = {parameter: bytes(size) for parameter, size in program.parameters.items()}
    blocks: list[tuple[_Block, bool]] = []
    for i, (parameter, value) in enumerate(zip(program.parameters, arguments, strict=False)):
        size = program.parameters[parameter]
        shown = names[i] if names else parameter.removeprefix(f"{program.name}_")
        if hasattr(value, "untyped_storage") or isinstance(value, np.ndarray):
            block = _Block.of(shown, parameter, value)
            parameters[parameter] = struct.pack("<Q", block.address)
            blocks.append((block, parameter in writes))
        elif isinstance(value, bytes):
            if len(value) != size:
                raise ValueError(f"{shown} must have {size} bytes, got {len(value)}")
            parameters[parameter] = value
            blocks += _pointed_to(program, parameter, shown, value, memory, writes)
        elif isinstance(value, (float, np.floating)) or (value and parameter in program.float_parameters):
            parameters[parameter] = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], float(value))
        else:
            parameters[parameter] = (int(value or 0) & (1 << 8 * size) - 1).to_bytes(size, "little")
    blocks += [(_Block.of(f"extra_memory[{i}]", ANYWHERE, tensor), True) for i, tensor in enumerate(extra)]
    for name, room in program.variables.items():
        values = np.frombuffer(program.symbols[name].values, np.uint8)
        room[: len(values)] = values
        room[len(values) :] = 0
        blocks.append((_Block.of(name, name, room), name in writes))
    return parameters, _segments([(b, w) for b, w in blocks if b.bytes])


def _pointed_to(
    program: Program,
    parameter: str,
    shown: str,
    value: bytes,
    memory: Sequence[Any] | Mapping[str, Any],
    writes: frozenset[str],
) -> list[tuple[_Block, bool]]:
    """The tensors of `memory` whose addresses are in the slots of a parameter."""
    named = memory.items() if isinstance(memory, Mapping) else ((None, tensor) for tensor in memory)
    blocks = [_Block.of(name or "", "", tensor) for name, tensor in named]
    found = []
    for offset in range(0, len(value) - SLOT + 1, SLOT):
        address = int.from_bytes(value[offset : offset + SLOT], "little")
        place = slot(program, parameter, offset)
        for block in blocks:
            if block.address == address and block.bytes:
                name = block.name or (shown if place == parameter else f"{shown}+{offset}")
                found.append((replace(block, name=name, parameter=place), place in writes))
    return found


@functools.lru_cache(maxsize=256)
def _analysis(program: Program) -> tuple[dict[int, frozenset[str]], frozenset[str]]:
    reach = reachable(program)
    return reach, written(program, reach)


@dataclass
class _Block:
    """The bytes between the first and the last element of a tensor, and those that belong to its elements."""

    name: str
    parameter: str
    address: int
    bytes: int
    storage: NDArray[np.uint8]
    storage_address: int
    elements: NDArray[np.bool_] | None

    @classmethod
    def of(cls, name: str, parameter: str, value: Any) -> _Block:
        """For a torch tensor or numpy array, of any strides."""
        if isinstance(value, np.ndarray):
            item, shape = value.itemsize, value.shape
            strides = [s // item if item else 0 for s in value.strides]
            address = value.ctypes.data
            storage = None
        else:
            import torch

            if value.device.type != "cpu":
                raise ValueError(f"{name} must be a CPU tensor, got {value.device}")
            item, shape, strides, address = (
                value.element_size(),
                value.shape,
                value.stride(),
                value.data_ptr(),
            )
            whole = value.detach().untyped_storage()
            storage = torch.empty(0, dtype=torch.uint8).set_(whole).numpy()
        if 0 in shape:
            return cls(name, parameter, address, 0, np.empty(0, np.uint8), address, None)
        if any(s < 0 for s in strides):
            raise ValueError(f"{name} must have strides >= 0, got {tuple(strides)}: pass a copy")
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        size = (last + 1) * item
        if storage is None:
            whole = np.lib.stride_tricks.as_strided(value, (last + 1,), (item,))
            storage, start = whole.view(np.uint8), address
        else:
            start = whole.data_ptr()
        elements = None
        if np.prod([n for n, s in zip(shape, strides, strict=True) if s]) < last + 1:
            elements = np.zeros((last + 1, item), np.bool_)
            np.lib.stride_tricks.as_strided(
                elements, (*shape, item), (*(s * item for s in strides), 1)
            )[...] = True  # fmt: skip
            elements = elements.ravel()
        return cls(name, parameter, address, size, storage, start, elements)


def _segments(blocks: list[tuple[_Block, bool]]) -> list[Segment]:
    """Blocks of one storage make one segment; it may be written if any of its blocks may."""
    by_storage: dict[int, list[tuple[_Block, bool]]] = {}
    for block, may_be_written in sorted(blocks, key=lambda item: item[0].storage_address):
        previous = by_storage.get(next(reversed(by_storage), -1))
        if previous and block.storage_address < previous[0][0].storage_address + len(previous[0][0].storage):
            previous.append(
                (block, may_be_written)
            )  # numpy views have a storage each: they overlap the one before
        else:
            by_storage.setdefault(block.storage_address, []).append((block, may_be_written))
    segments = []
    for group in by_storage.values():
        start = min(b.address for b, _ in group)
        end = max(b.address + b.bytes for b, _ in group)
        home = max((b for b, _ in group), key=lambda b: len(b.storage))
        base = max(home.storage_address, start & ~31)  # aligned, so that wide accesses can be views
        data = home.storage[base - home.storage_address : end - home.storage_address]
        arguments = [Argument(b.name, b.parameter, b.address - base, b.bytes, b.elements) for b, _ in group]
        segments.append(Segment(base, data, arguments, any(w for _, w in group)))
    return segments


def _result(machine: Machine, memory: GlobalMemory) -> Result:
    result = Result(machine.findings)
    if machine.counts:
        result.instructions = machine.counts.warp_instructions()
        result.accesses = sorted(machine.counts.accesses.values(), key=lambda a: a.line)
        for segment in memory.segments:
            for argument in segment.arguments:
                part = slice(
                    argument.start // memory.granule, -(-(argument.start + argument.bytes) // memory.granule)
                )
                result.bytes_read[argument.name] = int(segment.read_map[part].sum()) * memory.granule
                result.bytes_written[argument.name] = int(segment.write_map[part].sum()) * memory.granule
    return result
