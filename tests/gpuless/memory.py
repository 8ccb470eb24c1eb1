"""Global, shared and local memory with their checks: bounds, alignment, races, reads of what nobody wrote.

Shadow memory has one entry per granule, the smallest access to that space in the program (1 to 16 bytes); natural alignment, which
PTX demands, keeps every access on whole granules.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuless.parser import Instruction, Program, split_vector, type_bits

if TYPE_CHECKING:
    from gpuless.machine import Machine

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Lanes = Any  # NDArray[np.intp], or slice(None) for all lanes
ANYWHERE = ""  # stands for memory that pointers in memory lead to
_NOBODY = -1
_MANY = 1 << 29  # more than one CTA
_ATOMIC = 1 << 30  # updated by atomics only; the low bits say by which CTA


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


def _granule(program: Program, space: str) -> int:
    sizes = [16]
    for ins in program.instructions:
        if ins.opcode in ("ld", "ldu", "st", "atom", "red") and space_of(ins) in (space, "generic"):
            sizes.append(access_bytes(ins))
        elif ins.opcode == "cp" and ins.has("async") and len(ins.operands) > 2:
            sizes.append(access_bytes(ins))
    return min(sizes)


def everyone(lanes: Lanes, total: int) -> NDArray[np.intp]:
    """Lane numbers as an array."""
    return np.arange(total)[lanes] if isinstance(lanes, slice) else lanes


def _rows(data: NDArray[np.uint8], item: int, size: int, cache: dict) -> NDArray:
    """`data` as [accesses of `size` bytes, items]."""
    if (item, size) not in cache:
        cache[item, size] = data[: len(data) // size * size].view(UNSIGNED[item]).reshape(-1, size // item)
    return cache[item, size]


def _check(
    m: Machine, ins: Instruction, kind: str, address: NDArray, lanes: Lanes, bad: NDArray[np.bool_], message: str
) -> tuple[NDArray, Lanes]:
    """Report the bad lanes and go on with the others."""
    numbers = everyone(lanes, m.lanes)
    m.report(kind, ins, numbers[bad], message)
    return address[~bad], numbers[~bad]


class _PerLaneMemory:
    """A window of `size` bytes in its own copy for every owner (CTA or thread), in one array."""

    space: str

    def __init__(self, m: Machine, base: int, size: int, owners: int, owner: NDArray) -> None:
        self.m, self.base, self.size = m, base, size
        self.stride = -(-size // 16) * 16
        self.data = np.empty(owners * self.stride, np.uint8)
        self.start = owner * self.stride - base  # address + start = index into data
        self.views: dict = {}

    def locate(self, ins: Instruction, address: NDArray, lanes: Lanes, size: int) -> tuple[NDArray, Lanes]:
        """Index into `data` for each access that is in bounds and aligned; the rest are reported and dropped."""
        if len(address) == 0:
            return address, lanes
        if int(address.min()) < self.base or int(address.max()) + size > self.base + self.size:
            bad = (address < self.base) | (address + size > self.base + self.size)
            byte = int(address[bad][0]) - self.base
            address, lanes = _check(
                self.m, ins, f"{self.space} out of bounds", address, lanes, bad,
                f"{size} bytes at byte {byte} of {self.size} bytes of {self.space} memory{self.symbol(byte)}",
            )  # fmt: skip
        if size > 1 and int(np.bitwise_or.reduce(address)) & (size - 1):
            bad = address & (size - 1) != 0
            byte = int(address[bad][0]) - self.base
            address, lanes = _check(
                self.m, ins, "misaligned", address, lanes, bad,
                f"{size} bytes at byte {byte} of {self.space} memory{self.symbol(byte)}",
            )  # fmt: skip
        return address + self.start[lanes], lanes

    def symbol(self, byte: int) -> str:
        """Name of the variable at this byte, for messages."""
        return ""

    def rows(self, item: int, size: int) -> NDArray:
        """The memory as [accesses of `size` bytes, items]."""
        return _rows(self.data, item, size, self.views)


class LocalMemory(_PerLaneMemory):
    """A thread's own memory: spills and arrays that nvcc could not keep in registers."""

    space = "local"

    def __init__(self, m: Machine, base: int, size: int) -> None:
        super().__init__(m, base, size, m.lanes, np.arange(m.lanes))

    def reset(self) -> None:
        """Poison."""
        self.data.fill(0xFF)

    def load(self, ins: Instruction, address: NDArray, lanes: Lanes, size: int, item: int) -> tuple[NDArray, Lanes]:
        """Values [accesses, items] and the lanes they are for."""
        index, lanes = self.locate(ins, address, lanes, size)
        return self.rows(item, size)[index // size], lanes

    def store(self, ins: Instruction, address: NDArray, lanes: Lanes, size: int, values: NDArray) -> None:
        """Write values [accesses, items] of the lanes."""
        index, kept = self.locate(ins, address, lanes, size)
        self.rows(values.itemsize, size)[index // size] = keep(values, lanes, kept)


def _put(memory: NDArray, at: NDArray, values: NDArray) -> NDArray[np.bool_] | None:
    """memory[at] = values; which of them another one has overwritten with something else, None where nobody."""
    memory[at] = values
    lost = (memory[at] != values).any(1)
    return lost if np.count_nonzero(lost) else None


def keep(values: NDArray, lanes: Lanes, kept: Lanes) -> NDArray:
    """The rows of `values` (one per lane of `lanes`) that belong to `kept`, a subset in the same order."""
    if kept is lanes or (not isinstance(lanes, slice) and len(kept) == len(lanes)):
        return values
    return values[kept] if isinstance(lanes, slice) else values[np.searchsorted(lanes, kept)]


class SharedMemory(_PerLaneMemory):
    """Shared memory of every CTA, and who touched it since the CTA's last barrier.

    ``writer[granule]``: -1 nobody; -(2 + thread) a cp.async of that thread is on its way; else epoch << 11 | thread << 1, the last
    bit set for cp.async data, which until the next barrier (or bar.warp.sync) only the copying thread may see.
    ``last[granule]`` and ``first[granule]``: the highest and the lowest warp that read in the latest epoch with a read, as
    epoch << 5 | warp and epoch << 5 | 31 - warp. The epoch counts a CTA's barriers, from 1.
    """

    space = "shared"

    def __init__(self, m: Machine, base: int, size: int) -> None:
        super().__init__(m, base, size, m.ctas, m.cta)
        self.granule = _granule(m.program, "shared")
        entries = len(self.data) // self.granule
        self.writer = np.empty(entries, np.int32)
        self.first, self.last = np.empty(entries, np.int32), np.empty(entries, np.int32)
        opcodes = [ins.opcode for ins in m.program.instructions]
        self.atomic = np.empty(entries, np.int32) if {"atom", "red"} & set(opcodes) else None
        self.pinned = self.unfenced = None
        if "wgmma" in opcodes:
            self.pinned = np.empty(entries, np.int32)  # how many wgmma in flight read it
            self.unfenced = np.empty(entries, np.bool_)  # written with no fence.proxy.async since
        self.code = np.empty(m.lanes, np.int32)
        self.unsynced: list[tuple[NDArray, NDArray]] = []  # (granules, lanes) of arrived cp.async data

    def reset(self) -> None:
        """A new chunk of CTAs."""
        self.data.fill(0xFF)
        self.writer.fill(_NOBODY)
        for shadow in (self.first, self.last, self.atomic, self.pinned, self.unfenced):
            if shadow is not None:
                shadow.fill(0)
        self.code[:] = (1 << 11) | self.m.thread << 1
        self.unsynced.clear()

    def next_epoch(self, released: NDArray[np.bool_] | None) -> None:
        """The CTAs of these lanes (None: all) have passed a barrier."""
        if released is None:
            self.code += 1 << 11
            self.unsynced.clear()
        else:
            self.code[released] += 1 << 11

    def synchronise_warp(self, mask: NDArray[np.bool_]) -> None:
        """bar.warp.sync: data that cp.async brought to these lanes may be seen by their warp."""
        for granules, lanes in self.unsynced:
            self.writer[granules[mask[lanes]]] &= ~1

    def fence_proxy(self, mask: NDArray[np.bool_]) -> None:
        """fence.proxy.async: wgmma may read what these lanes wrote, and what came before their CTA's last barrier."""
        if self.unfenced is None:
            return
        writer = self.writer.reshape(self.m.ctas, -1)
        fencing = self.m.per_cta(mask)
        epoch = np.where(fencing, self.m.per_cta(self.code >> 11), 0).max(1)
        own = np.take_along_axis(fencing, np.minimum(writer >> 1 & 1023, fencing.shape[1] - 1), axis=1)
        self.unfenced &= ~(own | (writer >> 11 < epoch[:, None])).ravel()

    def symbol(self, byte: int) -> str:
        """Name of the shared variable at this byte."""
        found = [
            (address - self.base, name)
            for name, address in self.m.shared_symbols.items()
            if address - self.base <= byte
        ]
        return f" ({max(found)[1]}+{byte - max(found)[0]})" if found else ""

    def granules(self, index: NDArray, lanes: Lanes, size: int) -> tuple[NDArray, NDArray, NDArray]:
        """(granule, writer code of its lane, lane) of every granule that the accesses touch."""
        numbers = everyone(lanes, self.m.lanes)
        code = self.code[lanes]
        per = size // self.granule
        if per <= 1:
            return index // self.granule, code, numbers
        granule = ((index // self.granule)[:, None] + np.arange(per)).ravel()
        return granule, np.repeat(code, per), np.repeat(numbers, per)

    def _where(self, granule: int) -> str:
        byte = granule * self.granule % self.stride
        return f"byte {byte} of shared memory{self.symbol(byte)}"

    def _who(self, code: int) -> str:
        return f"warp {(code >> 6) & 31}"

    def read(self, ins: Instruction, granule: NDArray, code: NDArray, lanes: NDArray) -> None:
        """Check these reads against writes of the same epoch, and remember them."""
        writer = self.writer[granule]
        self._check_writer(ins, granule, writer, code, lanes, "read")
        warp = code >> 6
        self.last[granule] = np.maximum(self.last[granule], warp)
        backwards = granule[::-1]
        self.first[backwards] = np.maximum(self.first[backwards], warp[::-1] ^ 31)
        if self.atomic is not None:
            self._check_warp(ins, granule, self.atomic[granule], code, lanes, "read of what an atomic updated,")

    def write(self, ins: Instruction, granule: NDArray, code: NDArray, lanes: NDArray) -> None:
        """Check these writes against reads and writes of the same epoch, and remember them."""
        self._check_writer(ins, granule, self.writer[granule], code, lanes, "write")
        self._check_readers(ins, granule, code, lanes)
        if self.atomic is not None:
            self._check_warp(ins, granule, self.atomic[granule], code, lanes, "write of what an atomic updated,")
        self.writer[granule] = code
        if self.unfenced is not None:
            self.unfenced[granule] = True

    def update(self, ins: Instruction, granule: NDArray, code: NDArray, lanes: NDArray) -> None:
        """Check these atomics against plain reads and writes of the same epoch, and remember them."""
        assert self.atomic is not None
        self._check_writer(ins, granule, self.writer[granule], code, lanes, "atomic")
        self._check_readers(ins, granule, code, lanes)
        self.atomic[granule] = code

    def _check_readers(self, ins: Instruction, granule: NDArray, code: NDArray, lanes: NDArray) -> None:
        warp = code >> 6
        last, first = self.last[granule] ^ warp, self.first[granule] ^ warp ^ 31
        bad = ((last - 1).view(np.uint32) < 31) | ((first - 1).view(np.uint32) < 31)
        if np.count_nonzero(bad):
            at = int(np.flatnonzero(bad)[0])
            reader = (int(self.last[granule[at]]) if 0 < last[at] < 32 else int(self.first[granule[at]]) ^ 31) & 31
            self.m.report(
                "shared race", ins, lanes[bad],
                f"write of {self._where(granule[at])}, which warp {reader} reads in the same barrier epoch",
            )  # fmt: skip
        if self.pinned is not None:
            bad = self.pinned[granule] > 0
            if np.count_nonzero(bad):
                at = int(np.flatnonzero(bad)[0])
                self.m.report(
                    "shared race", ins, lanes[bad],
                    f"write of {self._where(granule[at])}, which a wgmma reads that nobody has waited for",
                )  # fmt: skip

    def _check_warp(
        self, ins: Instruction, granule: NDArray, shadow: NDArray, code: NDArray, lanes: NDArray, what: str
    ) -> None:
        bad = ((shadow ^ code) - 64).view(np.uint32) < 1984  # the same epoch and another warp
        if np.count_nonzero(bad):
            at = int(np.flatnonzero(bad)[0])
            self.m.report(
                "shared race", ins, lanes[bad],
                f"{what} {self._where(granule[at])}, by {self._who(shadow[at])} in the same barrier epoch",
            )  # fmt: skip

    def _check_writer(
        self, ins: Instruction, granule: NDArray, writer: NDArray, code: NDArray, lanes: NDArray, what: str
    ) -> None:
        if len(writer) == 0:
            return
        if int(writer.min()) < 0:
            pending = writer < _NOBODY
            if np.count_nonzero(pending):
                at = int(np.flatnonzero(pending)[0])
                self.m.report(
                    "cp.async", ins, lanes[pending],
                    f"{what} of {self._where(granule[at])} before the cp.async of thread {-2 - int(writer[at])} into it"
                    " was waited for",
                )  # fmt: skip
            unset = writer == _NOBODY
            if what != "write" and np.count_nonzero(unset):
                at = int(np.flatnonzero(unset)[0])
                self.m.report(
                    "uninitialised", ins, lanes[unset],
                    f"{what} of {self._where(granule[at])}, which nobody has written",
                )  # fmt: skip
            writer = np.where(writer < 0, 0, writer)
        self._check_warp(ins, granule, writer, code, lanes, f"{what} and write of")
        arrived = writer & 1 != 0
        if np.count_nonzero(arrived):
            bad = arrived & (((writer ^ code) - 2).view(np.uint32) < 2046)
            if np.count_nonzero(bad):
                at = int(np.flatnonzero(bad)[0])
                self.m.report(
                    "cp.async", ins, lanes[bad],
                    f"{what} of {self._where(granule[at])} that thread {int(writer[at]) >> 1 & 1023} copied: others"
                    " see it only after a barrier",
                )  # fmt: skip

    def load(self, ins: Instruction, address: NDArray, lanes: Lanes, size: int, item: int) -> tuple[NDArray, Lanes]:
        """Values [accesses, items] and the lanes they are for."""
        if self.m.counts:
            self.m.counts.shared_access(ins, address, lanes, size, self.m.lanes)
        index, lanes = self.locate(ins, address, lanes, size)
        self.read(ins, *self.granules(index, lanes, size))
        return self.rows(item, size)[index // size], lanes

    def store(self, ins: Instruction, address: NDArray, lanes: Lanes, size: int, values: NDArray) -> None:
        """Write values [accesses, items] of the lanes."""
        if self.m.counts:
            self.m.counts.shared_access(ins, address, lanes, size, self.m.lanes)
        index, kept = self.locate(ins, address, lanes, size)
        self.write(ins, *self.granules(index, kept, size))
        self.put(ins, index, kept, size, keep(values, lanes, kept))

    def put(self, ins: Instruction, index: NDArray, lanes: Lanes, size: int, values: NDArray) -> None:
        """Write, and report threads that lose to another one: copies of one value are harmless."""
        lost = _put(self.rows(values.itemsize, size), index // size, values)
        if lost is not None:
            byte = int(index[lost][0]) % self.stride
            self.m.report(
                "shared race", ins, everyone(lanes, self.m.lanes)[lost],
                f"two threads write different values to byte {byte} of shared memory{self.symbol(byte)} at once",
            )  # fmt: skip

    def begin_copy(self, ins: Instruction, address: NDArray, lanes: Lanes, size: int) -> tuple[NDArray, NDArray]:
        """A cp.async will write here: (index into data, lanes)."""
        if self.m.counts:
            self.m.counts.shared_access(ins, address, lanes, size, self.m.lanes)
        index, kept = self.locate(ins, address, lanes, size)
        granule, code, numbers = self.granules(index, kept, size)
        self.write(ins, granule, code, numbers)
        self.writer[granule] = -2 - self.m.thread[numbers]
        return index, everyone(kept, self.m.lanes)

    def finish_copy(self, ins: Instruction, index: NDArray, lanes: NDArray, size: int, values: NDArray) -> None:
        """The data of a cp.async arrives."""
        granule, code, numbers = self.granules(index, lanes, size)
        self.put(ins, index, lanes, size, values)
        self.writer[granule] = code | 1
        if self.unfenced is not None:
            self.unfenced[granule] = True
        self.unsynced.append((granule, numbers))


@dataclass
class Argument:
    """A tensor's (or variable's) bytes in a segment."""

    name: str  # as shown
    parameter: str  # as in the PTX
    start: int  # first byte in the segment
    bytes: int


@dataclass
class Segment:
    """Contiguous host memory that kernels may reach, at `base` in the address space of the device (the host's own)."""

    base: int
    data: NDArray[np.uint8]
    arguments: list[Argument]
    may_be_written: bool
    valid: NDArray[np.bool_] | None = None  # bytes that belong to an argument; None: all
    writer: NDArray[np.int32] | None = None
    reader: NDArray[np.int32] | None = None
    read_map: NDArray[np.bool_] | None = None
    write_map: NDArray[np.bool_] | None = None
    views: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = frozenset(a.name for a in self.arguments) | frozenset(a.parameter for a in self.arguments)

    @property
    def end(self) -> int:
        """Address after the last byte."""
        return self.base + len(self.data)

    def name(self, byte: int) -> str:
        """``x_ptr+12`` for messages: the nearest argument."""
        best = min(self.arguments, key=lambda a: max(a.start - byte, byte - a.start - a.bytes + 1, 0))
        return f"{best.name}{byte - best.start:+d} (its {best.bytes} bytes are 0 … {best.bytes - 1})"


class GlobalMemory:
    """The segments of a launch, and which CTA read or wrote each granule.

    ``writer``: -1 nobody, a CTA's number, or, for granules that only atomics updated, that with a flag. ``reader``: -1, a number,
    or many. Reads are tracked only where the program may write.
    """

    def __init__(
        self, program: Program, segments: list[Segment], reach: dict[int, frozenset[str]], counting: bool
    ) -> None:
        self.reach = reach
        self.segments = sorted(segments, key=lambda s: s.base)
        self.bases = [s.base for s in self.segments]
        self.granule = _granule(program, "global")
        for s in self.segments:
            entries = -(-len(s.data) // self.granule)
            if s.may_be_written:
                s.writer = np.full(entries, _NOBODY, np.int32)
                s.reader = np.full(entries, _NOBODY, np.int32)
            if counting:
                s.read_map, s.write_map = np.zeros(entries, np.bool_), np.zeros(entries, np.bool_)

    def split(
        self, m: Machine, ins: Instruction, address: NDArray, lanes: Lanes, size: int
    ) -> list[tuple[Segment, NDArray, Lanes]]:
        """The accesses by segment, as (segment, byte in it, lanes); what is out of bounds or misaligned is reported."""
        if len(address) == 0:
            return []
        if int(np.bitwise_or.reduce(address)) & (size - 1):
            bad = address & (size - 1) != 0
            where = self._describe(int(address[bad][0]))
            address, lanes = _check(m, ins, "misaligned", address, lanes, bad, f"{size} bytes at {where}")
            if len(address) == 0:
                return []
        low, high = int(address.min()), int(address.max())
        at = bisect.bisect_right(self.bases, low) - 1
        if at >= 0 and high + size <= self.segments[at].end:
            segment = self.segments[at]
            return self._inside(m, ins, segment, address - segment.base, lanes, size)
        found = np.searchsorted(self.bases, address, side="right") - 1
        numbers, parts = everyone(lanes, m.lanes), []
        bad = np.ones(len(address), np.bool_)
        for at in np.unique(found[found >= 0]):
            segment = self.segments[at]
            inside = (found == at) & (address + size <= segment.end)
            bad &= ~inside
            parts += self._inside(m, ins, segment, address[inside] - segment.base, numbers[inside], size)
        if np.count_nonzero(bad):
            where = self._describe(int(address[bad][0]))
            m.report("global out of bounds", ins, numbers[bad], f"{size} bytes at {where}")
        return parts

    def _inside(
        self, m: Machine, ins: Instruction, segment: Segment, byte: NDArray, lanes: Lanes, size: int
    ) -> list[tuple[Segment, NDArray, Lanes]]:
        if not segment.names & self.reach[ins.index] and len(byte):
            where = segment.name(int(byte[0]))
            own = ", ".join(sorted(self.reach[ins.index]))
            message = f"{size} bytes at {where}, by an address computed from {own}"
            m.report("global out of bounds", ins, everyone(lanes, m.lanes), message)
            return []
        if segment.valid is not None and len(byte):
            good = segment.valid[byte] & segment.valid[byte + (size - 1)]
            if np.count_nonzero(good) < len(good):
                where = segment.name(int(byte[~good][0]))
                byte, lanes = _check(m, ins, "global out of bounds", byte, lanes, ~good, f"{size} bytes at {where}")
        return [(segment, byte, lanes)]

    def _describe(self, address: int) -> str:
        if not self.segments:
            return f"address {address:#x}: the kernel got no memory"
        at = bisect.bisect_right(self.bases, address) - 1
        near = [self.segments[i] for i in (at, at + 1) if 0 <= i < len(self.segments)]
        best = min(near, key=lambda s: max(s.base - address, address - s.end))
        return best.name(address - best.base)

    def load(
        self, m: Machine, ins: Instruction, address: NDArray, lanes: Lanes, size: int, item: int, strong: bool
    ) -> tuple[NDArray, Lanes]:
        """Values [accesses, items] and the lanes they are for."""
        parts = self.split(m, ins, address, lanes, size)
        if m.counts:
            m.counts.global_access(ins, address, lanes, size, m.lanes)
        for segment, byte, part in parts:
            granule, number, who = self._granules(m, byte, part, size)
            if segment.reader is not None:
                self._conflicts(m, ins, segment, granule, number, who, "read", strong)
                self._note_read(segment.reader, granule, number)
            if segment.read_map is not None:
                segment.read_map[granule] = True
        values = [_rows(s.data, item, size, s.views)[byte // size] for s, byte, _ in parts]
        if len(parts) == 1:
            return values[0], parts[0][2]
        if not parts:
            return np.empty((0, size // item), UNSIGNED[item]), np.empty(0, np.intp)
        return np.concatenate(values), np.concatenate([everyone(part, m.lanes) for *_, part in parts])

    def store(
        self, m: Machine, ins: Instruction, address: NDArray, lanes: Lanes, size: int, values: NDArray, strong: bool
    ) -> None:
        """Write values [accesses, items] of the lanes."""
        if m.counts:
            m.counts.global_access(ins, address, lanes, size, m.lanes)
        for segment, byte, part in self.split(m, ins, address, lanes, size):
            self.note_write(m, ins, segment, byte, part, size, strong)
            rows = _rows(segment.data, values.itemsize, size, segment.views)
            lost = _put(rows, byte // size, keep(values, lanes, part))
            if lost is not None:
                where = segment.name(int(byte[lost][0]))
                m.report(
                    "global race", ins, everyone(part, m.lanes)[lost],
                    f"two threads write different values to {where} at once",
                )  # fmt: skip

    def note_write(
        self, m: Machine, ins: Instruction, segment: Segment, byte: NDArray, lanes: Lanes, size: int, atomic: bool
    ) -> None:
        """Check these writes (or atomics) against other CTAs' accesses, and remember them."""
        granule, number, who = self._granules(m, byte, lanes, size)
        self._conflicts(m, ins, segment, granule, number, who, "atomic" if atomic else "write", atomic)
        self._conflicts_with_readers(m, ins, segment, granule, number, who)
        if segment.write_map is not None:
            segment.write_map[granule] = True
        if atomic:
            before = segment.writer[granule]
            same = (before == _NOBODY) | (before == (number | _ATOMIC)) | (before == number)
            segment.writer[granule] = np.where(same, number | _ATOMIC, _MANY | _ATOMIC)
            mixed = segment.writer[granule] != (number | _ATOMIC)
            segment.writer[granule[mixed]] = _MANY | _ATOMIC
            return
        segment.writer[granule] = number
        after = segment.writer[granule]
        self._report(m, ins, segment, granule, after, after != number, who, "write and write")

    def _granules(self, m: Machine, byte: NDArray, lanes: Lanes, size: int) -> tuple[NDArray, NDArray, NDArray]:
        number, who, per = m.cta_number[lanes], everyone(lanes, m.lanes), size // self.granule
        if per <= 1:
            return byte // self.granule, number, who
        granule = ((byte // self.granule)[:, None] + np.arange(per)).ravel()
        return granule, np.repeat(number, per), np.repeat(who, per)

    def _note_read(self, reader: NDArray, granule: NDArray, number: NDArray) -> None:
        before = reader[granule]
        new = np.where((before == _NOBODY) | (before == number), number, _MANY)
        reader[granule] = new
        reader[granule[reader[granule] != new]] = _MANY

    def _conflicts(
        self,
        m: Machine,
        ins: Instruction,
        segment: Segment,
        granule: NDArray,
        number: NDArray,
        who: NDArray,
        what: str,
        strong: bool,
    ) -> None:
        writer = segment.writer[granule]
        bad = (writer != _NOBODY) & ((writer & ~_ATOMIC) != number)
        if strong:
            bad &= writer < _ATOMIC
        self._report(m, ins, segment, granule, writer, bad, who, f"{what} and write")

    def _conflicts_with_readers(
        self, m: Machine, ins: Instruction, segment: Segment, granule: NDArray, number: NDArray, who: NDArray
    ) -> None:
        reader = segment.reader[granule]
        self._report(m, ins, segment, granule, reader, (reader != _NOBODY) & (reader != number), who, "write and read")

    def _report(
        self,
        m: Machine,
        ins: Instruction,
        segment: Segment,
        granule: NDArray,
        other: NDArray,
        bad: NDArray,
        who: NDArray,
        what: str,
    ) -> None:
        if np.count_nonzero(bad):
            at = int(np.flatnonzero(bad)[0])
            by = int(other[at]) & ~_ATOMIC
            cta = "several CTAs" if by == _MANY else f"CTA {tuple(int(c) for c in m.coordinates(by))}"
            atomics = " (by atomics)" if other[at] >= _ATOMIC else ""
            where = segment.name(int(granule[at]) * self.granule)
            m.report("cross-CTA race", ins, who[bad], f"{what} of {where}, the latter by {cta}{atomics}")


def reachable(program: Program) -> dict[int, frozenset[str]]:
    """For each memory instruction the parameters and variables from which its address is computed.

    A flow-insensitive union over all instructions; a 64-bit value loaded from memory may be any pointer.
    """
    everything = set(program.parameters) | {s for s, v in program.symbols.items() if v.space in ("global", "const")}
    origin: dict[str, set[str]] = {name: {name} for name in (*everything, ANYWHERE)}
    moves: list[tuple[list[str], list[str]]] = []
    for ins in program.instructions:
        if not ins.operands or ins.opcode in ("st", "red", "bra"):
            continue
        outputs, *inputs = (_names(o) for o in ins.operands)
        if ins.opcode in ("ld", "ldu", "atom") and space_of(ins) != "param":
            # What memory holds does not come from the pointer to it, but may be a pointer itself.
            inputs = [[*everything, ANYWHERE]] if ins.types and type_bits(ins.types[-1]) == 64 else []
        moves.append((outputs, [name for part in inputs for name in part]))
    changed = True
    while changed:
        changed = False
        for outputs, inputs in moves:
            reach = set().union(*(origin.get(name, ()) for name in inputs))
            for register in outputs:
                known = origin.setdefault(register, set())
                if not reach <= known:
                    known |= reach
                    changed = True
    result = {}
    for ins in program.instructions:
        if ins.opcode in ("ld", "ldu", "st", "red", "atom", "cp") and len(ins.operands) > 1:
            place = 0 if ins.opcode in ("st", "red") else 1
            names = set().union(*(origin.get(name, ()) for name in _names(ins.operands[place])))
            result[ins.index] = frozenset(names or {*everything, ANYWHERE})
    return result


def written(program: Program, reach: dict[int, frozenset[str]]) -> frozenset[str]:
    """Parameters and variables through which the program may write."""
    return frozenset().union(
        *(reach[ins.index] for ins in program.instructions if ins.opcode in ("st", "red", "atom") and ins.index in reach)
    )


def _names(operand: str) -> list[str]:
    words = operand.replace("{", " ").replace("}", " ").replace("[", " ").replace("]", " ")
    return [w for w in words.replace(",", " ").replace("+", " ").replace("|", " ").split() if not w[0].isdigit()]
