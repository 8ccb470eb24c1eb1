"""Tensor instructions of a warp: ldmatrix, stmatrix, mma.sync (PTX ISA 9.7.14).

Products are exact and summed in float64 with the accumulator, then rounded once to its type. Tensor cores sum
in an order and with a precision that NVIDIA does not document (fp32 accumulation truncates); agreement is
within a few units of the last place.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuless.memory import everyone
from gpuless.operands import (
    Closure,
    address_of,
    assign,
    dtype_of,
    instruction,
    source,
    target,
    unsupported,
    whole_warp,
)
from gpuless.program import Instruction, split_vector, type_bits
from gpuless.rounding import bf16_to_f32, fp8_values

if TYPE_CHECKING:
    from gpuless.machine import Machine


def matrix_shape(ins: Instruction) -> tuple[int, int, int]:
    """(M, N, K) of mma and wgmma."""
    match = next(
        re.fullmatch(r"m(\d+)n(\d+)k(\d+)", x) for x in ins.modifiers if re.fullmatch(r"m\d+n\d+k\d+", x)
    )
    return int(match[1]), int(match[2]), int(match[3])


def decode(bits: NDArray, kind: str) -> NDArray[np.float64]:
    """Elements of a matrix as float64, exactly. tf32 operands lose their low 13 bits, as on the device."""
    if kind == "bf16":
        return bf16_to_f32(bits).astype(np.float64)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind in ("e4m3", "e5m2"):
        return fp8_values(kind)[bits].astype(np.float64)
    return bits.view(dtype_of(kind)).astype(np.float64)


def _lanes_of_rows(m: Machine, count: int) -> NDArray[np.bool_]:
    return m.special["%laneid"] < 8 * count


@instruction("ldmatrix")
def _load_matrix(m: Machine, ins: Instruction) -> Closure:
    if not ins.has("m8n8") or ins.types[-1] != "b16":
        raise unsupported(ins)
    check = whole_warp(m, ins, "ldmatrix")
    rows = [target(m, ins, part, "b32") for part in split_vector(ins.operands[0])]
    gives_address = _lanes_of_rows(m, len(rows))
    address, transpose, shared = address_of(m, ins, ins.operands[1]), ins.has("trans"), m.shared
    full = bool(gives_address.all())

    def run() -> None:
        check()
        lanes = m.active.lanes if full else np.flatnonzero(m.active.mask & gives_address)
        index, kept = shared.locate(ins, address(lanes), lanes, 16)
        shared.read(ins, *shared.granules(index, kept, 16))
        if m.counts:
            m.counts.shared_access(ins, address(lanes), lanes, 16, m.lanes)
        matrices = np.zeros((m.lanes, 8), np.uint16)
        matrices[kept] = shared.rows(2, 16)[index // 16]
        tiles = matrices.reshape(-1, 4, 8, 8)  # warp, matrix, row, column
        if transpose:
            tiles = tiles.transpose(0, 1, 3, 2)
        for i, row in enumerate(rows):
            assign(m, row, np.ascontiguousarray(tiles[:, i]).view(np.uint32).ravel())

    return run


@instruction("stmatrix")
def _store_matrix(m: Machine, ins: Instruction) -> Closure:
    if not ins.has("m8n8") or ins.types[-1] != "b16":
        raise unsupported(ins)
    check = whole_warp(m, ins, "stmatrix")
    rows = [np.broadcast_to(source(m, ins, part, "b32"), m.lanes) for part in split_vector(ins.operands[1])]
    gives_address = _lanes_of_rows(m, len(rows))
    address, transpose, shared = address_of(m, ins, ins.operands[0]), ins.has("trans"), m.shared

    def run() -> None:
        check()
        lanes = np.flatnonzero(m.active.mask & gives_address)
        tiles = np.zeros((m.warps, 4, 8, 8), np.uint16)
        for i, row in enumerate(rows):
            tile = np.ascontiguousarray(row).view(np.uint16).reshape(-1, 8, 8)
            tiles[:, i] = tile.transpose(0, 2, 1) if transpose else tile
        index, kept = shared.locate(ins, address(lanes), lanes, 16)
        shared.write(ins, *shared.granules(index, kept, 16))
        if m.counts:
            m.counts.shared_access(ins, address(lanes), lanes, 16, m.lanes)
        shared.put(ins, index, kept, 16, tiles.reshape(m.lanes, 8)[everyone(kept, m.lanes)])

    return run


class Fragment:
    """The registers of an operand of mma, as matrices [warps, rows, K].

    Register i of A holds rows 8·(i % 2) … and columns from half·(i // 2); lane l row l // 4, columns per·(l %
    4) … B is the same with its n for rows, without the i % 2.
    """

    def __init__(self, m: Machine, ins: Instruction, operand: str, kind: str, row_halves: int) -> None:
        self.kind, self.row_halves, self.warps = kind, row_halves, m.warps
        self.rows = [np.broadcast_to(source(m, ins, part, "b32"), m.lanes) for part in split_vector(operand)]
        self.raw = np.dtype(f"u{type_bits(kind) // 8 if kind != 'tf32' else 4}")

    def matrix(self) -> NDArray[np.float64]:
        """[warps, 8·row_halves, K]."""
        bits = np.stack(self.rows).view(self.raw)
        blocks = decode(bits, self.kind).reshape(-1, self.row_halves, self.warps, 8, 16 // self.raw.itemsize)
        return blocks.transpose(2, 1, 3, 0, 4).reshape(self.warps, 8 * self.row_halves, -1)


@instruction("mma")
def _multiply_accumulate(m: Machine, ins: Instruction) -> Closure:
    rows, columns, _ = matrix_shape(ins)
    if (rows, columns) != (16, 8) or len(ins.types) != 4 or ins.has("sp", "block_scale", "xor", "and"):
        raise unsupported(ins)
    to, kind_a, kind_b, accumulator = ins.types
    check = whole_warp(m, ins, "mma")
    a = Fragment(m, ins, ins.operands[1], kind_a, 2)
    b = Fragment(m, ins, ins.operands[2], kind_b, 1)
    paired = to == "f16"
    kind = "f16x2" if paired else to
    outputs = [target(m, ins, part, kind) for part in split_vector(ins.operands[0])]
    inputs = [
        np.broadcast_to(
            source(m, ins, part, kind if accumulator == to else accumulator), (2 if paired else 1) * m.lanes
        )
        for part in split_vector(ins.operands[3])
    ]
    per = 4 // len(outputs)  # columns in one register

    def run() -> None:
        check()
        product = a.matrix() @ b.matrix().transpose(0, 2, 1)  # [warps, 16, 8]
        halves = product.reshape(m.warps, 2, 8, 4, 2)  # row half, row, lane % 4, column
        results = []
        for i, before in enumerate(inputs):
            part = halves[:, i] if paired else halves[:, i // 2, :, :, i % 2]
            results.append(part.ravel() + before)
        for row, value in zip(outputs, results, strict=True):
            if to == "s32":
                value = np.clip(value, -(2.0**31), 2.0**31 - 1) if ins.has("satfinite") else value
                value = value.astype(np.int64).astype(np.int32)
            assign(m, row, value)

    assert per in (1, 2)
    return run
