"""What a launch did: instructions, memory transactions, bytes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.memory import Lanes
from gpuless.program import Instruction, Program

if TYPE_CHECKING:
    from gpuless.machine import Active

WARP = 32  # lanes
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

    def global_access(self, ins: Instruction, address: NDArray, lanes: Lanes, size: int, total: int) -> None:
        """One execution: `size` bytes at `address` for each of the lanes, of `total`."""
        access = self._access("global", ins)
        access.bytes += len(address) * size
        table = np.full(total, -1, np.int64)
        table[lanes] = address
        distinct, addresses = _distinct(table.reshape(-1, WARP))
        each = distinct.sum(1)
        access.requests += int(np.count_nonzero(each))
        access.ideal += int((-(-each * size // SECTOR)).sum())
        access.transactions += int(_distinct(np.where(addresses < 0, -1, addresses // SECTOR))[0].sum())

    def shared_access(self, ins: Instruction, address: NDArray, lanes: Lanes, size: int, total: int) -> None:
        """One execution. Accesses of 4, 8, 16 bytes go in phases of 32, 16, 8 lanes, as do rows of ldmatrix.

        A phase asks for 32 words at most, so that its ideal is one wavefront.
        """
        access = self._access("shared", ins)
        access.bytes += len(address) * size
        words = max(size // 4, 1)
        table = np.full((total, words), -1, np.int64)
        table[lanes] = (address // 4)[:, None] + np.arange(words)
        busy = table[:, 0].reshape(-1, WARP) >= 0
        access.requests += int(np.count_nonzero(busy.any(1)))
        distinct, word = _distinct(table.reshape(-1, BANKS))
        phase, _ = np.nonzero(distinct)
        load = np.bincount(phase * BANKS + word[distinct] % BANKS, minlength=len(word) * BANKS)
        worst = load.reshape(-1, BANKS).max(1)
        access.transactions += int(worst.sum())
        access.ideal += int(np.count_nonzero(worst))


def _distinct(table: NDArray) -> tuple[NDArray[np.bool_], NDArray]:
    """Rows sorted, and where each value of a row occurs first; -1 is none."""
    ordered = np.sort(table, axis=1)
    distinct = ordered >= 0
    distinct[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return distinct, ordered
