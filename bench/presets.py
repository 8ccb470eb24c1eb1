"""The layers of real models as benchmark cases: `--preset llama-3.1-8b --tp 1,4 --tokens 1,64`.

Sizes are those of the models' published configurations (config.json: hidden_size, intermediate_size,
num_attention_heads, num_key_value_heads, head_dim).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from .case import Case, Direction
from .cases_adapter import adapter
from .cases_dora import DORA, NORM
from .cases_dropout import DROPOUT
from .cases_ia3 import FEEDFORWARD, IA3
from .cases_linear import LORA, NF4, QLORA
from .cases_nf4 import BLOCKSIZE

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "both")
DTYPES = ("float32", "bfloat16", "float16")
_BOTTLENECK = 16  # hidden features over those of a bottleneck adapter, AdapterHub's default


@dataclass(frozen=True)
class Model:
    """Sizes of a model's layers, in features.

    Attributes:
        name: as `--preset` takes it.
        hidden: of the residual stream.
        query: heads x head_dim.
        key_value: key-value heads x head_dim.
        head: head_dim, below which keys and values are not split but copied.
        feedforward: between up (and gate) and down.
        gated: whether there is a gate projection.
    """

    name: str
    hidden: int
    query: int
    key_value: int
    head: int
    feedforward: int
    gated: bool = True

    def layers(self, split: int = 1) -> dict[str, tuple[int, int]]:
        """Projection -> (K, N) on one of `split` tensor-parallel devices, as Megatron-LM splits them.

        q, k, v, gate and up are split by outputs, o and down by inputs. Keys and values of fewer heads than
        devices are copied.

        Raises:
            ValueError: the model cannot be split so.
        """
        of_heads = math.lcm(self.head, BLOCKSIZE)  # a head stays on one device
        for size, what, unit in (
            (self.query, "query", of_heads),
            (self.feedforward, "feed-forward", BLOCKSIZE),
        ):
            if size % split or size // split % unit:
                raise ValueError(
                    f"tp must split the {size} {what} features of {self.name} into multiples of "
                    f"{unit}, got {split}"
                )
        query, feedforward = self.query // split, self.feedforward // split
        key_value = max(self.key_value // split, self.head)
        layers = {
            "q": (self.hidden, query),
            "k": (self.hidden, key_value),
            "v": (self.hidden, key_value),
            "o": (query, self.hidden),
            "gate": (self.hidden, feedforward),
            "up": (self.hidden, feedforward),
            "down": (feedforward, self.hidden),
        }
        return layers if self.gated else {name: size for name, size in layers.items() if name != "gate"}


MODELS = {
    model.name: model
    for model in (
        Model("minilm", 384, 384, 384, 32, 1536, gated=False),
        Model("llama-3.2-1b", 2048, 32 * 64, 8 * 64, 64, 8192),
        Model("llama-3.1-8b", 4096, 32 * 128, 8 * 128, 128, 14336),
        Model("llama-3.1-70b", 8192, 64 * 128, 8 * 128, 128, 28672),
        Model("qwen3-0.6b", 1024, 16 * 128, 8 * 128, 128, 3072),
        Model("qwen3-8b", 4096, 32 * 128, 8 * 128, 128, 12288),
    )
}


@dataclass(frozen=True)
class Grid:
    """What is varied over the layers of a model."""

    tokens: Sequence[int]
    dtypes: Sequence[str]
    directions: Sequence[Direction]
    ranks: Sequence[int]
    splits: Sequence[int] = (1,)


QUICK = Grid((1, 64), ("float32",), DIRECTIONS, (16,))
FULL = Grid((1, 16, 64, 512, 2048), ("float32", "bfloat16"), DIRECTIONS, (16,))
PRESET_SUITES = {"quick": QUICK, "full": FULL}


def preset_cases(names: Sequence[str], grid: Grid, suite: str) -> list[Case]:
    """Every family's cases of some models: one for each shape, which projections of equal shape share.

    Raises:
        ValueError: a model is not known, or cannot be split as asked.
    """
    unknown = sorted(set(names) - set(MODELS))
    if unknown:
        raise ValueError(f"preset must be one of {', '.join(MODELS)}, got {', '.join(unknown)}")
    cases: list[Case] = []
    for name, split in itertools.product(names, grid.splits):
        shapes: dict[tuple[int, int], list[str]] = {}
        for projection, shape in MODELS[name].layers(split).items():
            shapes.setdefault(shape, []).append(projection)
        model = name if split == 1 else f"{name}-tp{split}"
        for (k, n), projections in shapes.items():
            label = f"{model}:{','.join(projections)}"
            of_layer = _of_layer(k, n, projections, grid)
            cases += [replace(case, label=label, suites=(suite,)) for case in of_layer]
        if split == 1:  # adapters and dropout are on the residual stream, which is not split
            label = f"{model}:hidden"
            of_stream = _of_stream(MODELS[name].hidden, grid)
            cases += [replace(case, label=label, suites=(suite,)) for case in of_stream]
    return cases


def _of_layer(k: int, n: int, projections: list[str], grid: Grid) -> Iterator[Case]:
    """The cases of one weight [N, K]."""
    for dtype in grid.dtypes:
        yield Case("nf4", "nf4_quantize", 0, k, n, dtype=dtype, weight="nf4")
        yield Case("nf4", "nf4_dequantize", 0, k, n, dtype=dtype, weight="nf4_double")
        if "forward" in grid.directions:
            for m in grid.tokens:
                yield Case("int8", "nf4_linear_int8", m, k, n, dtype=dtype, weight="nf4")
        for r in grid.ranks:
            yield NORM(k, n, r=r, dtype=dtype, weight="nf4_double")
    # IA3 scales the outputs of k and v, and the inputs of down (its paper, section 3.3)
    ia3 = [("ia3_linear", {"k", "v"}), (FEEDFORWARD, {"down"})]
    for m, dtype, direction in itertools.product(grid.tokens, grid.dtypes, grid.directions):
        if direction != "both":  # a frozen layer without an adapter has no training of its own
            yield NF4(m, k, n, dtype=dtype, direction=direction)
        for op, scaled in ia3:
            if scaled & set(projections):
                yield IA3(op, m, k, n, dtype=dtype, direction=direction)
        if direction == "backward":  # of a layer with LoRA it is part of "both"
            continue
        adapted: tuple[Callable[..., Case], ...] = (QLORA, LORA, DORA)
        for r, family in itertools.product(grid.ranks, adapted):
            yield family(m, k, n, r=r, dtype=dtype, direction=direction)


def _of_stream(hidden: int, grid: Grid) -> Iterator[Case]:
    """The cases of activations [M, hidden]."""
    for m, dtype, direction in itertools.product(grid.tokens, grid.dtypes, grid.directions):
        if direction != "backward":
            yield adapter(m, hidden, hidden // _BOTTLENECK, direction, dtype=dtype)
            yield DROPOUT(m=m, k=hidden, dtype=dtype, direction=direction, dropout=0.05)
