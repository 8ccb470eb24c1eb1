"""`python -m gpuless.cuda_tables`: what the CUDA C++ kernels take of every GPU, as the tables of docs/gpu.md.

    python -m gpuless.cuda_tables            # assemble everything, print, rewrite docs/gpu.md
    python -m gpuless.cuda_tables --check    # the same without writing: docs/gpu.md must say it already

Kernels are those that the launchers choose for production shapes, assembled as they ship; bitsandbytes'
come from its own wheel, and the same disassembler reads both. It fails where a rule is broken: no spill, no
stack, two CTAs on a multiprocessor, instructions and load/store cycles a weight, bytes within 1.05 times the
fewest, or a reason in `REASONS`.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import torch

import peft_kernels as pk
from gpuless import sass, toolchain
from gpuless.cuda import CudaLaunch, cuda, demangled
from gpuless.static import Budget, cubin_budget
from gpuless.tables import FEWEST_CTAS, conclude, target_name

TARGETS = (80, 86, 89, 90, 100, 120)
EMULATED = {100: 90}  # whose launches stand for those of an architecture that is not emulated
MOST_BYTES = 1.05
# (kernel, tokens of its tile, limit) -> why it is not met. A reason that nothing needs is an error.
_FP32, _GRADIENT, _CYCLES = "linear_gemv_fp32_kernel", "input_gradient_kernel", "load/store cycles"
REASONS = {
    (_FP32, 1, "instructions"): "an FFMA a token and weight, and nothing that shares it",
    (_FP32, 1, _CYCLES): "x has 4 bytes, and is read for every 4 outputs",
    (_GRADIENT, 16, "instructions"): "nested scales of the four rows that a lane has; met from sm_90 on",
    (_GRADIENT, 64, "instructions"): "nested scales of the four rows that a lane has",
    (_GRADIENT, 64, _CYCLES): "dz for half of the columns at a time: more would not fit into registers",
    **{
        (_GRADIENT, tokens, "CTAs"): "8 warps, as many as two CTAs of the forward have"
        for tokens in (8, 16, 32, 64)
    },
    ("dz W", 0, "bytes"): "parts of a split sum, written and read: in L2",
}
# Tokens of a kernel's tile -> most instructions, and load/store cycles, for a weight that it decodes.
LIMITS = {1: (4.0, 7.0), 8: (4.2, 7.0), 16: (4.2, 7.0), 32: (5.3, 7.0), 64: (5.3, 7.0)}
# bitsandbytes' kernels for bf16; each looks a code up by one shuffle.
THEIRS = {
    "gemm_4bit_simt<__nv_bfloat16, 1>": "1",
    "gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 32, 64, 128>": "up to 32",
    "gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 64, 64, 128>": "up to 64",
}
OPS = torch.ops.peft_kernels
THEIR_LIBRARY = Path(bitsandbytes.__file__).with_name("libbitsandbytes_cuda130.so")


@dataclass(frozen=True)
class Problem:
    """A product of M tokens with an NF4 weight [N, K], plain or nested absmax."""

    tokens: int
    in_features: int = 4096
    out_features: int = 4096
    nested: bool = False
    backward: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def what(self) -> str:
        """The product."""
        return "dz W" if self.backward else "x W^T"

    def launches(self, arch: int, execute: bool = False) -> list[CudaLaunch]:
        """What is launched for it; without `execute` nothing runs."""
        m, k, n = self.tokens, self.in_features, self.out_features
        weight = pk.functional.nf4_quantize(torch.randn(n, k), 64, double_quant=self.nested)
        base = weight.base_weight()
        x = torch.randn(m, n if self.backward else k, dtype=self.dtype)
        with cuda(arch, execute=execute, counts=execute) as gpu:
            if self.backward:
                OPS.nf4_linear_backward_input.cuda(x, *base, k, None, None, None, None, 0.0, None)
            else:
                OPS.adapted_linear.cuda(x, *base, n, None, None, 1.0, None, None, None, 0.0, None, False)
        return gpu.launches


PROBLEMS = tuple(
    Problem(tokens, out_features=14336 if tokens == 64 else 4096, nested=nested, backward=backward)
    for backward in (False, True)
    for tokens in (1, 8, 16, 32, 64)
    for nested in (False, True)
) + tuple(
    Problem(tokens, nested=nested, dtype=torch.float32) for tokens in (1, 4) for nested in (False, True)
)


@dataclass(frozen=True)
class Cost:
    """What a lane issues for a weight that it decodes, in the hot loop.

    Attributes:
        instructions: all of them.
        alu, fma, tensor: by pipe.
        lsu: cycles of the multiprocessor's load/store unit, which its four partitions share: times four. A
            shuffle or a 4-byte load takes one, wider ones two and four (ldmatrix: one a matrix); our 16-byte
            loads of codes touch 8 lines with half of each, which counts as eight.
    """

    instructions: float
    alu: float
    fma: float
    tensor: float
    lsu: float

    @classmethod
    def of(cls, body: Sequence[sass.Instruction], weights: float, wide_load: int) -> "Cost":
        """Of a turn in which a lane decodes so many weights."""
        pipes = [each.pipe for each in body]
        cycles = sum(_cycles(each.opcode, wide_load) for each in body)
        return cls(
            sum(not each.opcode.startswith("NOP") for each in body) / weights,
            *(pipes.count(pipe) / weights for pipe in ("alu", "fma", "tensor")),
            4 * cycles / weights,
        )

    def __str__(self) -> str:
        return " | ".join(f"{v:.2f}" for v in (self.instructions, self.alu, self.fma, self.tensor, self.lsu))


def _cycles(opcode: str, wide_load: int) -> int:
    kind, *modifiers = opcode.split(".")
    if kind == "LDSM":
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if kind not in ("LDS", "STS", "LDG", "STG", "LDGSTS", "SHFL"):
        return 0
    wide = "128" in modifiers
    if kind == "LDG" and wide:
        return wide_load
    return 4 if wide else 2 if "64" in modifiers else 1


def hot_body(code: Sequence[sass.Instruction]) -> list[sass.Instruction]:
    """Instructions of the hot loop, without the blocks in which a part of a warp calls a shuffle."""
    loop = sass.hot_loop(code) or frozenset()
    starts = {each.jump for each in code} | {i + 1 for i, each in enumerate(code) if each.jump is not None}
    blocks: list[list[sass.Instruction]] = [[]]
    for i in sorted(loop):
        if i in starts:
            blocks.append([])
        blocks[-1].append(code[i])

    def cold(block: list[sass.Instruction]) -> bool:
        calls = any(each.opcode.startswith("CALL.ABS") for each in block)
        return calls or bool(block and block[0].opcode.startswith("BRA.CONV"))

    return [each for block in blocks if not cold(block) for each in block]


def our_cost(code: Sequence[sass.Instruction], tokens: int) -> Cost:
    """Of a kernel whose tile has so many tokens: each HMMA has 8 weights of a lane, for 8 tokens.

    In fp32 each look-up in the table of pairs has two.
    """
    body = hot_body(code)
    products = sum(each.opcode.startswith("HMMA.16816") for each in body)
    pairs = sum(each.opcode.startswith("LDS.64") for each in body)
    weights = 8 * products / max(1, tokens // 8) if products else 2 * pairs
    return Cost.of(body, weights, wide_load=8)


def their_costs() -> dict[str, Cost]:
    """bitsandbytes' kernels, from the wheel that is installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sass.tool("cuobjdump"), "-xelf", "sm_80", str(THEIR_LIBRARY)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        (cubin,) = Path(folder).iterdir()
        functions = sass.disassemble(cubin.read_bytes())
    costs = {}
    for mangled, code in functions.items():
        if "gemm_4bit" in mangled and (name := demangled(mangled)) in THEIRS:
            body = hot_body(code)
            shuffles = sum(each.opcode.startswith("SHFL") for each in body)
            costs[name] = Cost.of(body, shuffles, wide_load=4)
    return costs


