"""Tensor instructions of a warpgroup on Hopper: wgmma (PTX ISA 9.7.15).

A wgmma runs while its threads go on: it reads shared memory and its A registers until somebody waits for its
group, and only then are its results there. Until then a write to what it reads, or any use of its
accumulators, is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.instructions_matrix import decode, matrix_shape
from gpuless.operands import (
    Closure,
    constant,
    instruction,
    is_register,
    literal,
    source,
    target,
    unsupported,
    whole_warp,
)
from gpuless.program import Instruction, Program, split_vector, type_bits

if TYPE_CHECKING:
    from gpuless.machine import Machine

GROUP = 128  # threads
# Swizzling by the descriptor's bits 62 and 63: (bytes of a row of the pattern, mask of the row bits that
# are mixed in).
_SWIZZLE = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}


def _offsets(descriptor: int, rows: int, k: int, item: int, transposed: bool) -> NDArray[np.int64]:
    """Shared addresses of the 16-byte chunks of an operand [rows, k]: [rows, chunks along k], or transposed
    [k, along rows].
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width, mask = _SWIZZLE[descriptor >> 62 & 3]
    if transposed:  # rows are contiguous in memory
        per = width // item
        kk, r = np.arange(k)[:, None], np.arange(0, rows, 16 // item)[None, :]
        address = start + r // per * leading + kk // 8 * stride + kk % 8 * width + r % per * item
    else:
        r, byte = np.arange(rows)[:, None], np.arange(0, k * item, 16)[None, :]
        address = start + r // 8 * stride + r % 8 * width + (byte if mask else byte // 16 * leading)
    return address ^ ((address >> 7 & mask) << 4)


@dataclass
class _Flight:
    """A wgmma on its way."""

    registers: frozenset[str]
    lanes: NDArray[np.intp]
    mask: NDArray[np.bool_]  # of those who have not waited yet
    groups: NDArray[np.intp]  # warpgroups
    finish: Callable[[NDArray[np.intp] | slice], None]  # for some of the groups, by their place among them
    pinned: list[
        tuple[NDArray, NDArray]
    ]  # (granules of shared memory that it reads, first lane of their CTAs)


class _SharedOperand:
    """A matrix in shared memory, given by a descriptor per warpgroup."""

    def __init__(
        self, m: Machine, ins: Instruction, operand: str, rows: int, k: int, kind: str, transposed: bool
    ):
        self.m, self.ins, self.rows, self.k, self.kind, self.transposed = m, ins, rows, k, kind, transposed
        self.item = 4 if kind == "tf32" else type_bits(kind) // 8
        if transposed and self.item != 2:
            raise unsupported(ins, "only 16-bit operands can be transposed")
        self.descriptor = source(m, ins, operand, "u64")

    def locate(self, groups: NDArray[np.intp]) -> NDArray[np.intp]:
        """Index into shared memory of every chunk: [groups, …]."""
        m, first = self.m, groups * GROUP
        descriptors = self.descriptor[first]
        if not (self.descriptor.reshape(-1, GROUP)[groups] == descriptors[:, None]).all():
            m.report("wgmma", self.ins, first, "threads of a warpgroup give different descriptors")
        table = {
            int(d): _offsets(int(d), self.rows, self.k, self.item, self.transposed)
            for d in np.unique(descriptors)
        }
        address = np.stack([table[int(d)] for d in descriptors])
        bad = (address < m.shared.base) | (address + 16 > m.shared.base + m.shared.size)
        if bad.any():
            group = int(np.flatnonzero(bad.reshape(len(groups), -1).any(1))[0])
            byte = int(address[bad][0]) - m.shared.base
            m.report(
                "shared out of bounds", self.ins, first[group : group + 1],
                f"the matrix of a descriptor reaches byte {byte} of {m.shared.size} bytes of shared memory",
            )  # fmt: skip
            address = np.where(bad, m.shared.base, address)
        return address + m.shared.start[first].reshape(-1, *[1] * (address.ndim - 1))

    def check(self, index: NDArray) -> tuple[NDArray, NDArray]:
        """Report what was not written, or not synchronised, before; the granules of the operand, pinned."""
        m, shared = self.m, self.m.shared
        per = 16 // shared.granule
        granule = np.unique((index.reshape(-1, 1) // 16 * per + np.arange(per)).ravel())
        cta = granule * shared.granule // shared.stride
        lane = cta * (m.lanes // m.ctas)
        writer, epoch = shared.writer[granule], shared.code[lane] >> 11
        faults = (
            ("uninitialised", writer == -1, "nobody has written"),
            ("cp.async", writer < -1, "a cp.async that nobody waited for is writing"),
            ("shared race", (writer >= 0) & (writer >> 11 == epoch), "was written in the same barrier epoch"),
            ("wgmma", (writer >= 0) & (writer >> 11 < epoch) & shared.unfenced[granule],
             "was written with no fence.proxy.async since"),
        )  # fmt: skip
        for kind, bad, what in faults:
            if np.count_nonzero(bad):
                byte = int(granule[bad][0]) * shared.granule % shared.stride
                m.report(kind, self.ins, lane[bad], f"wgmma reads byte {byte} of shared memory, which {what}")
        shared.pinned[granule] += 1
        return granule, lane

    def values(self, index: NDArray) -> NDArray[np.float64]:
        """[groups, rows, k]."""
        chunks = self.m.shared.rows(self.item, 16)[index // 16]
        matrix = decode(chunks, self.kind).reshape(len(index), -1, self.rows if self.transposed else self.k)
        return matrix.transpose(0, 2, 1) if self.transposed else matrix


@instruction("wgmma")
def _warpgroup(m: Machine, ins: Instruction) -> Closure:
    flights = m.flights
    if ins.has("fence"):
        return m.loose_registers.clear
    if ins.has("commit_group"):
        return lambda: flights.commit(m.active.lanes)
    if ins.has("wait_group"):
        leave = constant(ins, ins.operands[0])

        def wait() -> None:
            for flight, chosen in flights.wait(m.active.mask, leave):
                waited = flight.mask.copy()
                if chosen is not None:  # CTAs of a chunk may be at different places
                    waited.fill(False)
                    waited[flight.lanes[chosen]] = True
                flight.mask &= ~waited
                whole = waited.reshape(-1, GROUP)[flight.groups]
                if (whole.any(1) & ~whole.all(1)).any():
                    raise unsupported(ins, "warps of a warpgroup that wait at different times")
                flight.finish(np.flatnonzero(whole.all(1)))
                for granule, lane in flight.pinned:
                    here = waited[lane]
                    m.shared.finish_matrix_read(granule[here], lane[here])

        return wait
    if not ins.has("mma_async") or ins.has("sp"):
        raise unsupported(ins)
    return _multiply(m, ins)


def _multiply(m: Machine, ins: Instruction) -> Closure:
    rows, columns, k = matrix_shape(ins)
    to, kind_a, kind_b = ins.types
    if to not in ("f32", "f16", "s32") or m.threads % GROUP:
        raise unsupported(ins)
    check = whole_warp(m, ins, "wgmma")
    names = split_vector(ins.operands[0])
    kind = "f16x2" if to == "f16" else to
    accumulators = [target(m, ins, name, kind) for name in names]
    keep = source(m, ins, ins.operands[3], "pred") if is_register(m, ins.operands[3]) else None
    always = keep is None and literal(ins.operands[3], "pred") != 0
    flags = [
        constant(ins, o) for o in ins.operands[4:]
    ]  # scale of A, scale of B, transpose A (if shared), transpose B
    sign = flags[0] * flags[1] if len(flags) >= 2 else 1
    in_registers = ins.operands[1].startswith("{")
    transposes = flags[2:]
    transposed_a = bool(transposes[0]) if len(transposes) == 2 else False
    transposed_b = bool(transposes[-1]) if transposes else False
    b = _SharedOperand(m, ins, ins.operands[2], columns, k, kind_b, transposed_b)
    if in_registers:
        registers = [source(m, ins, part, "b32") for part in split_vector(ins.operands[1])]
        item = 4 if kind_a == "tf32" else type_bits(kind_a) // 8
    else:
        a = _SharedOperand(m, ins, ins.operands[1], rows, k, kind_a, transposed_a)
    scalar = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[to]

    touched = frozenset(names) | frozenset(split_vector(ins.operands[1]) if in_registers else ())

    def issue() -> None:
        check()
        if m.loose_registers & touched:
            m.report(
                "wgmma", ins, np.flatnonzero(m.active.mask),
                f"no wgmma.fence since {min(m.loose_registers & touched)} was written",
            )  # fmt: skip
        mask = m.active.mask.copy()
        whole = mask.reshape(-1, GROUP)
        if (whole.any(1) & ~whole.all(1)).any():
            m.report("divergence", ins, np.flatnonzero(mask), "wgmma in a warpgroup that is not together")
        groups = np.flatnonzero(whole.all(1))
        keeps = keep.copy() if keep is not None else np.full(m.lanes, always)
        index_b = b.locate(groups)
        pinned = [b.check(index_b)]
        if in_registers:
            bits = np.stack([r.reshape(-1, GROUP)[groups] for r in registers]).view(f"u{item}")
            blocks = decode(bits, kind_a).reshape(
                -1, 2, len(groups), 4, 8, 16 // item
            )  # k half, row half, group, warp
            matrix_a = blocks.transpose(2, 3, 1, 4, 0, 5).reshape(len(groups), 64, -1)
        else:
            index_a = a.locate(groups)
            pinned.append(a.check(index_a))

        def finish(some: NDArray[np.intp] | slice) -> None:
            left = matrix_a[some] if in_registers else a.values(index_a[some])
            product = sign * (left @ b.values(index_b[some]).transpose(0, 2, 1))
            done = groups[some]
            # group, warp, row half, row, block of 8 columns, lane % 4, column -> block, half, column, lane
            tiles = product.reshape(len(done), 4, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
            if to == "f16":
                tiles = product.reshape(len(done), 4, 2, 8, columns // 8, 4, 2).transpose(4, 2, 0, 1, 3, 5, 6)
            per = 2 if to == "f16" else 1
            flat = tiles.reshape(len(accumulators), len(done), GROUP * per)
            for row, values in zip(accumulators, flat, strict=True):
                before = row.reshape(-1, GROUP * per)
                kept = np.repeat(keeps.reshape(-1, GROUP)[done], per, axis=1)
                total = values + np.where(kept, before[done], scalar(0))
                before[done] = (
                    total.astype(np.int64).astype(np.int32) if to == "s32" else total.astype(scalar)
                )

        lanes = np.flatnonzero(mask)
        m.flights.issue(_Flight(frozenset(names), lanes, mask, groups, finish, pinned), lanes, ins)

    return issue


def watch_registers(m: Machine, ins: Instruction, closure: Closure, registers: frozenset[str]) -> Closure:
    """The closure, with a report where it touches a register of a wgmma that nobody waited for; notes what
    it writes.
    """
    if ins.opcode in ("wgmma", "ret", "bra", "bar", "exit"):
        return closure
    touched = registers & {part for o in ins.operands for part in split_vector(o)}
    written = registers & set(split_vector(ins.operands[0])) if touched else frozenset()
    if not touched:
        return closure

    def watched() -> int | None:
        m.loose_registers |= written
        for work in m.flights.work:
            both = work.payload.registers & touched
            if both:
                lanes = np.flatnonzero(work.payload.mask & m.active.mask)
                if len(lanes):
                    m.report(
                        "wgmma", ins, lanes,
                        f"uses {min(both)}, a register of the wgmma at PTX line {work.instruction.line}"
                        " that nobody waited for",
                    )  # fmt: skip
        return closure()

    return watched


def matrix_registers(program: Program) -> frozenset[str]:
    """Registers that some wgmma reads or writes."""
    return frozenset(
        name
        for ins in program.instructions
        if ins.opcode == "wgmma" and ins.has("mma_async")
        for operand in ins.operands[:2]
        for name in split_vector(operand)
        if operand.startswith("{")
    )
