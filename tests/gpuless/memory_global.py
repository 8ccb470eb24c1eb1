"""Global memory: bounds, alignment, and which CTA read or wrote what."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.memory import UNSIGNED, Lanes, drop, everyone, granule_of, keep, put, rows_of
from gpuless.program import Instruction, Program

if TYPE_CHECKING:
    from gpuless.machine import Machine

_NOBODY = -1
_MANY = 1 << 29  # more than one CTA
_ATOMIC = 1 << 30  # updated by atomics only; the low bits say by which CTA


@dataclass
class Argument:
    """A tensor's (or variable's) bytes in a segment."""

    name: str  # as shown
    parameter: str  # as in the PTX
    start: int  # first byte in the segment
    bytes: int
    elements: NDArray[np.bool_] | None = None  # which of its bytes belong to elements; None: all


@dataclass
class Segment:
    """Contiguous host memory that kernels may reach, at `base` in the address space of the device (the
    host's own).
    """

    base: int
    data: NDArray[np.uint8]
    arguments: list[Argument]
    may_be_written: bool
    writer: NDArray[np.int32] | None = None
    reader: NDArray[np.int32] | None = None
    read_map: NDArray[np.bool_] | None = None
    write_map: NDArray[np.bool_] | None = None
    views: dict = field(default_factory=dict)
    counted: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = frozenset(a.parameter for a in self.arguments)

    @property
    def end(self) -> int:
        """Address after the last byte."""
        return self.base + len(self.data)

    def before(self, parameters: frozenset[str]) -> NDArray[np.int32] | None:
        """How many of the bytes before each byte belong to these arguments; None: all of the segment do."""
        if parameters not in self.counted:
            covered = np.zeros(len(self.data), np.bool_)
            for a in self.arguments:
                if a.parameter in parameters:
                    covered[a.start : a.start + a.bytes] |= True if a.elements is None else a.elements
            counts = np.zeros(len(covered) + 1, np.int32)
            np.cumsum(covered, out=counts[1:])
            self.counted[parameters] = None if covered.all() else counts
        return self.counted[parameters]

    def name(self, byte: int) -> str:
        """``x_ptr+12`` for messages: the nearest argument."""
        return _nearest([(a, a.start) for a in self.arguments], byte)


def _nearest(arguments: list[tuple[Argument, int]], byte: int) -> str:
    best, start = min(arguments, key=lambda a: max(a[1] - byte, byte - a[1] - a[0].bytes + 1, 0))
    return f"{best.name}{byte - start:+d} (its {best.bytes} bytes are 0 … {best.bytes - 1})"


class GlobalMemory:
    """The segments of a launch, and which CTA read or wrote each granule.

    ``writer``: -1 nobody, a CTA's number, or, for granules that only atomics updated, that with a flag.
    ``reader``: -1, a number, or many. Reads are tracked only where the program may write.
    """

    def __init__(
        self, program: Program, segments: list[Segment], reach: dict[int, frozenset[str]], counting: bool
    ) -> None:
        self.reach = reach
        self.segments = sorted(segments, key=lambda s: s.base)
        self.bases = [s.base for s in self.segments]
        self.granule = granule_of(program, "global")
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
        """The accesses by segment, as (segment, byte in it, lanes); what is out of bounds or misaligned is
        reported.
        """
        if len(address) == 0:
            return []
        if int(np.bitwise_or.reduce(address)) & (size - 1):
            bad = address & (size - 1) != 0
            where = self._describe(ins, int(address[bad][0]))
            address, lanes = drop(m, ins, "misaligned", address, lanes, bad, f"{size} bytes at {where}")
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
            where = self._describe(ins, int(address[bad][0]))
            m.report("global out of bounds", ins, numbers[bad], f"{size} bytes at {where}")
        return parts

    def _inside(
        self, m: Machine, ins: Instruction, segment: Segment, byte: NDArray, lanes: Lanes, size: int
    ) -> list[tuple[Segment, NDArray, Lanes]]:
        if len(byte) == 0:
            return []
        own = segment.parameters & self.reach[ins.index]
        if not own:
            message = f"{size} bytes at {self._describe(ins, segment.base + int(byte[0]))}, in memory of"
            message = f"{message} {segment.name(int(byte[0])).split(' ')[0]}"
            m.report("global out of bounds", ins, everyone(lanes, m.lanes), message)
            return []
        before = segment.before(own)  # views of one storage share a segment
        if before is not None:
            good = before[byte + size] - before[byte] == size
            if np.count_nonzero(good) < len(good):
                where = self._describe(ins, segment.base + int(byte[~good][0]))
                byte, lanes = drop(
                    m, ins, "global out of bounds", byte, lanes, ~good, f"{size} bytes at {where}"
                )
        return [(segment, byte, lanes)]

    def _describe(self, ins: Instruction, address: int) -> str:
        """The address, from the nearest argument that it can have been computed from."""
        reach = self.reach[ins.index]
        arguments = [(a, s.base + a.start) for s in self.segments for a in s.arguments]
        own = [(a, start) for a, start in arguments if a.parameter in reach] or arguments
        return _nearest(own, address) if own else f"address {address:#x}: the kernel got no memory"

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
        values = [rows_of(s.data, item, size, s.views)[byte // size] for s, byte, _ in parts]
        if len(parts) == 1:
            return values[0], parts[0][2]
        if not parts:
            return np.empty((0, size // item), UNSIGNED[item]), np.empty(0, np.intp)
        return np.concatenate(values), np.concatenate([everyone(part, m.lanes) for *_, part in parts])

    def store(
        self,
        m: Machine,
        ins: Instruction,
        address: NDArray,
        lanes: Lanes,
        size: int,
        values: NDArray,
        strong: bool,
    ) -> None:
        """Write values [accesses, items] of the lanes."""
        if m.counts:
            m.counts.global_access(ins, address, lanes, size, m.lanes)
        for segment, byte, part in self.split(m, ins, address, lanes, size):
            self.note_write(m, ins, segment, byte, part, size, strong)
            rows = rows_of(segment.data, values.itemsize, size, segment.views)
            lost = put(rows, byte // size, keep(values, lanes, part))
            if lost is not None:
                where = segment.name(int(byte[lost][0]))
                m.report(
                    "global race", ins, everyone(part, m.lanes)[lost],
                    f"two threads write different values to {where} at once",
                )  # fmt: skip

    def note_write(
        self,
        m: Machine,
        ins: Instruction,
        segment: Segment,
        byte: NDArray,
        lanes: Lanes,
        size: int,
        atomic: bool,
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

    def _granules(
        self, m: Machine, byte: NDArray, lanes: Lanes, size: int
    ) -> tuple[NDArray, NDArray, NDArray]:
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
        self._report(
            m, ins, segment, granule, reader, (reader != _NOBODY) & (reader != number), who, "write and read"
        )

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