@dataclass(frozen=True)
class Shipped:
    """A kernel that a launcher chose, assembled for one architecture; `tokens` are those of its tile."""

    name: str
    target: int
    tokens: int
    budget: Budget
    cost: Cost | None


def tile_tokens(name: str) -> int:
    """Tokens of a kernel's tile; a GEMV's are one, though there is room for 8."""
    tile = re.search(r"Tile<(\d+)|input_gradient_kernel<\w+, (\d+)", name)
    return int(tile[1] or tile[2]) if tile else 1


def shipped(target: int) -> Iterator[Shipped]:
    """Every kernel that is launched for the problems, and those of the codec, of u and of norms, once."""
    sources, seen, arch = toolchain.Sources.of_the_project(), set(), EMULATED.get(target, target)
    launches = [launch for problem in PROBLEMS for launch in problem.launches(arch)]
    for launch in (*launches, *other_launches(arch)):
        if launch.name not in seen:
            seen.add(launch.name)
            cubin = toolchain.cubin(toolchain.source_of(launch.name, sources), target)
            needs = {"threads": launch.block[0], "dynamic_shared": launch.shared, "kernel": launch.name}
            tokens, cost = tile_tokens(launch.shown), None
            if launch.shown.startswith(("linear_", "input_gradient_kernel")):
                cost = our_cost(sass.disassemble(cubin)[launch.name], tokens)
            yield Shipped(launch.shown, target, tokens, cubin_budget(cubin, target, **needs), cost)


