"""What surgery did, layer by layer: the value `replace_layers` and `explain` return."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from peft_kernels.core.plan import Plan, Product
from peft_kernels.core.text import as_text


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
    """All layers surgery knows of, in the model's order. Its text is a table, in a notebook too.

    Attributes:
        rows: a row for each layer; a report is iterated over by them.
        works: what computes the products of the fused layers with their NF4 weights.
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

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __rich__(self) -> Group:
        table = Table("name", "layer", "fused", "reason")
        for row in self.rows:
            # Text, because rich would take square brackets in a plain string for markup.
            table.add_row(
                Text(row.name, overflow="fold"), row.layer, "yes" if row.fused else "no", Text(row.reason)
            )
        summary = f"{len(self.fused)} of {len(self)} PEFT, adapters and bitsandbytes layers fused"
        if not self.rows:
            return Group("no PEFT, adapters or bitsandbytes layers")
        return Group(summary, table, *map(_sentence, self.works))

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__


def _sentence(work: Work) -> Text:
    dtype = str(work.product.dtype).removeprefix("torch.")
    layers = "1 layer" if work.layers == 1 else f"{work.layers} layers"
    methods = "; ".join(f"{direction}: {plan}" for direction, plan in work.plans.items())
    scaled = ", its input scaled" if work.product.input_scale else ""
    return Text(f"{layers} with K = {work.product.in_features} in {dtype}{scaled}, M tokens: {methods}")
