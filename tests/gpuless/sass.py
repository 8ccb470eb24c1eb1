"""Machine code: its instructions, its loops, and what a turn of the hottest loop issues to which pipe.

For NVIDIA's SASS, as nvdisasm of the Triton wheel prints a cubin, and for AMD's assembly, as Triton keeps it.
"""

import functools
import importlib.resources
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SASS = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
)
_SASS_LABEL, _SASS_TARGET = re.compile(r"^(\.L_\w+):"), re.compile(r"`\((\.L_\w+)\)")
_SASS_FUNCTION = re.compile(r"^\.text\.(\S+):")
_AMD = re.compile(r"^\s+(?P<predicate>)(?P<opcode>[a-z]+_[a-z0-9_]+)(?P<operands>[^;]*)")
_AMD_LABEL, _AMD_TARGET = re.compile(r"^(\.LBB\w+):"), re.compile(r"(\.LBB\w+)")

# Pipe to opcodes, up to their first dot. NVIDIA publishes opcodes (CUDA Binary Utilities, "Instruction Set
# Reference") and, of pipes, the programming guide's throughput table. What is not here counts as "other".
PIPES = {
    "tensor": "HMMA IMMA QMMA OMMA BMMA DMMA HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCIMMA UTCQMMA UTCOMMA",
    "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FSWZADD IMAD IDP HFMA2 HADD2 HMUL2",
    "alu": "LOP3 LOP PRMT SHF SHL SHR SEL IADD3 IADD VIADD ISETP LEA FSETP FSEL FSET IMNMX IMNMX3 VIMNMX "
    "VIMNMX3 VIADDMNMX FMNMX FMNMX3 PLOP3 P2R R2P SGXT BMSK MOV CS2R IABS HSETP2 HSET2 HMNMX2 VHMNMX VOTE "
    "F2FP I2FP F2IP ISCADD FCHK",
    "xu": "MUFU F2F F2I I2F FRND POPC FLO BREV",
    "lsu": "LDG STG LD ST LDGSTS ATOM ATOMG RED REDG LDS STS LDSM STSM ATOMS SHFL REDUX MATCH LDL STL LDTM "
    "STTM",
    "uniform": "ULOP3 UIADD3 UIADD UIMAD ULEA USHF USEL UMOV UISETP UPRMT USGXT UBMSK UFLO UPOPC UPLOP3 "
    "UP2UR UR2UP R2UR S2UR VOTEU LDC ULDC LDCU UF2FP UI2FP UFMUL UFADD UFFMA UFSETP",
    "control": "BRA BRX JMP JMX BSSY BSYNC BREAK BAR WARPSYNC EXIT CALL RET DEPBAR LDGDEPBAR SYNCS WARPGROUP "
    "NOP YIELD ERRBAR MEMBAR CCTL FENCE UCGABAR_ARV UCGABAR_WAIT ELECT NANOSLEEP S2R WARPGROUPSET UTCBAR "
    "UTCATOMSWS UVIRTCOUNT BPT",
}
_BRANCHES = ("BRA", "CALL", "s_branch", "s_cbranch")
_ENDS = ("BRA", "EXIT", "RET", "s_branch", "s_endpgm", "s_setpc")
_PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}
_AMD_PIPES = (  # by prefix, the first that fits
    *((prefix, "tensor") for prefix in ("v_mfma_", "v_wmma_", "v_smfmac_")),
    *((prefix, "lsu") for prefix in ("ds_", "global_", "buffer_", "flat_", "scratch_")),
    ("s_load", "uniform"),
    *(
        (prefix, "control")
        for prefix in ("s_branch", "s_cbranch", "s_waitcnt", "s_barrier", "s_nop", "s_endpgm")
    ),
    ("s_", "uniform"),
    ("v_", "alu"),
)


@dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
        opcode: with its modifiers.
        jump: index of the instruction that a branch goes to.
        ends: the next instruction does not follow: a return, or a branch that is always taken.
    """

    opcode: str
    jump: int | None = None
    ends: bool = False

    @property
    def pipe(self) -> str:
        """Which unit executes it."""
        if self.opcode[0].islower():
            return next((pipe for prefix, pipe in _AMD_PIPES if self.opcode.startswith(prefix)), "other")
        return _PIPE_OF.get(self.opcode.split(".")[0], "other")


@dataclass(frozen=True)
class Mix:
    """Instructions of one turn of a loop, by pipe and by opcode without modifiers, of one warp.

    `in_loop` is False for a kernel without a loop: the counts are those of the whole kernel.
    """

    pipes: Counter[str]
    opcodes: Counter[str]
    in_loop: bool

    @property
    def instructions(self) -> int:
        """All of them."""
        return self.pipes.total()

    @property
    def tensor(self) -> int:
        """Tensor-core instructions."""
        return self.pipes["tensor"]

    def per_weight(self, weights: int) -> dict[str, float]:
        """Instructions that a thread issues for a weight, by pipe and in all.

        Args:
            weights: that one thread decodes in a turn: those of the CTA over its number of threads.
        """
        return {pipe: count / weights for pipe, count in (*self.pipes.items(), ("all", self.instructions))}


def tool(name: str) -> Path:
    """One of NVIDIA's binary tools in the Triton wheel.

    Raises:
        FileNotFoundError: this Triton has none.
    """
    path = Path(str(importlib.resources.files("triton"))) / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{name} must be in the Triton wheel, at {path}: install triton for Linux")
    return path


@functools.lru_cache(maxsize=256)
def disassemble(cubin: bytes) -> dict[str, tuple[Instruction, ...]]:
    """Instructions of every kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("nvdisasm"), "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _SASS_FUNCTION.match(line):
            lines = functions.setdefault(match[1], [])
        lines.append(line)
    return {name: _parse(lines, _SASS, _SASS_LABEL, _SASS_TARGET) for name, lines in functions.items()}


def parse_amdgcn(assembly: str) -> tuple[Instruction, ...]:
    """Instructions of the kernel in AMD assembly."""
    code = assembly.split(".section\t.AMDGPU.csdata")[0].split(".amdhsa_kernel")[0]
    return _parse(code.splitlines(), _AMD, _AMD_LABEL, _AMD_TARGET)


def _parse(
    lines: Sequence[str], pattern: re.Pattern[str], label: re.Pattern[str], target: re.Pattern[str]
) -> tuple[Instruction, ...]:
    labels: dict[str, int] = {}
    found: list[tuple[str, str | None, bool]] = []
    for line in lines:
        if start := label.match(line):
            labels[start[1]] = len(found)
        elif match := pattern.match(line):
            opcode, operands = match["opcode"], match["operands"].strip()
            goes_to = target.search(operands) if opcode.startswith(_BRANCHES) else None
            always = goes_to is None or goes_to.start() == 0  # no predicate among the operands
            ends = opcode.startswith(_ENDS) and not match["predicate"] and always
            found.append((opcode, goes_to[1] if goes_to else None, ends))
    return tuple(Instruction(opcode, labels.get(to) if to else None, ends) for opcode, to, ends in found)


def loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """The natural loops, as the indices of their instructions, by the place of their first one.

    A loop is what gets back to its header, an instruction through which every way into it leads (Aho, Lam,
    Sethi, Ullman, Compilers, 2nd ed., section 9.6).
    """
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for i, each in enumerate(code):
        following = i + 1 if not each.ends and i + 1 < len(code) else None
        for j in {following, each.jump} - {None}:
            after[i].append(j)
            before[j].append(i)
    alive = _reached([0], after)
    found = []
    for header in sorted({each.jump for each in code if each.jump is not None} & alive):
        only_through_it = alive - _reached([0], after, without=header)
        if tails := [i for i in before[header] if i in only_through_it]:
            found.append(frozenset(_reached(tails, before, without=header) | {header}))
    return found


def hot_loop(code: Sequence[Instruction]) -> frozenset[int] | None:
    """The loop that a product spends its time in; None for code without one.

    The smallest loop with at least half of the tensor instructions that any loop has; where none has any, the
    longest of the loops without a loop inside.
    """
    found = loops(code)
    tensor = {loop: sum(code[i].pipe == "tensor" for i in loop) for loop in found}
    if most := max(tensor.values(), default=0):
        return min((loop for loop in found if 2 * tensor[loop] >= most), key=len)
    return max((loop for loop in found if not any(other < loop for other in found)), key=len, default=None)


def mix(code: Sequence[Instruction]) -> Mix:
    """What the hot loop, or a kernel without loops, issues."""
    loop = hot_loop(code)
    body = code if loop is None else [code[i] for i in sorted(loop)]
    return Mix(
        Counter(each.pipe for each in body),
        Counter(each.opcode.split(".")[0] for each in body),
        loop is not None,
    )


def _reached(starts: Sequence[int], edges: Sequence[Sequence[int]], without: int | None = None) -> set[int]:
    """All that can be reached from `starts`, on ways that do not touch `without`."""
    seen: set[int] = set()
    waiting = [start for start in starts if start != without]
    while waiting:
        i = waiting.pop()
        if i not in seen:
            seen.add(i)
            waiting += [j for j in edges[i] if j != without]
    return seen