def other_launches(arch: int) -> list[CudaLaunch]:
    """bf16 beside fp32 adapters, r = 16, 4096 inputs and outputs, one token and 64."""
    n = k = 4096
    weight = torch.empty(n, k, dtype=torch.bfloat16)
    bases = [
        pk.functional.nf4_quantize(torch.randn(n, k), 64, double_quant=d).base_weight() for d in (False, True)
    ]
    a, b = torch.empty(16, k), torch.empty(n, 16)
    with cuda(arch, execute=False) as gpu:
        OPS.nf4_quantize.cuda(weight, 64)
        OPS.dora_norm.cuda(weight, *(None,) * 4, 0, 0, n, a, b, 1.0)
        for base in bases:
            OPS.nf4_dequantize.cuda(*base, (n, k), torch.bfloat16)
            OPS.dora_norm.cuda(*base, n, a, b, 1.0)
        for tokens in (1, 64):
            x = torch.empty(tokens, k, dtype=torch.bfloat16)
            OPS.adapted_linear.cuda(x, *bases[0], n, a, b, 1.0, None, None, None, 0.0, None, False)
    return gpu.launches


def budget_table(found: Sequence[Shipped]) -> str:
    """Markdown: a row a kernel, a column a target."""
    cells: dict[str, dict[int, str]] = {}
    for each in found:
        b = each.budget
        fits = f"{b.occupancy.ctas} ({b.occupancy.share:.0%})"
        cells.setdefault(each.name, {})[each.target] = (
            f"{b.registers} · {b.shared_bytes / 1024:.3g} · {fits}"
            + ("" if b.in_registers else f" · **stack {b.stack_bytes} B**")
        )
    lines = [
        "| kernel | " + " | ".join(map(target_name, TARGETS)) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    for name, of_target in cells.items():
        lines.append(f"| `{name}` | " + " | ".join(of_target.get(t, "–") for t in TARGETS) + " |")
    return "\n".join(lines)


def cost_table(
    found: Sequence[Shipped], theirs: dict[str, Cost], targets: Sequence[int] = (80, 90, 120)
) -> str:
    """Markdown: a row a kernel and target."""
    lines = [
        "| kernel | target | instructions | ALU | FMA | tensor | LSU cycles |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{each.name}` | {target_name(each.target)} | {each.cost} |"
        for each in sorted(found, key=lambda each: (each.name, each.target))
        if each.target in targets and each.cost
    ]
    lines += [f"| bitsandbytes `{name}` | sm_80 | {theirs[name]} |" for name in THEIRS]
    return "\n".join(lines)


MEASURED = tuple(
    Problem(tokens, 4096, out_features, nested, backward)
    for backward in (False, True)
    for tokens, nested, out_features in (
        (1, False, 4096),
        (1, True, 4096),
        (8, True, 4096),
        (64, False, 1024),
    )
)


@dataclass(frozen=True)
class Moved:
    """Distinct bytes that a product's launches touch, and the fewest that it needs."""

    problem: Problem
    arch: int
    bytes: int
    fewest: int

    @property
    def ratio(self) -> float:
        """One is ideal."""
        return self.bytes / self.fewest


def moved(problem: Problem, arch: int) -> Moved:
    """Runs it: every launch reads and writes its arguments once, whatever the caches do."""
    results = [launch.result for launch in problem.launches(arch, execute=True)]
    touched = sum(sum(r.bytes_read.values()) + sum(r.bytes_written.values()) for r in results if r)
    m, k, n = problem.tokens, problem.in_features, problem.out_features
    blocks = n * k // 64
    absmax = blocks + 4 * (-(-blocks // 256)) + 4 * 256 + 4 if problem.nested else 4 * blocks
    return Moved(problem, arch, touched, n * k // 2 + absmax + 2 * m * (n + k))


def bytes_table(found: Sequence[Moved]) -> str:
    """Markdown: a row a problem."""
    lines = ["| product | tokens | N | absmax | fewest | moved |", "|---|---|---|---|---|---|"]
    for each in found:
        p = each.problem
        kind = "nested" if p.nested else "fp32"
        fewest = f"{each.fewest / 1e6:.1f} MB"
        lines.append(f"| {p.what} | {p.tokens} | {p.out_features} | {kind} | {fewest} | {each.ratio:.3f} |")
    return "\n".join(lines)


def faults(found: Sequence[Shipped], bytes_moved: Sequence[Moved]) -> list[str]:
    """What breaks the rules, a sentence each; and reasons that are not needed."""
    broken: list[tuple[tuple[str, int, str], str]] = []
    for each in found:
        kernel, where = each.name.partition("<")[0], f"{each.name} on {target_name(each.target)}"

        def note(limit: str, sentence: str, kernel: str = kernel, tokens: int = each.tokens) -> None:
            broken.append(((kernel, tokens, limit), sentence))

        if not each.budget.in_registers:
            note("stack", f"{where} has a stack of {each.budget.stack_bytes} bytes")
        if each.budget.occupancy.ctas < FEWEST_CTAS:
            note("CTAs", f"{where} has {each.budget.occupancy.ctas} CTAs a multiprocessor")
        if each.cost:
            instructions, cycles = LIMITS[each.tokens]
            if each.cost.instructions > instructions:
                note("instructions", f"{where} has {each.cost.instructions:.2f} instructions a weight")
            if each.cost.lsu > cycles:
                note("load/store cycles", f"{where} has {each.cost.lsu:.2f} load/store cycles a weight")
    for each in bytes_moved:
        if each.ratio > MOST_BYTES:
            broken.append(
                ((each.problem.what, 0, "bytes"), f"{each.problem} moves {each.ratio:.3f} times the bytes")
            )
    used = {key for key, _ in broken}
    return [sentence for key, sentence in broken if key not in REASONS] + [
        f"REASONS[{key}] is not needed: take it out" for key in REASONS if key not in used
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gpuless.cuda_tables", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare docs/gpu.md instead")
    options = parser.parse_args(arguments)
    found = [each for target in TARGETS for each in shipped(target)]
    traffic = [moved(problem, 90) for problem in MEASURED]
    wrong = faults(found, traffic)
    contents = {
        "cuda budgets": budget_table(found),
        "cuda costs": cost_table(found, their_costs()),
        "cuda bytes": bytes_table(traffic),
    }
    return conclude(contents, wrong, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
