"""How many CTAs are on a multiprocessor at a time: the rules of the two vendors.

NVIDIA: `cudaOccMaxActiveBlocksPerMultiprocessor` in cuda_occupancy.h of CUDA 13, with the limits of the CUDA
C++ Programming Guide, table "Technical Specifications per Compute Capability". A warp's registers are
allocated in units of 256 from one of four sub-partitions, a CTA's shared memory in units of 128 bytes plus
1 KiB that the system keeps.

AMD: the CDNA3 and RDNA3 instruction set guides (waves of a SIMD, LDS), and LLVM's figure of waves that the
registers leave room for, which stands in the assembly.
"""

from dataclasses import dataclass

REGISTERS = 65536  # of an NVIDIA multiprocessor, 32 bits each
_SUB_PARTITIONS = 4
_REGISTER_UNIT = 256  # registers
_SHARED_UNIT = 128  # bytes
_RESERVED_SHARED = 1024  # bytes a CTA, for the system
_LDS_UNIT = 512  # bytes


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of an NVIDIA multiprocessor: warps, CTAs, bytes of shared memory of all CTAs together."""

    warps: int
    ctas: int
    shared: int


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10),
    86: Multiprocessor(48, 16, 100 << 10),
    89: Multiprocessor(48, 24, 100 << 10),
    90: Multiprocessor(64, 32, 228 << 10),
    100: Multiprocessor(64, 32, 228 << 10),
    120: Multiprocessor(48, 24, 100 << 10),
}


@dataclass(frozen=True)
class ComputeUnit:
    """Limits of what an AMD workgroup runs on: waves of a SIMD, bytes of LDS; four SIMDs."""

    waves: int
    lds: int
    simds: int = 4


COMPUTE_UNITS = {
    "gfx90a": ComputeUnit(8, 64 << 10),
    "gfx942": ComputeUnit(8, 64 << 10),
    "gfx1100": ComputeUnit(16, 128 << 10),  # Triton compiles for a pair of compute units, a WGP
}


@dataclass(frozen=True)
class Occupancy:
    """CTAs on a multiprocessor, their warps as a share of the most there can be, and what limits them."""

    ctas: int
    share: float
    limiter: str


def occupancy(arch: int, *, registers: int, threads: int, shared: int) -> Occupancy:
    """Of an NVIDIA multiprocessor.

    Args:
        arch: 90 for sm_90.
        registers: of a thread.
        threads: of a CTA.
        shared: bytes of a CTA, static and dynamic together.
    """
    limits = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    of_warp = _round_up(32 * registers, _REGISTER_UNIT)
    by_registers = (
        REGISTERS // _SUB_PARTITIONS // of_warp * _SUB_PARTITIONS // warps if registers else limits.ctas
    )
    fits = shared + _RESERVED_SHARED <= limits.shared
    by_shared = limits.shared // _round_up(shared + _RESERVED_SHARED, _SHARED_UNIT) if fits else 0
    ctas, limiter = _least(
        {
            "warps": limits.warps // warps,
            "CTAs": limits.ctas,
            "registers": by_registers,
            "shared memory": by_shared,
        }
    )
    return Occupancy(ctas, ctas * warps / limits.warps, limiter)


def amd_occupancy(arch: str, *, waves: int, threads: int, wave_size: int, shared: int) -> Occupancy:
    """Of an AMD compute unit (a WGP on gfx1100).

    Args:
        arch: such as "gfx942".
        waves: that one SIMD's registers leave room for.
        threads: of a workgroup.
        wave_size: 32 or 64 threads.
        shared: bytes of LDS of a workgroup.
    """
    unit = COMPUTE_UNITS[arch]
    of_group = -(-threads // wave_size)
    limits = {"waves": unit.waves * unit.simds // of_group, "registers": waves * unit.simds // of_group}
    if shared:
        limits["shared memory"] = unit.lds // _round_up(shared, _LDS_UNIT)
    ctas, limiter = _least(limits)
    return Occupancy(ctas, ctas * of_group / (unit.waves * unit.simds), limiter)


def _least(limits: dict[str, int]) -> tuple[int, str]:
    """The smallest limit, and its names where several are as small."""
    least = min(limits.values())
    return least, ", ".join(name for name, limit in limits.items() if limit == least)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
