"""Suites with a question of their own: `sweep` (sweep.py answers it), `limits` and `methods` (limits.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .case import BASELINES, GPU_BASELINES, NO_DROPOUT, PLAIN_SCALES, Case, Direction
from .cases_adapter import adapter
from .cases_dora import DORA, NORM
from .cases_ia3 import FEEDFORWARD, IA3, SCALE_ONLY
from .cases_linear import NF4, QLORA
from .cases_model import DECODE, TRAIN, model_case

SWEEP_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
_DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

SWEEP = tuple(
    NF4(m, 4096, 4096, direction=direction, dtype=dtype, suites=("sweep",))
    for dtype in ("float32", "bfloat16")
    for direction in _DIRECTIONS
    for m in SWEEP_TOKENS
)

Shapes = tuple[tuple[int, int], ...]  # (K, N)
LIMITS_SHAPES: Shapes = ((4096, 4096), (4096, 11008), (11008, 4096))
LIMITS_THREADS = (1, 2)

Figures = tuple[float | None, float | None]  # at least, reach for; None: there is no such figure
_NONE: Figures = (None, None)


@dataclass(frozen=True)
class Row:
    """One problem on some shapes, and the figures to reach against every baseline.

    Attributes:
        title: of the row.
        problem: the case, with k = n = 0.
        figures: baseline -> how many times as fast ours is to be; against a variant of ours, which share of
            its time ours may take more.
        shapes: of the cases.
        suite: that they are in.
    """

    title: str
    problem: Case
    figures: dict[str, Figures]
    shapes: Shapes = LIMITS_SHAPES
    suite: str = "limits"

    @property
    def cases(self) -> tuple[Case, ...]:
        """The problem on every shape, measured against the baselines that have figures."""
        shared = replace(self.problem, suites=(self.suite,), against=tuple(self.figures))
        return tuple(replace(shared, k=k, n=n) for k, n in self.shapes)


def _forward(m: int, figures: dict[str, Figures], dtype: str = "float32") -> Row:
    shown = {"bitsandbytes-repacked": _NONE}  # other arithmetic: it computes in bfloat16
    return Row(f"forward {dtype} M={m}", NF4(m, 0, 0, dtype=dtype), figures | shown)


def _dx(m: int, figures: Figures) -> Row:
    return Row(f"dx float32 M={m}", NF4(m, 0, 0, direction="backward"), {"bitsandbytes": figures})


def _qlora(m: int, figures: Figures) -> Row:
    against = {"peft": figures, PLAIN_SCALES: (0.05, 0.02)}
    return Row(f"QLoRA forward+backward M={m}", QLORA(m, 0, 0, r=16), against)


def _dropout(m: int) -> Row:
    problem = QLORA(m, 0, 0, r=16, dropout=0.05)
    return Row(f"QLoRA with dropout M={m}", problem, {NO_DROPOUT: (0.03, None)})


LIMITS = (
    _forward(1, {"bitsandbytes": (30, 50), "bitsandbytes-tuned": (15, 25), "dense": (4, 5.5)}),
    _forward(16, {"bitsandbytes": (8, 10), "dense": (2.3, 3)}),
    _forward(64, {"bitsandbytes": (3.5, 4.5), "dense": (1.4, 1.8)}),
    _forward(256, {"bitsandbytes": (1.6, 2), "dense": (1.0, 1.15)}),
    _forward(1024, {"bitsandbytes": (1.2, 1.4), "dense": (0.97, 1.05)}),
    _forward(256, {"bitsandbytes": (4, 4.5), "dense": (3.5, 4)}, "bfloat16"),
    _dx(1, (12, 20)),
    _dx(64, (3.5, 4.5)),
    _dx(512, (1.3, 1.5)),
    _qlora(1, (12, 20)),
    _qlora(64, (3.5, 5)),
    _qlora(512, (2, 2.3)),
    _dropout(1),
    _dropout(64),
    _dropout(512),
)


def _method(title: str, problem: Case, n: int = 4096, **at_least: float) -> Row:
    """A figure for a case of its own shape; baselines by name, with _ for -."""
    figures: dict[str, Figures] = {name.replace("_", "-"): (least, None) for name, least in at_least.items()}
    return Row(title, replace(problem, k=0, n=0), figures, ((problem.k, n),), "methods")


METHODS = (
    _method("dora_norm", NORM(4096, 0, weight="dense"), peft=25, eager=1.3),
    _method("DoRA NF4 forward+backward M=64", DORA(64, 4096, 0, r=16), peft=8),
    _method("DoRA NF4 forward+backward M=512", DORA(512, 4096, 0, r=16), peft=2.7, ours_lora=0.12),
    _method("DoRA dense forward+backward M=512", DORA(512, 4096, 0, r=16, weight="dense"), ours_lora=0.12),
    _method("DoRA NF4 evaluation M=1", DORA(1, 4096, 0, r=16, direction="forward"), ours_lora=0.05),
    _method("DoRA NF4 evaluation M=64", DORA(64, 4096, 0, r=16, direction="forward"), ours_lora=0.05),
    _method("IA3 NF4 outputs forward+backward M=512", IA3("ia3_linear", 512, 4096, 0), peft=2),
    _method("IA3 NF4 inputs forward+backward M=512", IA3(FEEDFORWARD, 512, 4096, 0), peft=2),
    _method(
        "IA3 dense scale alone M=4096",
        IA3(SCALE_ONLY, 4096, 64, 0, weight="dense", direction="backward"),
        eager=2,
    ),
    _method("bottleneck adapter forward M=512", adapter(512, 4096, 64, "forward"), eager=2.5, compile=2.5),
    _method("bottleneck adapter forward+backward M=512", adapter(512, 4096, 64), eager=2, compile=2),
)

ROWS = {"limits": LIMITS, "methods": METHODS}


def figures_against(suite: str) -> tuple[str, ...]:
    """The baselines that a suite has figures for."""
    return tuple(name for name in BASELINES if any(name in row.figures for row in ROWS[suite]))


# Llama 3 8B: K = 4096; attention output, and the gate and up projections.
GPU_TOKENS = (1, 4, 16, 64, 512, 2048)
_GPU_SHAPES: Shapes = ((4096, 4096), (4096, 14336))
GPU_AGAINST = ("eager", "compile", "bitsandbytes", "peft", "adapters", "dense", *GPU_BASELINES)


def _gpu(problem: Case, compiled: bool = False) -> Case:
    """In bf16; torch.compile, which takes seconds a case, where it is asked for."""
    against = tuple(name for name in GPU_AGAINST if compiled or name != "compile")
    return replace(problem, dtype="bfloat16", suites=("gpu",), against=against)


GPU = (
    *(_gpu(Case("nf4", op, 0, 4096, 14336, weight="nf4"), True) for op in ("nf4_quantize", "nf4_dequantize")),
    _gpu(Case("nf4", "nf4_dequantize", 0, 4096, 14336, weight="nf4_double")),
    *(_gpu(NF4(m, k, n), m in (1, 512)) for k, n in _GPU_SHAPES for m in GPU_TOKENS),
    *(_gpu(NF4(m, 4096, 4096, direction="backward")) for m in GPU_TOKENS),
    *(_gpu(QLORA(m, k, n, r=16), m == 512) for k, n in _GPU_SHAPES for m in GPU_TOKENS[3:]),
    _gpu(QLORA(1, 4096, 4096, r=16, direction="forward")),
    _gpu(QLORA(2048, 4096, 4096, r=16, dropout=0.05)),
    _gpu(Case("linear", "lora_linear", 2048, 4096, 4096, r=16, weight="dense", direction="both"), True),
    *(_gpu(NORM(4096, 4096, weight=weight), True) for weight in ("dense", "nf4_double")),
    *(_gpu(DORA(m, 4096, 4096, r=16), m == 512) for m in (512, 2048)),
    *(_gpu(DORA(m, 4096, 4096, r=16, direction="forward")) for m in (1, 64)),
    *(_gpu(IA3(op, m, 4096, 4096), m == 512) for op in ("ia3_linear", FEEDFORWARD) for m in (512, 2048)),
    _gpu(IA3(SCALE_ONLY, 4096, 64, 4096, weight="dense", direction="backward"), True),
    *(_gpu(adapter(m, 4096, 64, "forward"), m == 512) for m in (1, 512)),
    *(_gpu(adapter(m, 4096, 64), m == 512) for m in (512, 2048)),
    *(_gpu(model_case(TRAIN, "llama-3.2-1b:2-layers", m)) for m in (512, 2048)),
    _gpu(model_case(DECODE, "llama-3.2-1b:2-layers")),
    _gpu(Case("dropout", "philox_dropout", 2048, 4096, 0, direction="both", dropout=0.05), True),
)

CASES = (
    *SWEEP,
    *(case for rows in ROWS.values() for row in rows for case in row.cases),
    *GPU,
)
