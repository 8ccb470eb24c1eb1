"""What the state spaces have in common: sizes of accesses, granules, windows; and local memory.

Shadow memory has one entry per granule, the smallest access to that space in the program (1 to 16 bytes);
natural alignment, which PTX demands, keeps every access on whole granules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuless.program import Instruction, Program, type_bits

if TYPE_CHECKING:
    from gpuless.machine import Machine

SHARED_BASE = 1024  # first address of the shared window: an access through a null pointer must not hit
LOCAL_BASE = 1024
SHARED_WINDOW = 1 << 56  # generic addresses (cvta): no user space address of x86-64 or AArch64 reaches this
LOCAL_WINDOW = 1 << 57

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Lanes = Any  # NDArray[np.intp], or slice(None) for all lanes


def space_of(ins: Instruction) -> str:
    """State space of a memory instruction: global, shared, local, param, or generic."""
    for modifier in ins.modifiers:
        space = modifier.split("::")[0]
        if space in ("global", "shared", "local", "param", "const"):
            return "global" if space == "const" else space
    return "generic"


def access_bytes(ins: Instruction) -> int:
    """Bytes that one thread's access moves; for atomics, of one element."""
    if ins.opcode == "cp":
        return int(ins.operands[2], 0)
    if ins.opcode in ("ldmatrix", "stmatrix", "wgmma"):
        return 16
    item = type_bits(ins.types[-1]) // 8
    vector = next((int(m[1]) for m in ins.modifiers if m in ("v2", "v4", "v8")), 1)
    return item if ins.opcode in ("atom", "red") else item * vector


def granule_of(program: Program, space: str) -> int:
    """Bytes of the smallest access to a space in the program."""
    sizes = [16]
    for ins in program.instructions:
        if (ins.opcode in ("ld", "ldu", "st", "atom", "red") and space_of(ins) in (space, "generic")) or (
            ins.opcode == "cp" and ins.has("async") and len(ins.operands) > 2
        ):
            sizes.append(access_bytes(ins))
    return min(sizes)


def everyone(lanes: Lanes, total: int) -> NDArray[np.intp]:
    """Lane numbers as an array."""
    return np.arange(total)[lanes] if isinstance(lanes, slice) else lanes


def rows_of(data: NDArray[np.uint8], item: int, size: int, cache: dict) -> NDArray:
    """`data` as [accesses of `size` bytes, items]."""
    if (item, size) not in cache:
        cache[item, size] = data[: len(data) // size * size].view(UNSIGNED[item]).reshape(-1, size // item)
    return cache[item, size]


def drop(
    m: Machine,
    ins: Instruction,
    kind: str,
    address: NDArray,
    lanes: Lanes,
    bad: NDArray[np.bool_],
    message: str,
) -> tuple[NDArray, Lanes]:
    """Report the bad lanes and go on with the others."""
    numbers = everyone(lanes, m.lanes)
    m.report(kind, ins, numbers[bad], message)
    return address[~bad], numbers[~bad]


def put(memory: NDArray, at: NDArray, values: NDArray) -> NDArray[np.bool_] | None:
    """memory[at] = values; which of them another one overwrote with something else, None where nobody."""
    memory[at] = values
    lost = (memory[at] != values).any(1)
    return lost if np.count_nonzero(lost) else None


def keep(values: NDArray, lanes: Lanes, kept: Lanes) -> NDArray:
    """The rows of `values` (one per lane of `lanes`) that belong to `kept`, a subset in the same order."""
    if kept is lanes or (not isinstance(lanes, slice) and len(kept) == len(lanes)):
        return values
    return values[kept] if isinstance(lanes, slice) else values[np.searchsorted(lanes, kept)]


class WindowMemory:
    """A window of `size` bytes in its own copy for every owner (CTA or thread), in one array."""

    space: str

    def __init__(self, m: Machine, base: int, size: int, owners: int, owner: NDArray) -> None:
        self.m, self.base, self.size = m, base, size
        self.stride = -(-size // 16) * 16
        self.data = np.empty(owners * self.stride, np.uint8)
        self.start = owner * self.stride - base  # address + start = index into data
        self.views: dict = {}

    def locate(self, ins: Instruction, address: NDArray, lanes: Lanes, size: int) -> tuple[NDArray, Lanes]:
        """Index into `data` for each access that is in bounds and aligned; the rest are reported and
        dropped.
        """
        if len(address) == 0:
            return address, lanes
        if int(address.min()) < self.base or int(address.max()) + size > self.base + self.size:
            bad = (address < self.base) | (address + size > self.base + self.size)
            byte = int(address[bad][0]) - self.base
            address, lanes = drop(
                self.m, ins, f"{self.space} out of bounds", address, lanes, bad,
                f"{size} bytes at byte {byte} of {self.size} bytes of {self.space} memory{self.symbol(byte)}",
            )  # fmt: skip
        if size > 1 and int(np.bitwise_or.reduce(address)) & (size - 1):
            bad = address & (size - 1) != 0
            byte = int(address[bad][0]) - self.base
            address, lanes = drop(
                self.m, ins, "misaligned", address, lanes, bad,
                f"{size} bytes at byte {byte} of {self.space} memory{self.symbol(byte)}",
            )  # fmt: skip
        return address + self.start[lanes], lanes

    def symbol(self, byte: int) -> str:
        """Name of the variable at this byte, for messages."""
        return ""

    def rows(self, item: int, size: int) -> NDArray:
        """The memory as [accesses of `size` bytes, items]."""
        return rows_of(self.data, item, size, self.views)


class LocalMemory(WindowMemory):
    """A thread's own memory: spills and arrays that nvcc could not keep in registers."""

    space = "local"

    def __init__(self, m: Machine, base: int, size: int) -> None:
        super().__init__(m, base, size, m.lanes, np.arange(m.lanes))

    def reset(self) -> None:
        """Poison."""
        self.data.fill(0xFF)

    def load(
        self, ins: Instruction, address: NDArray, lanes: Lanes, size: int, item: int
    ) -> tuple[NDArray, Lanes]:
        """Values [accesses, items] and the lanes they are for."""
        index, lanes = self.locate(ins, address, lanes, size)
        return self.rows(item, size)[index // size], lanes

    def store(self, ins: Instruction, address: NDArray, lanes: Lanes, size: int, values: NDArray) -> None:
        """Write values [accesses, items] of the lanes."""
        index, kept = self.locate(ins, address, lanes, size)
        self.rows(values.itemsize, size)[index // size] = keep(values, lanes, kept)
