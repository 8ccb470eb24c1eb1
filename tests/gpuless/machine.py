"""All threads of a chunk of CTAs at once: one numpy row per register, one closure per instruction.

Lanes = CTAs x threads (padded to whole warps). Lanes at the same instruction run together; of the groups that
have split up the one with the lowest program counter runs first, so that branches of structured code meet
again where they join. A row of a register is written through a mask only where live lanes stand aside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.asynchronous import CommitGroups
from gpuless.instructions import bind
from gpuless.instructions_wgmma import matrix_registers
from gpuless.memory import LOCAL_BASE, SHARED_BASE, LocalMemory
from gpuless.memory_global import GlobalMemory
from gpuless.memory_shared import SharedMemory
from gpuless.program import Instruction, Program
from gpuless.report import Finding, Unsupported
from gpuless.statistics import Counts

if TYPE_CHECKING:
    from gpuless.program import Symbol

WARP = 32
MAX_FINDINGS = 20
MAX_BRANCHES = 1_000_000  # of one chunk of CTAs: minutes

# Every register of a CTA starts as a NaN, an odd address and a huge integer: a read before a write shows.
_POISON = {1: False, 16: 0x7FD3, 32: 0x7FD3D3D3, 64: 0x7FD3D3D3D3D3D3D3}
_VIEWS = {
    1: {"pred": np.bool_},
    16: {"b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16},
    32: {"b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "tf32": np.uint32},
    64: {"b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64},
}


class Active:
    """The lanes that run now."""

    __slots__ = ("_lanes", "count", "everyone", "mask", "warps", "where")

    def __init__(self, mask: NDArray[np.bool_], count: int, where: NDArray[np.bool_] | bool) -> None:
        self.mask = mask
        self.count = count
        self.where = where  # mask for writing registers; True where nobody alive stands aside
        self.everyone = count == len(mask)
        self.warps = -1  # counted when asked for
        self._lanes: NDArray[np.intp] | None = None

    def narrow(self, mask: NDArray[np.bool_], count: int) -> Active:
        """Some of these lanes only."""
        return Active(mask, count, mask)

    @property
    def lanes(self) -> NDArray[np.intp] | slice:
        """Index of the lanes; the whole slice where all run."""
        if self.everyone:
            return slice(None)
        if self._lanes is None:
            self._lanes = np.flatnonzero(self.mask)
        return self._lanes


class Machine:
    """A program bound to `ctas` CTAs of `block` threads each; runs any number of grids, chunk by chunk."""

    def __init__(
        self, program: Program, block: tuple[int, int, int], ctas: int, dynamic_shared: int, counts: bool
    ) -> None:
        self.program, self.block, self.ctas, self.dynamic_shared = program, block, ctas, dynamic_shared
        self.threads = block[0] * block[1] * block[2]
        padded = -(-self.threads // WARP) * WARP
        self.lanes = ctas * padded
        self.warps = self.lanes // WARP
        index = np.arange(self.lanes)
        self.cta, self.thread = index // padded, index % padded
        self.exists = self.thread < self.threads
        self.registers = {
            bits: np.empty((count, self.lanes), np.bool_ if bits == 1 else f"u{bits // 8}")
            for bits, count in program.slots.items()
        }
        self.rows: dict[str, list[NDArray]] = {
            name: list(rows.view(dtype))
            for bits, rows in self.registers.items()
            for name, dtype in _VIEWS[bits].items()
        }
        self.special = self._special_registers()
        self.shared_symbols, shared_bytes = self._place_shared()
        self.shared = SharedMemory(self, SHARED_BASE, shared_bytes)
        self.local = LocalMemory(self, LOCAL_BASE, program.local_bytes)
        self.memory: GlobalMemory  # of the launch
        self.parameters: dict[str, bytes] = {}
        self.counts = Counts(program) if counts else None
        self.copies, self.flights = CommitGroups(self.lanes), CommitGroups(self.lanes)  # cp.async, wgmma
        self.carry = np.zeros(self.lanes, np.bool_)
        self.findings: list[Finding] = []
        self.seen: set[tuple[str, int]] = set()
        self.live = self.exists.copy()
        self.active = Active(self.live, 0, True)
        self.where: NDArray[np.bool_] | bool = True

        self.matrix_registers = matrix_registers(program)
        self.loose_registers: set[str] = set()  # of those, written since the last wgmma.fence
        self.code: list[Callable[[], int | None]] = []
        self.is_control: list[bool] = []
        for ins in program.instructions:
            closure, control = bind(self, ins)
            self.code.append(closure)
            self.is_control.append(control)
        self.next_control = [0] * (len(self.code) + 1)
        self.next_control[-1] = upcoming = len(self.code)
        for pc in reversed(range(len(self.code))):
            upcoming = pc if self.is_control[pc] else upcoming
            self.next_control[pc] = upcoming

    def _special_registers(self) -> dict[str, NDArray]:
        bx, by, _ = self.block
        lane = self.thread % WARP
        u32 = {
            "%tid.x": self.thread % bx,
            "%tid.y": self.thread // bx % by,
            "%tid.z": self.thread // (bx * by),
            "%laneid": lane,
            "%warpid": self.thread // WARP,
            "%nwarpid": -(-self.threads // WARP),
            "%lanemask_eq": 1 << lane,
            "%lanemask_lt": (1 << lane) - 1,
            "%lanemask_le": (2 << lane) - 1,
            "%lanemask_gt": (1 << 32) - (2 << lane),
            "%lanemask_ge": (1 << 32) - (1 << lane),
            **{f"%ntid.{axis}": n for axis, n in zip("xyz", self.block, strict=True)},
            **{f"%cluster_ctaid.{axis}": 0 for axis in "xyz"},
            **{f"%cluster_nctaid.{axis}": 1 for axis in "xyz"},
            **dict.fromkeys(("%cluster_ctarank", "%smid", "%clock", "%clock_hi", "%gridid"), 0),
            **dict.fromkeys(("%cluster_nctarank", "%nsmid"), 1),
            "%dynamic_smem_size": self.dynamic_shared,
            "%total_smem_size": self.dynamic_shared + self.program.shared_bytes,
            **{f"%{name}.{axis}": 0 for name in ("ctaid", "nctaid") for axis in "xyz"},
        }
        rows = {
            name: np.broadcast_to(np.asarray(value, np.uint32), self.lanes).copy()
            for name, value in u32.items()
        }
        return rows | {name: np.zeros(self.lanes, np.uint64) for name in ("%clock64", "%globaltimer")}

    def _place_shared(self) -> tuple[dict[str, int], int]:
        """Address of every shared symbol: static ones first, then the dynamic block on a 16-byte boundary."""
        symbols = [s for s in self.program.symbols.values() if s.space == "shared"]
        dynamic = -(-self.program.shared_bytes // 16) * 16
        size = dynamic + self.dynamic_shared if self.dynamic_shared else self.program.shared_bytes

        def address(symbol: Symbol) -> int:
            return SHARED_BASE + (dynamic if symbol.offset < 0 else symbol.offset)

        return {s.name: address(s) for s in symbols}, size

    # ---- running

    def run(
        self,
        grid: tuple[int, int, int],
        first: int,
        count: int,
        parameters: dict[str, bytes],
        memory: GlobalMemory,
    ) -> None:
        """Run CTAs first … first + count - 1 of the grid, in the order x fastest."""
        self.grid, self.first, self.parameters, self.memory = grid, first, parameters, memory
        number = first + self.cta
        self.cta_number = number.astype(np.int32)
        for axis, value in zip("xyz", self.coordinates(number), strict=True):
            self.special[f"%ctaid.{axis}"][:] = value
        for axis, n in zip("xyz", grid, strict=True):
            self.special[f"%nctaid.{axis}"][:] = n
        for bits, rows in self.registers.items():
            rows.fill(_POISON[bits])
        self.carry.fill(False)
        self.present = self.exists & (self.cta < count)
        self.live = self.present.copy()
        self.waiting = np.zeros(self.lanes, np.bool_)
        self.waiting_at = np.zeros(self.lanes, np.int32)
        self.waiting_for = np.zeros(self.lanes, np.int32)
        self.shared.reset()
        self.local.reset()
        self.copies.reset()
        self.flights.reset()
        self.loose_registers.clear()
        self.groups: dict[int, NDArray[np.bool_]] = {0: self.live.copy()}
        branches = 0
        while True:
            while self.groups:
                pc = min(self.groups)
                self.activate(self.groups.pop(pc))
                branches += self._run_group(pc, min(self.groups, default=len(self.code)))
                if branches > MAX_BRANCHES:
                    raise Unsupported(
                        f"{self.program.name} took {branches} branches: it waits for a CTA or thread that"
                        " comes later. CTAs run in order; spin locks are not emulated"
                    )
            if not self.waiting.any():
                break
            self._deadlock()
        for kind, queue in (("cp.async", self.copies), ("wgmma", self.flights)):
            for work in queue.unfinished():
                self.report(kind, work.instruction, work.lanes, "never waited for")

    def _run_group(self, pc: int, stop: int) -> int:
        """Run the active lanes from pc until they split up, wait, end or reach `stop`, where others are."""
        code, next_control, counts = self.code, self.next_control, self.counts
        branches = 0
        while True:
            end = min(next_control[pc], stop)
            if counts:
                counts.block(pc, min(end + 1, len(code)) if end < stop else end, self.active)
            for closure in code[pc:end]:
                closure()
            if end == stop:
                self.park(stop, self.active.mask)
                return branches
            target = code[end]()
            branches += 1
            if target is None:
                return branches
            if target >= stop:
                self.park(target, self.active.mask)
                return branches
            pc = target

    def activate(self, mask: NDArray[np.bool_]) -> None:
        """Make these the lanes that run."""
        count = int(np.count_nonzero(mask))
        aside = np.count_nonzero(self.live) != count
        self.active = Active(mask, count, mask if aside else True)
        self.where = self.active.where

    def park(self, pc: int, mask: NDArray[np.bool_]) -> None:
        """Let these lanes go on at pc later."""
        if pc == len(self.code):
            self.retire(mask)
        elif pc in self.groups:
            self.groups[pc] = self.groups[pc] | mask
        else:
            self.groups[pc] = mask

    def retire(self, mask: NDArray[np.bool_]) -> None:
        """These lanes are done."""
        self.live = self.live & ~mask
        if self.waiting.any():
            self.release_barriers()

    # ---- barriers

    def per_cta(self, mask: NDArray) -> NDArray:
        """[lanes] -> [CTAs, threads]."""
        return mask.reshape(self.ctas, -1)

    def barrier(self, pc: int, number: int) -> int | None:
        """The active lanes arrive at a barrier for the whole CTA."""
        if self.active.where is True:  # everyone alive is here
            self.shared.next_epoch(None)
            return pc + 1
        ins = self.program.instructions[pc]
        if ins.opcode == "bar" or ins.has("aligned"):
            self.check_converged(ins, self.live, "barrier in a warp that is not together")
        mask = self.active.mask
        self.waiting |= mask
        self.waiting_at[mask] = pc
        self.waiting_for[mask] = number
        self.release_barriers()
        return None

    def release_barriers(self) -> None:
        """Let the CTAs go on whose live threads have all arrived."""
        live, waiting = self.per_cta(self.live), self.per_cta(self.waiting)
        for_ = self.per_cta(self.waiting_for)
        low = np.where(waiting, for_, np.iinfo(np.int32).max).min(1)
        high = np.where(waiting, for_, -1).max(1)
        ready = live.any(1) & ((live == waiting) | ~live).all(1) & (low == high)
        if not ready.any():
            return
        released = (live & ready[:, None]).ravel()
        self.waiting &= ~released
        self.shared.next_epoch(released)
        places = np.unique(self.waiting_at[released])
        for pc in places:
            here = released & (self.waiting_at == pc)
            self.park(int(pc) + 1, here)
        if len(places) > 1:
            at = self.per_cta(np.where(released, self.waiting_at, -1))
            mixed = (at.max(1) != np.where(at < 0, np.iinfo(np.int32).max, at).min(1)) & ready
            if mixed.any():
                lane = np.flatnonzero(released & mixed[self.cta])
                a, b = (self.program.instructions[int(p)] for p in np.unique(self.waiting_at[lane])[:2])
                self.report(
                    "barrier", a, lane, f"threads of one CTA meet at two barriers, this and PTX line {b.line}"
                )

    def _deadlock(self) -> None:
        lanes = np.flatnonzero(self.waiting)
        ins = self.program.instructions[int(self.waiting_at[lanes[0]])]
        others = np.unique(self.waiting_at[lanes])
        lines = ", ".join(str(self.program.instructions[int(p)].line) for p in others)
        self.report(
            "barrier deadlock", ins, lanes, f"threads wait for ever; CTA's threads wait at PTX lines {lines}"
        )
        self.live &= ~self.waiting
        self.waiting[:] = False

    def check_converged(self, ins: Instruction, needed: NDArray[np.bool_], what: str) -> None:
        """Report warps with active lanes in which some of the `needed` lanes are not active."""
        mask = self.active.mask
        missing = (needed & ~mask).reshape(-1, WARP)
        bad = missing.any(1) & mask.reshape(-1, WARP).any(1)
        if bad.any():
            lanes = np.flatnonzero((missing & bad[:, None]).ravel())
            self.report("divergence", ins, lanes, what)

    # ---- reporting

    def coordinates(self, number: NDArray | int) -> tuple:
        """%ctaid of the CTA with this number."""
        gx, gy, _ = self.grid
        return number % gx, number // gx % gy, number // (gx * gy)

    def report(self, kind: str, ins: Instruction, lanes: NDArray[np.intp], message: str) -> None:
        """Note a fault at these lanes; the first report of a kind at an instruction stays."""
        if (kind, ins.index) in self.seen or len(self.findings) >= MAX_FINDINGS:
            return
        self.seen.add((kind, ins.index))
        lane = int(lanes[0])
        cta = tuple(int(c) for c in self.coordinates(self.first + int(self.cta[lane])))
        self.findings.append(Finding(kind, message, cta, int(self.thread[lane]), len(lanes), ins))
