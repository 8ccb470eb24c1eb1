"""Ways to look NF4 codes up in Triton, by what they cost: `python -m gpuless.decode_variants`, from tests/.

Every variant is the body of one loop, which loads 16 bytes a thread, looks 32 codes up and adds each to a sum
of its own. The counts are those of the machine code and, for memory, of the emulator; the rate is a bound
that follows from them and from the throughputs that NVIDIA publishes. No time is measured.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpuless.driver import device
from gpuless.static import budget
from peft_kernels.ops.nf4.reference import NF4_CODE
from peft_kernels.ops.nf4.triton import code_table, decode

VARIANTS = ("shuffle", "gather", "prmt", "table", "pairs")
ARCHS = (80, 86, 89, 90, 120)
BYTES = 2048  # of a turn
WARPS = 4
# Results of a multiprocessor in a clock (CUDA C++ Programming Guide, "Throughput of Native Arithmetic
# Instructions"): LOP3, SHF and PRMT; shuffles and loads; all that four schedulers issue. FADD: `fma_lanes`.
LANES = {"alu": 64, "lsu": 32, "all": 128}
WAVEFRONT = 4  # sectors of 32 bytes that L1 delivers in a clock; a shared wavefront takes one


def _bytes_of_codes(plane: int) -> list[str]:
    """Byte `plane` of the 16 codes, in four registers."""
    bits = torch.tensor(NF4_CODE).view(torch.uint8).reshape(16, 4)[:, plane].tolist()
    return [f"0x{int.from_bytes(bytes(bits[i : i + 4]), 'little'):08x}" for i in range(0, 16, 4)]


def _prmt_ptx() -> str:
    """Four bytes in $8, so eight codes, as `decode` orders them, by permutations of bytes alone.

    A PRMT picks four of eight bytes by three bits each: one for the codes below 8, one for those above, and
    one that chooses between their results by the nibbles' highest bits. That for each byte of an fp32 number;
    then these bytes are put together.
    """
    lines = [
        ".reg .b32 s, c, l, h, a, b, %p<4>, %t<4>;",
        "and.b32 s, $8, 0x77777777;",
        "shr.u32 c, $8, 1; and.b32 c, c, 0x44444444; or.b32 c, c, 0x32103210;",
    ]
    for half in range(2):  # nibbles 0..3, then 4..7
        for plane in range(4):
            codes = _bytes_of_codes(plane)
            lines += [f"mov.b32 %t{i}, {code};" for i, code in enumerate(codes)]
            lines.append(f"prmt.b32 l, %t0, %t1, s; prmt.b32 h, %t2, %t3, s; prmt.b32 %p{plane}, l, h, c;")
        for first, selector in ((0, "0x5140"), (2, "0x7362")):
            lines.append(f"prmt.b32 a, %p0, %p1, {selector}; prmt.b32 b, %p2, %p3, {selector};")
            byte = 2 * half + first // 2
            lines.append(f"prmt.b32 ${4 + byte}, a, b, 0x5410; prmt.b32 ${byte}, a, b, 0x7632;")
        lines.append("shr.u32 s, s, 16; shr.u32 c, c, 16;")
    return "{ " + " ".join(lines) + " }"


_PRMT_PTX = tl.constexpr(_prmt_ptx())


@triton.jit
def look_up(packed, table, code_ptr, pair_ptr, VARIANT: tl.constexpr):
    """fp32 codes of the high and the low nibbles of uint8 `packed`."""
    if VARIANT == "shuffle":
        high, low = decode(packed, table, True)
    elif VARIANT == "gather":
        high, low = decode(packed, table, False)
    elif VARIANT == "prmt":
        high, low = tl.inline_asm_elementwise(
            _PRMT_PTX, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [packed],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    elif VARIANT == "table":  # 64 bytes, in L1
        high = tl.load(code_ptr + (packed >> 4).to(tl.int32))
        low = tl.load(code_ptr + (packed & 15).to(tl.int32))
    else:  # both codes of a byte: 2 KiB, in L1
        both = tl.load(pair_ptr + packed.to(tl.int32))
        high = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        low = both.to(tl.int32).to(tl.float32, bitcast=True)
    return high, low


@triton.jit
def sums_of_codes(
    packed_ptr, high_ptr, low_ptr, code_ptr, pair_ptr, n, BYTES: tl.constexpr, VARIANT: tl.constexpr
):  # fmt: skip
    """Sums [BYTES] of the codes of the high and of the low nibbles of packed [n, BYTES]."""
    index = tl.arange(0, BYTES)
    table = code_table(VARIANT == "shuffle")
    high_sum, low_sum = tl.zeros((BYTES,), tl.float32), tl.zeros((BYTES,), tl.float32)
    for i in range(n):
        high, low = look_up(tl.load(packed_ptr + i * BYTES + index), table, code_ptr, pair_ptr, VARIANT)
        high_sum += high
        low_sum += low
    tl.store(high_ptr + index, high_sum)
    tl.store(low_ptr + index, low_sum)


def launch(packed: torch.Tensor, variant: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the codes of uint8 packed [n, BYTES], on the current device."""
    code = torch.tensor(NF4_CODE)
    bits = code.view(torch.int32).to(torch.int64)
    pairs = (bits[:, None] << 32 | bits[None, :] & 0xFFFFFFFF).reshape(256)
    high, low = torch.empty(BYTES), torch.empty(BYTES)
    sums_of_codes[(1,)](
        packed, high, low, code, pairs, packed.shape[0], BYTES, variant,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return high, low


@dataclass(frozen=True)
class Cost:
    """What looking up a code and adding it costs.

    Attributes:
        pipes: instructions that a thread issues for a weight, by pipe and in all ("all").
        shared: wavefronts of shared memory for a warp's 32 weights.
        sectors: of 32 bytes, that loads of a warp's 32 weights touch in L1.
    """

    pipes: dict[str, float]
    shared: float
    sectors: float

    def rate(self, arch: int) -> float:
        """Most weights of a multiprocessor in a clock."""
        lanes = {**LANES, "fma": 64 if arch == 80 else 128}
        clocks = [self.pipes.get(pipe, 0.0) / lanes[pipe] for pipe in lanes]
        memory = (self.shared + self.sectors / WAVEFRONT) / 32
        return 1 / max(*clocks, memory)


def cost(variant: str, arch: int) -> Cost:
    """What a variant costs on an architecture."""
    turns, generator = 4, torch.Generator().manual_seed(0)
    packed = torch.randint(256, (turns, BYTES), dtype=torch.uint8, generator=generator)
    with device(arch, counts=True) as gpu:
        launch(packed, variant)
    (record,) = gpu.launches
    loop, weights = budget(record).loop, 2 * BYTES // (32 * WARPS)
    # Not unrolled: an add for every weight.
    assert loop.opcodes["FADD"] + 2 * loop.opcodes["FADD2"] == weights, loop.opcodes
    total = {"shared": 0, "global": 0}
    for access in record.result.accesses:
        if access.requests >= turns * WARPS:  # in the loop
            total[access.space] += access.transactions
    shared, sectors = (total[space] / (2 * packed.numel() / 32) for space in ("shared", "global"))
    return Cost(loop.per_weight(weights), shared, sectors)


def main() -> None:
    """Print the counts as a table in Markdown."""
    print("| target | variant | instructions | ALU | FMA | LSU | wavefronts | L1 sectors | weights/clk/SM |")
    print("|---|---|---|---|---|---|---|---|---|")
    for arch in ARCHS:
        for variant in VARIANTS:
            found = cost(variant, arch)
            counts = [*(found.pipes.get(pipe, 0.0) for pipe in ("all", "alu", "fma", "lsu"))]
            figures = [*(f"{each:.2f}" for each in (*counts, found.shared, found.sectors))]
            print("| " + " | ".join([f"sm_{arch}", variant, *figures, f"{found.rate(arch):.1f}"]) + " |")


if __name__ == "__main__":
    main()
