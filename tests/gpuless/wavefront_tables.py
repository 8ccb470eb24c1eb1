"""The table of memory transactions in docs/gpu.md: what bank conflicts and scattered addresses cost."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from gpuless.driver import Launch, device
from gpuless.launches import build, call
from gpuless.traffic_tables import EXECUTED

ARCHS = (80, 90)
MOST = 1.1  # times the ideal

_SCALES = (
    "absmax lies row by row: a tile takes 4 or 8 bytes of a sector at a time, L1 has the rest for the next"
)
_TRANSPOSED = "Triton's layout of the decoded tile has two-way conflicts in ldmatrix.trans"
_FP32 = "operands of 32 bits (tf32x3), which no ldmatrix transposes"
_FMA = "fp32 operands of 16 ranks, without tensor cores, in the layout that Triton has for them"
_SMALL = "rows of a small operand, shorter than what a warp takes at once; not in a hot loop"
# (kernel, space) -> why there are more. A reason that nothing needs is an error.
REASONS: dict[tuple[str, str], str] = {
    ("row_squares_kernel", "global"): _SCALES,
    ("row_squares_kernel", "shared"): _FMA,
    ("decode_kernel", "global"): _SCALES,
    ("matmul_kernel", "global"): _SCALES,
    ("input_gradient_kernel", "shared"): _TRANSPOSED,
    ("lora_a_gradient_kernel", "shared"): _FP32,
    ("output_gradients_kernel", "shared"): _FP32,
    ("finish_kernel", "global"): _SMALL,
    ("input_gradient_epilogue_kernel", "global"): _SMALL,
    ("up_gradient_kernel", "global"): _SMALL,
}


@dataclass
class Transactions:
    """Of a kernel on an architecture, over all its launches and accesses.

    Attributes:
        ctas: that ran.
        bytes: that threads asked for, by space.
        made: sectors of 32 bytes (global) or wavefronts of 128 bytes (shared).
        ideal: the fewest that hold the same bytes.
    """

    ctas: int
    bytes: dict[str, int]
    made: dict[str, int]
    ideal: dict[str, int]

    def excess(self, space: str) -> float:
        """Transactions over the ideal; 1 where there are none."""
        return self.made[space] / self.ideal[space] if self.ideal[space] else 1.0


Rows = Mapping[str, Mapping[int, Transactions]]


def transactions() -> dict[str, dict[int, Transactions]]:
    """By kernel and architecture, of the problems that the table of bytes is counted on."""
    found: dict[str, dict[int, Transactions]] = defaultdict(dict)
    for arch in ARCHS:
        for case in EXECUTED:
            with device(arch, counts=True) as gpu:
                built = build(case, True)
                if built is not None:
                    gpu.launches.clear()
                    call(built[1], True)
            for launch in gpu.launches:
                _add(found[launch.name].setdefault(arch, _none()), launch)
    return dict(sorted(found.items()))


def _none() -> Transactions:
    return Transactions(0, defaultdict(int), defaultdict(int), defaultdict(int))


def _add(total: Transactions, launch: Launch) -> None:
    x, y, z = launch.grid
    total.ctas += x * y * z
    for access in launch.result.accesses:
        total.bytes[access.space] += access.bytes
        total.made[access.space] += access.transactions
        total.ideal[access.space] += access.ideal


def too_many(rows: Rows, reasons: Mapping[tuple[str, str], str] = REASONS) -> list[str]:
    """What makes more transactions than it should, a sentence each; and reasons that are not needed."""
    worst = {
        (kernel, space): max(each.excess(space) for each in by_arch.values())
        for kernel, by_arch in rows.items()
        for space in ("global", "shared")
    }
    more = {key: excess for key, excess in worst.items() if excess > MOST}
    sentences = [
        f"{kernel} makes {excess:.2f} times the fewest {space} transactions: no reason is given"
        for (kernel, space), excess in more.items()
        if (kernel, space) not in reasons
    ]
    unused = sorted(set(reasons) - set(more))
    return sentences + [f"wavefront_tables.REASONS[{key}] is not needed: take it out" for key in unused]


def table(rows: Rows) -> str:
    """Markdown: a row a kernel."""
    archs = [f"{space}, sm_{arch}" for space in ("sectors", "wavefronts") for arch in ARCHS]
    lines = [
        f"| kernel | global bytes of a CTA | shared bytes of a CTA | {' | '.join(archs)} |",
        "|---" * (3 + len(archs)) + "|",
    ]
    why = list(dict.fromkeys(REASONS.values()))
    for kernel, by_arch in rows.items():
        first = next(iter(by_arch.values()))
        cells = [f"{first.bytes[space] / first.ctas:,.0f}" for space in ("global", "shared")]
        for space in ("global", "shared"):
            for arch in ARCHS:
                excess = by_arch[arch].excess(space) if arch in by_arch else None
                note = f" ({why.index(REASONS[kernel, space]) + 1})" if (kernel, space) in REASONS else ""
                cells.append("–" if excess is None else f"{excess:.2f}{note if excess > MOST else ''}")
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"({i}) {reason}." for i, reason in enumerate(why, 1))])
