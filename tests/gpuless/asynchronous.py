"""Commit groups: work that a thread has started and will wait for (cp.async, wgmma)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuless.program import Instruction


@dataclass
class Work:
    """One instruction's work for some lanes; each counts its own groups."""

    payload: Any
    lanes: NDArray[np.intp]
    group: NDArray[np.int32]
    instruction: Instruction


class CommitGroups:
    """What each lane has issued, committed and not yet waited for."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int32)
        self.work: list[Work] = []

    def reset(self) -> None:
        """A new chunk of CTAs."""
        self.committed.fill(0)
        self.work.clear()

    def issue(self, payload: Any, lanes: NDArray[np.intp], ins: Instruction) -> None:
        """Work that belongs to the group that the lanes commit next."""
        self.work.append(Work(payload, lanes, self.committed[lanes], ins))

    def commit(self, lanes: NDArray[np.intp] | slice) -> None:
        """Close the group of these lanes."""
        self.committed[lanes] += 1

    def wait(self, mask: NDArray[np.bool_], leave: int) -> Iterator[tuple[Any, NDArray[np.bool_] | None]]:
        """Finish what these lanes committed but for the last `leave` groups: (payload, which of its lanes;
        None all).
        """
        waiting, self.work = self.work, []
        for work in waiting:
            done = mask[work.lanes] & (work.group < self.committed[work.lanes] - leave)
            count = np.count_nonzero(done)
            if count == len(done):
                yield work.payload, None
                continue
            if count:
                yield work.payload, done
            # Lanes that are done get a group that no wait reaches again.
            self.work.append(
                Work(
                    work.payload,
                    work.lanes,
                    np.where(done, np.iinfo(np.int32).max, work.group),
                    work.instruction,
                )
            )

    def unfinished(self) -> list[Work]:
        """Work that some lane never waited for."""
        return [w for w in self.work if (w.group != np.iinfo(np.int32).max).any()]
