"""Shared memory: bounds, alignment, reads of what nobody wrote, races between warps, asynchronous copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.memory import Lanes, WindowMemory, everyone, granule_of, keep, put
from gpuless.program import Instruction

if TYPE_CHECKING:
    from gpuless.machine import Machine

_NOBODY = -1


class WarpOrder:
    """Which lanes touched shared memory since their warp's last bar.warp.sync: races within a warp.

    Only for programs that have that instruction; elsewhere lanes are taken to run in step. A lane's code is
    epoch << 10 | thread; the epoch counts the barriers and the bar.warp.syncs that it has passed, from 1. Of
    a granule there is the last writer, and the highest and the lowest lane of a warp that read, as in
    `SharedMemory`; of several warps that read one granule, one is remembered.
    """

    def __init__(self, m: Machine, entries: int) -> None:
        self.m = m
        self.writer, self.first, self.last = (np.empty(entries, np.int32) for _ in range(3))
        self.code = np.empty(m.lanes, np.int32)

    def reset(self) -> None:
        """A new chunk of CTAs."""
        for shadow in (self.writer, self.first, self.last):
            shadow.fill(0)
        self.code[:] = 1 << 10 | self.m.thread

    def advance(self, lanes: NDArray[np.bool_] | slice) -> None:
        """These have passed a barrier."""
        self.code[lanes] += 1 << 10

    def read(self, granule: NDArray, lanes: NDArray) -> NDArray[np.bool_]:
        """Which of these reads race with a write."""
        code = self.code[lanes]
        for shadow, value in ((self.last, code), (self.first, code ^ 31)):
            np.maximum.at(shadow, granule, value)
        return self._another_lane(self.writer[granule] ^ code)

    def write(self, granule: NDArray, lanes: NDArray) -> NDArray[np.bool_]:
        """Which of these writes race with a read or another write."""
        code = self.code[lanes]
        before = (self.writer[granule], self.last[granule], self.first[granule] ^ 31)
        self.writer[granule] = code
        return np.logical_or.reduce([self._another_lane(shadow ^ code) for shadow in before])

    @staticmethod
    def _another_lane(difference: NDArray) -> NDArray[np.bool_]:
        return (difference - 1).view(np.uint32) < 31  # the same warp and epoch


class SharedMemory(WindowMemory):
    """Shared memory of every CTA, and who touched it since the CTA's last barrier.

    ``writer[granule]``: -1 nobody; -(2 + thread) a cp.async of that thread is on its way; else epoch << 11 |
    thread << 1, the last bit set for cp.async data, which until the next barrier (or bar.warp.sync) only the
    copying thread may see. ``last[granule]`` and ``first[granule]``: the highest and the lowest warp that
    read in the latest epoch with a read, as epoch << 5 | warp and epoch << 5 | 31 - warp. The epoch counts a
    CTA's barriers, from 1.
    """

    space = "shared"

    def __init__(self, m: Machine, base: int, size: int) -> None:
        super().__init__(m, base, size, m.ctas, m.cta)
        self.granule = granule_of(m.program, "shared")
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
        syncs_warps = any(i.opcode == "bar" and i.has("warp") for i in m.program.instructions)
        self.warp_order = WarpOrder(m, entries) if syncs_warps else None

    def reset(self) -> None:
        """A new chunk of CTAs."""
        self.data.fill(0xFF)
        self.writer.fill(_NOBODY)
        for shadow in (self.first, self.last, self.atomic, self.pinned, self.unfenced):
            if shadow is not None:
                shadow.fill(0)
        self.code[:] = (1 << 11) | self.m.thread << 1
        self.unsynced.clear()
        if self.warp_order:
            self.warp_order.reset()

    def next_epoch(self, released: NDArray[np.bool_] | None) -> None:
        """The CTAs of these lanes (None: all) have passed a barrier."""
        if released is None:
            self.code += 1 << 11
            self.unsynced.clear()
        else:
            self.code[released] += 1 << 11
        if self.warp_order:
            self.warp_order.advance(slice(None) if released is None else released)

    def synchronise_warp(self, mask: NDArray[np.bool_]) -> None:
        """bar.warp.sync: data that cp.async brought to these lanes may be seen by their warp."""
        for granules, lanes in self.unsynced:
            self.writer[granules[mask[lanes]]] &= ~1
        if self.warp_order:
            self.warp_order.advance(mask)

    def finish_matrix_read(self, granule: NDArray, lane: NDArray) -> None:
        """A wgmma that was waited for has read these; other warps know only after a barrier."""
        self.pinned[granule] -= 1
        epoch = self.code[lane] >> 11 << 5
        last_warp = min(31, self.m.threads // 32 - 1)
        self.last[granule] = np.maximum(self.last[granule], epoch | last_warp)
        self.first[granule] = np.maximum(self.first[granule], epoch | 31)  # warp 0

    def fence_proxy(self, mask: NDArray[np.bool_]) -> None:
        """fence.proxy.async: wgmma may read what these lanes wrote, and what came before their CTA's last
        barrier.
        """
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
        if self.warp_order:
            self._check_lanes(ins, granule, self.warp_order.read(granule, lanes), lanes, "read")
        warp = code >> 6
        self.last[granule] = np.maximum(self.last[granule], warp)
        backwards = granule[::-1]
        self.first[backwards] = np.maximum(self.first[backwards], warp[::-1] ^ 31)
        if self.atomic is not None:
            self._check_warp(
                ins, granule, self.atomic[granule], code, lanes, "read of what an atomic updated,"
            )

    def write(self, ins: Instruction, granule: NDArray, code: NDArray, lanes: NDArray) -> None:
        """Check these writes against reads and writes of the same epoch, and remember them."""
        self._check_writer(ins, granule, self.writer[granule], code, lanes, "write")
        self._check_readers(ins, granule, code, lanes)
        if self.warp_order:
            self._check_lanes(ins, granule, self.warp_order.write(granule, lanes), lanes, "write")
        if self.atomic is not None:
            self._check_warp(
                ins, granule, self.atomic[granule], code, lanes, "write of what an atomic updated,"
            )
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
            reader = (
                int(self.last[granule[at]]) if 0 < last[at] < 32 else int(self.first[granule[at]]) ^ 31
            ) & 31
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

    def _check_lanes(
        self, ins: Instruction, granule: NDArray, bad: NDArray[np.bool_], lanes: NDArray, what: str
    ) -> None:
        if np.count_nonzero(bad):
            at = int(np.flatnonzero(bad)[0])
            self.m.report(
                "shared race", ins, lanes[bad],
                f"{what} of {self._where(granule[at])}, which another lane of the warp touched with no"
                " bar.warp.sync in between",
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
                    f"{what} of {self._where(granule[at])} before the cp.async into it, of thread"
                    f" {-2 - int(writer[at])}, was waited for",
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
                    f"{what} of {self._where(granule[at])} that thread {int(writer[at]) >> 1 & 1023} copied:"
                    " others see it only after a barrier",
                )  # fmt: skip

    def load(
        self, ins: Instruction, address: NDArray, lanes: Lanes, size: int, item: int
    ) -> tuple[NDArray, Lanes]:
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
        lost = put(self.rows(values.itemsize, size), index // size, values)
        if lost is not None:
            where = self._where(int(index[lost][0]) // self.granule)
            self.m.report(
                "shared race", ins, everyone(lanes, self.m.lanes)[lost],
                f"two threads at once write different values to {where}",
            )  # fmt: skip

    def begin_copy(
        self, ins: Instruction, address: NDArray, lanes: Lanes, size: int
    ) -> tuple[NDArray, NDArray]:
        """A cp.async will write here: (index into data, lanes)."""
        if self.m.counts:
            self.m.counts.shared_access(ins, address, lanes, size, self.m.lanes)
        index, kept = self.locate(ins, address, lanes, size)
        granule, code, numbers = self.granules(index, kept, size)
        self.write(ins, granule, code, numbers)
        self.writer[granule] = -2 - self.m.thread[numbers]
        return index, everyone(kept, self.m.lanes)

    def finish_copy(
        self, ins: Instruction, index: NDArray, lanes: NDArray, size: int, values: NDArray
    ) -> None:
        """The data of a cp.async arrives."""
        granule, code, numbers = self.granules(index, lanes, size)
        self.put(ins, index, lanes, size, values)
        self.writer[granule] = code | 1
        if self.unfenced is not None:
            self.unfenced[granule] = True
        self.unsynced.append((granule, numbers))
