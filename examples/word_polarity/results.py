"""What the demo found: the figures, whether they are as promised, a table and a plot of them."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

TOLERANCE = 1e-4  # relative. Rounding to fp32 is 6e-8, and training amplifies it: docs/demo.md


@dataclass(frozen=True)
class Run:
    """One model's training.

    Attributes:
        name: column heading.
        losses: training loss of every step.
        seconds: duration of every step.
        accuracy: share of the test words that it gets right.
        peak_bytes: most memory that forward and backward held above their start.
        saved_bytes: memory kept from forward to backward.
        trainable: number of trainable parameters.
    """

    name: str
    losses: list[float]
    seconds: list[float]
    accuracy: float
    peak_bytes: int
    saved_bytes: int
    trainable: int

    @property
    def median_seconds(self) -> float:
        """Median duration of a step."""
        return statistics.median(self.seconds)

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the steps (the losses of single batches scatter)."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])


@dataclass(frozen=True)
class Outcome:
    """Both runs, and what was measured besides.

    Attributes:
        stock: PEFT + bitsandbytes.
        fused: the same model after `pk.replace_layers`.
        majority: accuracy of always answering with the more frequent class.
        own_dropout: duration of stock's forward and backward with nn.Dropout, over that with our masks.
        reload_difference: largest difference between the logits of the fused model and those of a stock model
            that loaded its adapter, over the largest logit.
    """

    stock: Run
    fused: Run
    majority: float
    own_dropout: float
    reload_difference: float

    @property
    def loss_differences(self) -> Tensor:
        """Relative difference of the losses at every step, float64 [steps]."""
        return relative_differences(self.stock.losses, self.fused.losses)

    @property
    def speedup(self) -> float:
        """Stock's time per step over ours; stock with nn.Dropout or with our masks, whichever is faster."""
        return min(1.0, self.own_dropout) * self.stock.median_seconds / self.fused.median_seconds


def relative_differences(expected: list[float], actual: list[float]) -> Tensor:
    """|actual - expected| / |expected|, float64."""
    reference = torch.tensor(expected, dtype=torch.float64)
    return (torch.tensor(actual, dtype=torch.float64) - reference).abs() / reference.abs()


def failures(outcome: Outcome) -> list[str]:
    """A sentence for everything that is not as promised; empty when all is well."""
    sentences = []
    largest = float(outcome.loss_differences.max())
    if not largest <= TOLERANCE:  # written so that nan fails, here and below
        sentences.append(f"The losses differ by up to {largest:.1e} relative, more than {TOLERANCE:.0e}.")
    if not outcome.speedup > 1:
        sentences.append(f"Our step is not faster: stock's takes {outcome.speedup:.2f} times as long.")
    if not outcome.reload_difference <= TOLERANCE:
        sentences.append(
            "A stock model with the saved adapter gives other outputs: they differ by "
            f"{outcome.reload_difference:.1e} of the largest, more than {TOLERANCE:.0e}."
        )
    return sentences


def table(outcome: Outcome) -> Table:
    """The figures of both runs, side by side."""
    runs = (outcome.stock, outcome.fused)
    result = Table("", *(run.name for run in runs), "", title="Result", title_justify="left")
    for column in result.columns:
        column.no_wrap = True
    for column in result.columns[1:3]:
        column.justify = "right"
    largest = float(outcome.loss_differences.max())
    result.add_row("loss, first step", *(f"{run.losses[0]:.5f}" for run in runs), "")
    result.add_row("loss, last tenth", *(f"{run.final_loss:.5f}" for run in runs), "")
    result.add_row("largest difference", "", f"{largest:.1e}", f"allowed: {TOLERANCE:.0e}")
    result.add_row(
        "test accuracy", *(f"{run.accuracy:.1%}" for run in runs), f"guessing: {outcome.majority:.1%}"
    )
    result.add_row(
        "time per step",
        *(f"{1e3 * run.median_seconds:.1f} ms" for run in runs),
        f"{outcome.speedup:.2f}x as fast",
    )
    for label, sizes in (
        ("peak memory", [run.peak_bytes for run in runs]),
        ("  kept for backward", [run.saved_bytes for run in runs]),
    ):
        result.add_row(label, *(f"{size / 2**20:.1f} MiB" for size in sizes), f"{sizes[1] / sizes[0]:.0%}")
    result.add_row("trainable parameters", *(f"{run.trainable:,}" for run in runs), "")
    return result


def notes(outcome: Outcome) -> list[str]:
    """What a reader of the table should know."""
    sentences = [
        "Stock drops elements by our masks here, so that losses can be compared. With its own nn.Dropout its "
        f"forward and backward take {outcome.own_dropout:.2f} times as long; the faster one counts."
    ]
    if outcome.stock.accuracy != outcome.fused.accuracy:
        sentences.append(
            "Accuracies can differ by a few words: outside training bitsandbytes computes in bf16 where the "
            "processor has bf16 instructions, we in the model's fp32."
        )
    return sentences


def save_plot(outcome: Outcome, path: Path) -> None:
    """Both loss curves above, their relative difference below, as PNG."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    losses, differences = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    losses.plot(outcome.stock.losses, color="tab:orange", linewidth=4, alpha=0.5, label=outcome.stock.name)
    losses.plot(outcome.fused.losses, color="tab:blue", linewidth=1, label=outcome.fused.name)
    losses.set(ylabel="training loss", title="Word polarity: 4-bit MiniLM with LoRA")
    losses.legend()
    floor = 1e-8  # equal losses have no place on a logarithmic axis: draw them at its lower end
    differences.plot(outcome.loss_differences.clamp(min=floor), color="tab:gray", linewidth=1)
    differences.axhline(TOLERANCE, color="tab:red", linestyle="--")
    below = {"xytext": (0, -4), "textcoords": "offset points", "verticalalignment": "top"}
    differences.annotate("allowed", (0, TOLERANCE), color="tab:red", **below)
    differences.set(yscale="log", ylim=(floor, None), xlabel="step", ylabel="relative difference")
    figure.savefig(path, dpi=120)
