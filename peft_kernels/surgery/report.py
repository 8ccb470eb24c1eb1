"""What surgery did, layer by layer: the value `replace_layers` and `explain` return."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peft_kernels.core.plan import Plan, Product
from peft_kernels.core.text import as_text
from peft_kernels.surgery.names import patterns

SCHEMA_VERSION = 1  # of `Report.to_dict`


@dataclass(frozen=True)
class Row:
    """One layer of the model.

    Attributes:
        name: its dotted name in the model.
        layer: its class, short: "lora.Linear4bit".
        fused: whether a plain call `layer(x)` runs the fused kernels as things stand now.
        reason: why not, when it is not fused; otherwise a remark, or "".
    """

    name: str
    layer: str
    fused: bool
    reason: str


@dataclass(frozen=True)
class Work:
    """How the native kernels compute the products of some fused layers with their NF4 weights.

    Attributes:
        layers: how many layers have this product.
        product: what they have in common.
        plans: the methods by number of tokens M, for "forward" and "input gradient".
    """

    layers: int
    product: Product
    plans: dict[str, Plan]


@dataclass(frozen=True, repr=False)
class Report:
    """All layers surgery knows of, in the model's order.

    Its text, in a notebook too, puts together what has class, verdict and reason in common, and names that
    differ in numbers only; `listing()` has every name. `to_dict()` is for programs, `to_markdown()` for
    issues. To look at some layers, filter it like any sequence: `[row for row in report if not row.fused]`.

    Attributes:
        rows: the layers.
        works: how the products of the fused ones with their NF4 weights are computed.
    """

    rows: tuple[Row, ...]
    works: tuple[Work, ...] = ()

    @property
    def fused(self) -> tuple[Row, ...]:
        """The layers that run fused."""
        return tuple(row for row in self.rows if row.fused)

    @property
    def skipped(self) -> tuple[Row, ...]:
        """The layers that run their stock forward, each with its reason."""
        return tuple(row for row in self.rows if not row.fused)

    @property
    def reasons(self) -> dict[str, int]:
        """How many layers run their stock forward for each reason, the most frequent first."""
        return dict(Counter(row.reason for row in self.skipped).most_common())

    def listing(self) -> str:
        """The report as text with the name of every layer."""
        return as_text(self._view(every_name=True))

    def to_dict(self) -> dict[str, Any]:
        """The report as data that `json.dumps` takes.

        Returns:
            schema_version (1); total and fused, numbers of layers; reasons, as the property; layers, a list
            of {name, layer, fused, reason} as in `Row`; works, a list of {layers, product, plans} as in
            `Work`: the product's fields, dtype and device as text ("bfloat16", "cpu"), and for each direction
            a list of {first, last, method} with numbers of tokens, last None where there is no limit.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "total": len(self),
            "fused": len(self.fused),
            "reasons": self.reasons,
            "layers": [asdict(row) for row in self.rows],
            "works": [_work_as_data(work) for work in self.works],
        }

    def to_markdown(self) -> str:
        """The report's text in Markdown."""
        lines = [self._summary(), ""]
        for heading, names in self._alike().items():
            lines += [f"- {_heading(*heading, len(names), '`')}"]
            lines += [f"  - {count} × `{name}`" for name, count in patterns(names).items()]
        return "\n".join(lines + [f"- {_sentence(work)}" for work in self.works]).rstrip()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __rich__(self) -> RenderableType:
        return self._view(every_name=False)

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__

    def _summary(self) -> str:
        if not self.rows:
            return "no PEFT, adapters or bitsandbytes layers"
        return f"{len(self.fused)} of {len(self)} PEFT, adapters and bitsandbytes layers fused"

    def _alike(self) -> dict[tuple[bool, str, str], list[str]]:
        """The names of the layers by (fused, layer, reason), in the model's order."""
        alike: dict[tuple[bool, str, str], list[str]] = {}
        for row in self.rows:
            alike.setdefault((row.fused, row.layer, row.reason), []).append(row.name)
        return alike

    def _view(self, every_name: bool) -> RenderableType:
        parts: list[RenderableType] = [self._summary()]
        for heading, names in self._alike().items():
            table = Table.grid(padding=(0, 2))
            table.add_column(justify="right", min_width=6)
            # Text, because rich would take square brackets in a plain string for markup.
            for name, count in dict.fromkeys(names, 1).items() if every_name else patterns(names).items():
                table.add_row(str(count), Text(name, overflow="fold"))
            style = "green" if heading[0] else "yellow"
            parts += [Text(_heading(*heading, len(names)), style=style), table]
        return Group(*parts, *(Text(_sentence(work)) for work in self.works))


def _heading(fused: bool, layer: str, reason: str, count: int, quote: str = "") -> str:
    verdict = "fused" if fused else "not fused"
    return f"{verdict}: {count} {quote}{layer}{quote}" + (f": {reason}" if reason else "")


def _sentence(work: Work) -> str:
    dtype = _plain(work.product.dtype)
    layers = "1 layer" if work.layers == 1 else f"{work.layers} layers"
    directions: dict[Plan, list[str]] = {}
    for direction, plan in work.plans.items():
        directions.setdefault(plan, []).append(direction)
    methods = "; ".join(f"{' and '.join(names)}: {plan}" for plan, names in directions.items())
    scaled = ", its input scaled" if work.product.input_scale else ""
    return f"{layers} with K = {work.product.in_features} in {dtype}{scaled}, M tokens: {methods}"


def _work_as_data(work: Work) -> dict[str, Any]:
    product = work.product
    return {
        "layers": work.layers,
        "product": {**asdict(product), "dtype": _plain(product.dtype), "device": str(product.device)},
        "plans": {direction: [asdict(r) for r in plan.regimes] for direction, plan in work.plans.items()},
    }


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
