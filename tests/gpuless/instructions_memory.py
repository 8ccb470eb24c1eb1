"""Loads, stores, asynchronous copies, atomics, fences (PTX ISA 9.7.9, 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.instructions_float import narrow, widen
from gpuless.memory import LOCAL_WINDOW, SHARED_WINDOW, access_bytes, everyone, space_of
from gpuless.operands import (
    PACKED,
    Closure,
    address_of,
    constant,
    dtype_of,
    instruction,
    source,
    target,
    unsupported,
    wide_target,
)
from gpuless.program import Instruction, split_address, split_vector, type_bits
from gpuless.rounding import add_odd

if TYPE_CHECKING:
    from gpuless.machine import Machine

_STRONG = ("relaxed", "acquire", "release", "acq_rel", "volatile", "mmio")


def _strong(ins: Instruction) -> bool:
    """Whether other CTAs may do the same at once: not with a scope that ends at this CTA."""
    return (ins.opcode in ("atom", "red") or ins.has(*_STRONG)) and not ins.has("cta")


Load = Callable[[NDArray, object], tuple[NDArray, object]]


@instruction("ld", "ldu")
def _load(m: Machine, ins: Instruction) -> Closure:
    kind, space = ins.types[-1], space_of(ins)
    parts = split_vector(ins.operands[0])
    if space == "param":
        return _load_parameter(m, ins, kind, parts)
    item = type_bits(kind) // 8
    size = access_bytes(ins)
    if item > 8:
        raise unsupported(ins)
    signed = kind[0] == "s"
    rows = [wide_target(m, ins, part, kind if signed else f"b{8 * item}") for part in parts]
    address = address_of(m, ins, ins.operands[1])
    load = _loader(m, ins, space, size, item)

    def run() -> None:
        lanes = m.active.lanes
        values, lanes = load(address(lanes), lanes)
        if signed:
            values = values.view(dtype_of(kind))
        for i, row in enumerate(rows):
            row[lanes] = values[:, i]

    return run


def _loader(m: Machine, ins: Instruction, space: str, size: int, item: int) -> Load:
    strong = _strong(ins)
    if space == "global":
        return lambda address, lanes: m.memory.load(m, ins, address, lanes, size, item, strong)
    if space == "shared":
        return lambda address, lanes: m.shared.load(ins, address, lanes, size, item)
    if space == "local":
        return lambda address, lanes: m.local.load(ins, address, lanes, size, item)
    spaces = {name: _loader(m, ins, name, size, item) for name in ("global", "shared", "local")}

    def generic(address: NDArray, lanes: object) -> tuple[NDArray, object]:
        results = [spaces[name](a, who) for name, a, who, _ in by_space(m, address, lanes)]
        if len(results) == 1:
            return results[0]
        return np.concatenate([v for v, _ in results]), np.concatenate(
            [everyone(w, m.lanes) for _, w in results]
        )

    return generic


def by_space(m: Machine, address: NDArray, lanes: object) -> list[tuple[str, NDArray, object, object]]:
    """Generic addresses as (state space, address in it, lanes, index of these among the given)."""
    windows = (
        ("global", 0, SHARED_WINDOW),
        ("shared", SHARED_WINDOW, LOCAL_WINDOW),
        ("local", LOCAL_WINDOW, 1 << 62),
    )
    parts: list[tuple[str, NDArray, object, object]] = []
    for name, low, high in windows:
        inside = (address >= low) & (address < high) if name != "global" else (address < high)
        count = np.count_nonzero(inside)
        if count == len(address):
            return [(name, address - low, lanes, slice(None))]
        if count:
            parts.append(
                (name, address[inside] - low, everyone(lanes, m.lanes)[inside], np.flatnonzero(inside))
            )
    return parts


def _load_parameter(m: Machine, ins: Instruction, kind: str, parts: list[str]) -> Closure:
    name, offset = split_address(ins.operands[1])
    if name not in m.program.parameters:
        raise unsupported(ins, "only parameters of the kernel are read, by name")
    item = type_bits(kind) // 8
    rows = [wide_target(m, ins, part, kind) for part in parts]
    dtype = dtype_of(kind)

    def run() -> None:
        values = np.frombuffer(m.parameters[name], dtype, len(rows), offset) if item else None
        for row, value in zip(rows, values, strict=True):
            np.copyto(row, value, casting="unsafe", where=m.where)

    return run


@instruction("st")
def _store(m: Machine, ins: Instruction) -> Closure:
    kind, space, size = ins.types[-1], space_of(ins), access_bytes(ins)
    item = type_bits(kind) // 8
    if item > 8 or space == "param":
        raise unsupported(ins)
    rows = [source(m, ins, part, f"b{8 * item}") for part in split_vector(ins.operands[1])]
    address = address_of(m, ins, ins.operands[0])
    strong = _strong(ins)

    def put(space: str, where: NDArray, lanes: object, values: NDArray) -> None:
        if space == "global":
            m.memory.store(m, ins, where, lanes, size, values, strong)
        else:
            (m.shared if space == "shared" else m.local).store(ins, where, lanes, size, values)

    def run() -> None:
        lanes = m.active.lanes
        where = address(lanes)
        values = np.empty((len(where), len(rows)), f"u{item}")
        for i, row in enumerate(rows):
            values[:, i] = row[lanes] if isinstance(row, np.ndarray) else row
        if space != "generic":
            put(space, where, lanes, values)
            return
        for name, part, who, index in by_space(m, where, lanes):
            put(name, part, who, values[index])

    return run


@instruction("cp")
def _copy_async(m: Machine, ins: Instruction) -> Closure:
    if not ins.has("async") or ins.has("bulk", "mbarrier", "reduce"):
        raise unsupported(ins, "TMA is not emulated: load with pointers (tl.load), not descriptors")
    copies, shared = m.copies, m.shared
    if ins.has("commit_group"):
        return lambda: copies.commit(m.active.lanes)
    if ins.has("wait_group", "wait_all"):
        everything = ins.has("wait_all")
        leave = 0 if everything else constant(ins, ins.operands[0])

        def wait() -> None:
            if everything:
                copies.commit(m.active.lanes)
            for (copy, index, values, lanes, size), chosen in copies.wait(m.active.mask, leave):
                if chosen is not None:
                    index, values, lanes = index[chosen], values[chosen], lanes[chosen]
                shared.finish_copy(copy, index, lanes, size, values)

        return wait

    size = access_bytes(ins)
    item = min(size, 8)
    to, of = address_of(m, ins, ins.operands[0]), address_of(m, ins, ins.operands[1])
    extra = list(ins.operands[3:])
    if ins.has("L2::cache_hint"):
        extra.pop()
    if extra and extra[0] in m.program.registers and m.program.registers[extra[0]][0] == 1:
        raise unsupported(ins, "give the number of bytes instead of a predicate to ignore the source")
    given = source(m, ins, extra[0], "u32") if extra else None

    def copy() -> None:
        lanes = m.active.lanes
        index, kept = shared.begin_copy(ins, to(lanes), lanes, size)
        values = np.zeros((len(index), size // item), f"u{item}")
        if given is None:
            wanted = kept
        elif isinstance(given, np.ndarray):
            wanted = kept[given[kept] > 0]
        else:
            wanted = kept if given else kept[:0]
        if isinstance(given, np.ndarray) and (partial := (given[wanted] < size)).any():
            _copy_part(m, ins, wanted[partial], of(wanted[partial]), given, kept, values)
            wanted = wanted[~partial]
        data, got = m.memory.load(m, ins, of(wanted), wanted, size, item, strong=False)
        values[np.searchsorted(kept, everyone(got, m.lanes))] = data
        copies.issue((ins, index, values, kept, size), kept, ins)

    return copy


def _copy_part(
    m: Machine, ins: Instruction, lanes: NDArray, of: NDArray, count: NDArray, kept: NDArray, values: NDArray
) -> None:
    """The source of a cp.async that is shorter than its destination, byte by byte; the rest stays zero."""
    octets = values.view(np.uint8)
    for byte in range(int(count[lanes].max())):
        wanted = count[lanes] > byte
        data, got = m.memory.load(m, ins, of[wanted] + byte, lanes[wanted], 1, 1, strong=False)
        octets[np.searchsorted(kept, got), byte] = data[:, 0]


@instruction("atom", "red")
def _atomic(m: Machine, ins: Instruction) -> Closure:
    returns = ins.opcode == "atom"
    kind, full = PACKED.get(ins.types[-1], ins.types[-1]), ins.types[-1]
    operation = next((x for x in ins.modifiers if x in _UPDATES), None)
    operands = ins.operands if returns else ("_", *ins.operands)
    if operation is None or ins.has("async") or type_bits(full) > 64:
        raise unsupported(ins)
    space, size = space_of(ins), type_bits(full) // 8
    item = type_bits(kind) // 8
    update = _UPDATES[operation](kind)
    address = address_of(m, ins, operands[1])
    values = [source(m, ins, part, full) for part in split_vector(operands[2])]
    other = source(m, ins, operands[3], full) if operation == "cas" else None
    rows = [target(m, ins, part, full) for part in split_vector(operands[0])] if returns else []
    dtype, per = dtype_of(full), size // item

    def pick(row: NDArray, lanes: NDArray) -> NDArray:
        if not isinstance(row, np.ndarray):
            return np.full((len(lanes), per), row)
        return row.reshape(-1, per)[lanes]

    def apply(space: str, where: NDArray, lanes: NDArray, element: int) -> None:
        """One element of every lane, in the order of the lanes where they hit the same address."""
        if space == "global":
            parts = [
                (segment.data, byte, everyone(who, m.lanes), segment)
                for segment, byte, who in m.memory.split(m, ins, where, lanes, size)
            ]
            if m.counts:
                m.counts.global_access(ins, where, lanes, size, m.lanes)
            for _, byte, who, segment in parts:
                m.memory.note_write(m, ins, segment, byte, who, size, _strong(ins))
        else:
            index, who = m.shared.locate(ins, where, lanes, size)
            m.shared.update(ins, *m.shared.granules(index, who, size))
            parts = [(m.shared.data, index, everyone(who, m.lanes), None)]
        for data, byte, who, _ in parts:
            memory = data[: len(data) // size * size].view(dtype).reshape(-1, per)
            at = byte // size
            new = pick(values[element], who)
            swap = pick(other, who) if other is not None else None
            old = np.empty_like(new)
            for turn in _turns(at):
                before = memory[at[turn]]
                old[turn] = before
                memory[at[turn]] = update(before, new[turn], swap[turn] if swap is not None else None)
            if returns:
                rows[element].reshape(-1, per)[who] = old

    def run() -> None:
        lanes = everyone(m.active.lanes, m.lanes)
        where = address(lanes)
        for element in range(len(values)):
            if space == "generic":
                for name, part, who, _ in by_space(m, where + element * size, lanes):
                    apply(name, part, who, element)
            else:
                apply(space, where + element * size, lanes, element)

    return run


def _turns(at: NDArray) -> list[NDArray]:
    """Split accesses into rounds in which no address occurs twice, in order."""
    order = np.argsort(at, kind="stable")
    ordered = at[order]
    start = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(at) else order
    if len(start) == len(at):
        return [slice(None)]
    rank = np.arange(len(at)) - np.repeat(start, np.diff(np.append(start, len(at))))
    by_rank = np.argsort(rank, kind="stable")
    return np.split(order[by_rank], np.cumsum(np.bincount(rank))[:-1])


def _add(kind: str) -> Callable[..., NDArray]:
    if kind in ("f16", "bf16"):
        return lambda old, new, _: narrow(add_odd(widen(old, kind), widen(new, kind)), kind)
    return lambda old, new, _: old + new


_UPDATES: dict[str, Callable[[str], Callable[..., NDArray]]] = {
    "add": _add,
    "min": lambda kind: lambda old, new, _: np.fmin(old, new),
    "max": lambda kind: lambda old, new, _: np.fmax(old, new),
    "exch": lambda kind: lambda old, new, _: new,
    "cas": lambda kind: lambda old, new, swap: np.where(old == new, swap, old),
    "and": lambda kind: lambda old, new, _: old & new,
    "or": lambda kind: lambda old, new, _: old | new,
    "xor": lambda kind: lambda old, new, _: old ^ new,
    "inc": lambda kind: lambda old, new, _: np.where(old >= new, 0, old + 1),
    "dec": lambda kind: lambda old, new, _: np.where((old == 0) | (old > new), new, old - 1),
}


@instruction("membar", "fence")
def _fence(m: Machine, ins: Instruction) -> Closure:
    if ins.has("proxy"):
        return lambda: m.shared.fence_proxy(m.active.mask)
    return lambda: None


@instruction(
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "griddepcontrol",
    "nanosleep",
    "setmaxnreg",
    "pmevent",
)
def _hint(m: Machine, ins: Instruction) -> Closure:
    return lambda: None


@instruction("createpolicy")
def _policy(m: Machine, ins: Instruction) -> Closure:
    d = target(m, ins, ins.operands[0], "b64")
    return lambda: np.copyto(d, np.uint64(0), where=m.where)
