"""Accuracy against the number of trainable parameters, as a picture."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from peft_methods.results import Outcome

APART = 1.12  # methods of nearly as many parameters are drawn side by side, this factor apart
MARKERS = "osD^v<>P"


def save_plot(outcome: Outcome, path: Path) -> None:
    """A point per method, the mean over the seeds, with a bar from the lowest to the highest; as PNG."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    right_most = 0.0
    ordered = sorted(outcome.results, key=lambda result: result.trainable)
    for marker, result in zip(MARKERS, ordered, strict=False):
        x = right_most = max(result.trainable, APART * right_most)
        below, above = result.accuracy - result.lowest, result.highest - result.accuracy
        axes.errorbar(
            x,
            result.accuracy,
            [[below], [above]],
            marker=marker,
            markersize=6,
            capsize=4,
            linestyle="none",
            label=f"{result.name}, {1e3 * result.seconds:.0f} ms",
        )
    axes.set(
        xscale="log",
        xlabel="trainable parameters (equal numbers are drawn side by side)",
        ylabel=f"accuracy on unseen words (guessing: {outcome.majority:.0%})",
        title=f"Word polarity: 4-bit MiniLM, {outcome.steps} steps; mean and range "
        f"(seeds: {len(outcome.seeds)})",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title="method, time per step")
    figure.savefig(path, dpi=120)
