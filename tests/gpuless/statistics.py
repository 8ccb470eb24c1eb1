"""What a launch did: instructions, memory transactions, bytes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.parser import Instruction, Program

if TYPE_CHECKING:
    from gpuless.machine import Active

SECTOR = 32  # bytes: the unit in which global memory moves
BANKS = 32  # of 4 bytes: what shared memory delivers in one wavefront


@dataclass
class Access:
    """What one memory instruction moved, over all warps.

    ``transactions``: sectors of 32 bytes (global) or wavefronts of 128 bytes (shared, bank conflicts
    included); ``ideal``: the fewest that hold the same distinct bytes.
    """

    space: str
    line: int
    name: str
    text: str
    requests: int = 0  # executions by a warp
    transactions: int = 0
    ideal: int = 0
    bytes: int = 0  # asked for by threads

    @property
    def excess(self) -> float:
        """Transactions over the ideal."""
        return self.transactions / max(self.ideal, 1)


class Counts:
    """Counters of a machine; cleared by reset."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.reset()

    def reset(self) -> None:
        """Start a launch."""
        self.blocks: dict[tuple[int, int], int] = defaultdict(int)
        self.accesses: dict[tuple[str, int], Access] = {}

    def block(self, start: int, end: int, active: Active) -> None:
        """The active warps run instructions start … end - 1."""
        if active.warps < 0:
            active.warps = int(np.count_nonzero(active.mask.reshape(-1, 32).any(1)))
        self.blocks[start, end] += active.warps

    def warp_instructions(self) -> dict[str, int]:
        """Executions by a warp, by opcode with modifiers; an instruction predicated off counts."""
        totals: dict[str, int] = defaultdict(int)
        for (start, end), warps in self.blocks.items():
            for ins in self.program.instructions[start:end]:
                totals[ins.name] += warps
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def _access(self, space: str, ins: Instruction) -> Access:
        key = (space, ins.index)
        if key not in self.accesses:
            self.accesses[key] = Access(space, ins.line, ins.name, ins.text)
        return self.accesses[key]

    def global_access(self, ins: Instruction, address: NDArray, lanes: object, size: int, total: int) -> None:
        """One execution: `size` bytes at `address` for each of the lanes."""
        warp = np.arange(total)[lanes] // 32
        access = self._access("global", ins)
        access.requests += len(np.unique(warp))
        access.bytes += len(address) * size
        access.transactions += len(_unique_pairs(warp, address // SECTOR)[0])
        owner, _ = _unique_pairs(warp, address)
        if len(owner):
            access.ideal += int((-(-np.bincount(owner) * size // SECTOR)).sum())

    def shared_access(
        self, ins: Instruction, address: NDArray, lanes: object, size: int, total: int, rows: bool = False
    ) -> None:
        """One execution; 4, 8 and 16-byte accesses go in phases of 32, 16 and 8 lanes, `rows` of 16 bytes by
        eights.
        """
        lane = np.arange(total)[lanes][: len(address)]
        access = self._access("shared", ins)
        access.requests += len(np.unique(lane // 32))
        access.bytes += len(address) * size
        phase = lane // (8 if rows else min(32, 128 // max(size, 4)))
        words = max(size // 4, 1)
        word = ((address // 4)[:, None] + np.arange(words)).ravel()
        owner, word = _unique_pairs(np.repeat(phase, words), word)
        if len(owner):
            owner -= owner.min()
            conflicts = np.bincount(owner * BANKS + word % BANKS, minlength=(int(owner.max()) + 1) * BANKS)
            access.transactions += int(conflicts.reshape(-1, BANKS).max(1).sum())
            access.ideal += int((-(-np.bincount(owner) // BANKS)).sum())


def _unique_pairs(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
    if len(a) == 0:
        return a, b
    low = int(b.min())
    span = int(b.max()) - low + 1
    key = np.unique(a * span + (b - low))
    return key // span, key % span + low
