"""The tables of bytes in docs/gpu.md: counted on small problems, predicted for those of production."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft_kernels.bench.case import Case
from peft_kernels.bench.cases_adapter import adapter
from peft_kernels.bench.cases_dora import DORA, NORM
from peft_kernels.bench.cases_ia3 import FEEDFORWARD, IA3, SCALE_ONLY
from peft_kernels.bench.cases_linear import NF4, QLORA

from gpuless.launches import cases
from gpuless.traffic import ACCELERATORS, Step, Traffic, bitsandbytes, eager, ours, seconds, untouched

MOST = 1.1  # times the fewest bytes

_DENSE_LORA = Case("linear", "lora_linear", 512, 512, 512, r=16, weight="dense", direction="both")
EXECUTED = tuple(
    replace(case, dtype="bfloat16")
    for case in (
        Case("nf4", "nf4_quantize", 0, 1024, 256, weight="nf4"),
        *(Case("nf4", "nf4_dequantize", 0, 1024, 256, weight=weight) for weight in ("nf4", "nf4_double")),
        *(NF4(m, 1024, 256) for m in (1, 4, 16, 64, 512)),
        *(NF4(m, 256, 1024, direction="backward") for m in (1, 16, 64, 512)),
        QLORA(1, 1024, 512, r=16, direction="forward"),
        *(QLORA(m, 512, 512, r=16) for m in (64, 512)),
        _DENSE_LORA,
        *(NORM(1024, 256, weight=weight) for weight in ("dense", "nf4_double")),
        DORA(64, 512, 512, r=16),
        *(IA3(op, 512, 512, 512) for op in ("ia3_linear", FEEDFORWARD)),
        IA3(SCALE_ONLY, 256, 64, 512, weight="dense", direction="backward"),
        adapter(128, 512, 64, "forward"),
        adapter(128, 512, 64),
        Case("dropout", "philox_dropout", 128, 512, 0, direction="both", dropout=0.05),
    )
)

_TWICE = "the base product reads x, or dy, after the low-rank products have: from L2 where it holds them"
# (op, direction) -> why more bytes are moved. A reason that nothing needs is an error.
MORE_BYTES: dict[tuple[str, str], str] = {
    ("nf4_lora_linear", "both"): _TWICE,
    ("lora_linear", "both"): _TWICE,
    ("dora_linear", "both"): f"the norms read the weight before the product does, and {_TWICE}",
    ("ia3_linear", "both"): "dl and dx both read dy: the sum over it, then the product with the weight",
    ("bottleneck_adapter", "forward"): "hidden is read by the down product, then as the residual: from L2",
    (
        "bottleneck_adapter",
        "both",
    ): "hidden and dy are read by the products with r units, then again: from L2",
}

Rows = Mapping[Case, Traffic | None]


def executed_traffic() -> dict[Case, Traffic | None]:
    """Traffic of ours, counted by the emulator; None where an op has no kernel."""
    return {case: ours(case, execute=True) for case in EXECUTED}


def too_many_bytes(rows: Rows, reasons: Mapping[tuple[str, str], str] = MORE_BYTES) -> list[str]:
    """What moves more than it should, a sentence each; and reasons that are not needed."""
    found = {case: traffic for case, traffic in rows.items() if traffic is not None}
    more = {case: traffic for case, traffic in found.items() if traffic.ratio > MOST}
    sentences = [
        f"{case.name} moves {traffic.ratio:.2f} times the fewest bytes: no reason is given"
        for case, traffic in more.items()
        if (case.op, case.direction) not in reasons
    ]
    run, needed = ({(case.op, case.direction) for case in some} for some in (found, more))
    unused = sorted((run & set(reasons)) - needed)
    return sentences + [f"MORE_BYTES[{key}] is not needed: take it out" for key in unused]


def bytes_table(rows: Rows) -> str:
    """Markdown: a row a problem that was run."""
    lines = ["| problem | fewest | ours | scratch | eager | bitsandbytes |", "|---|---|---|---|---|---|"]
    for case, found in rows.items():
        if found is not None:
            more = " ¹" if found.ratio > MOST else ""
            cells = (
                f"{found.least / 1024:.0f} KiB",
                f"{found.ratio:.2f}{more}",
                f"{found.scratch / found.least:.2f}",
                _times(eager(case), found.least),
                _times(bitsandbytes(case), found.least),
            )
            lines.append(f"| `{case.name}` | " + " | ".join(cells) + " |")
    ops: dict[str, list[str]] = {}
    for (op, _), why in MORE_BYTES.items():
        ops.setdefault(why, []).append(f"`{op}`")
    reasons = "; ".join(f"{', '.join(names)}: {why}" for why, names in ops.items())
    return "\n".join([*lines, "", f"¹ {reasons}."])


def predicted_table(rows: Rows) -> str:
    """Markdown: a row a production problem, predicted speed-ups over eager PyTorch and over bitsandbytes.

    Args:
        rows: problems that were run: they tell what kernels touch of what they are given.
    """
    rare = untouched(rows.values())
    gpus = " | ".join(gpu.name for gpu in ACCELERATORS)
    lines = [
        f"| problem | fewest | ours | eager | bitsandbytes | {gpus} |",
        "|---" * (5 + len(ACCELERATORS)) + "|",
    ]
    for case in cases():
        by_arch = {arch: ours(case, False, arch, rare) for arch in {gpu.arch for gpu in ACCELERATORS}}
        found = by_arch[ACCELERATORS[0].arch]
        if found is None:
            continue
        plain, theirs = eager(case), bitsandbytes(case)
        speedups = []
        for gpu in ACCELERATORS:
            mine = by_arch[gpu.arch]
            assert mine is not None
            speedups.append(
                " / ".join(
                    "–" if steps is None else f"{seconds(steps, gpu) / seconds(mine.steps, gpu):.1f}"
                    for steps in (plain, theirs)
                )
            )
        fewest = f"{found.least / 1e6:.1f} MB"
        moved = (f"{found.ratio:.2f}", _times(plain, found.least), _times(theirs, found.least))
        lines.append(f"| `{case.name}` | {fewest} | " + " | ".join((*moved, *speedups)) + " |")
    return "\n".join(lines)


def _times(steps: Sequence[Step] | None, least: int) -> str:
    return "–" if steps is None else f"{sum(step.bytes for step in steps) / least:.2f}"
