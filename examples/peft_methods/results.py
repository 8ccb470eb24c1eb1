"""What the demo found: the figures, whether they are as promised, and what they say about the choice."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from peft_kernels.parameters import TrainableParameters

SAME_COST = 0.05  # the times of LoRA, rsLoRA and LoRA+, which do the same work, differ by up to 3 %


@dataclass(frozen=True)
class Layers:
    """How many layers of a model ran on the fused kernels.

    Attributes:
        fused: layers that did.
        total: all layers that `pk.explain` lists.
        adapter_tensors: trainable tensors, those of the head left out.
        stock_tensors: how many of them lie in no fused layer.
        fell_back: what `pk.replace_layers` fused, but ran its stock forward all the same, and why.
    """

    fused: int
    total: int
    adapter_tensors: int
    stock_tensors: int
    fell_back: tuple[str, ...] = ()

    @property
    def all_fused(self) -> bool:
        """Whether every layer ran fused, and all that is trained lies in one."""
        return self.fused == self.total and not self.stock_tensors

    @property
    def summary(self) -> str:
        """In words."""
        count = f"{self.fused} of {self.total} layers fused"
        if not self.stock_tensors:
            return count
        part = "" if self.stock_tensors == self.adapter_tensors else "in part "
        return f"{count}; its adapter runs {part}stock"


@dataclass(frozen=True)
class Run:
    """One training of one method.

    Attributes:
        layers: which of them ran fused.
        parameters: what was trained.
        seconds: duration of every step.
        losses: training loss of every step.
        accuracy: share of the test words that it gets right.
    """

    layers: Layers
    parameters: TrainableParameters
    seconds: list[float]
    losses: list[float]
    accuracy: float


@dataclass(frozen=True)
class Result:
    """One method's figures, over all seeds.

    Attributes:
        name: of the method.
        learning_rate: at its highest, after the warm-up.
        peak_bytes: the most memory that a training step holds above the model.
        runs: one per seed.
    """

    name: str
    learning_rate: float
    peak_bytes: int
    runs: tuple[Run, ...]

    @property
    def accuracies(self) -> list[float]:
        """One per seed."""
        return [run.accuracy for run in self.runs]

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def lowest(self) -> float:
        """The seed that went worst."""
        return min(self.accuracies)

    @property
    def highest(self) -> float:
        """The seed that went best."""
        return max(self.accuracies)

    @property
    def seconds(self) -> float:
        """Median duration of a step."""
        return statistics.median(itertools.chain(*(run.seconds for run in self.runs)))

    @property
    def layers(self) -> Layers:
        """Which ran fused, the same with every seed."""
        return self.runs[0].layers

    @property
    def trainable(self) -> int:
        """How many parameters are trained."""
        return self.runs[0].parameters.trainable


@dataclass(frozen=True)
class Outcome:
    """All results, the frozen probe's first, and how they came about.

    Attributes:
        results: one per method.
        majority: accuracy of always answering with the more frequent class.
        test_words: how many words the accuracies are shares of.
        seeds: of the repetitions.
        steps: training steps per repetition.
        batch_size: words per step.
    """

    results: tuple[Result, ...]
    majority: float
    test_words: int
    seeds: tuple[int, ...]
    steps: int
    batch_size: int

    @property
    def probe(self) -> Result:
        """The frozen probe's."""
        return self.results[0]

    @property
    def adapted(self) -> tuple[Result, ...]:
        """All others."""
        return self.results[1:]

    def told_apart(self, better: Result, worse: Result) -> bool:
        """Whether neither the seeds nor the choice of the test words explain that one is better.

        With every seed it is, and the means differ by more than two standard errors of the difference of two
        shares of n words, 2 sqrt(2 p (1 - p) / n). As all methods are tested on the same words, that is more
        than needed.
        """
        error = math.sqrt(2 * better.accuracy * (1 - better.accuracy) / self.test_words)
        return better.lowest > worse.highest and better.accuracy - worse.accuracy > 2 * error


def failures(outcome: Outcome) -> list[str]:
    """A sentence for everything that is not as promised; empty when all is well."""
    sentences = []
    probe = outcome.probe
    if not probe.lowest > outcome.majority:  # written so that nan fails, here and below
        sentences.append(
            f"The {probe.name} learns nothing: {probe.lowest:.1%}, and guessing gives {outcome.majority:.1%}."
        )
    for result in outcome.adapted:
        if not outcome.told_apart(result, probe):
            sentences.append(
                f"{result.name} is not clearly better than the {probe.name}: "
                f"{result.accuracy:.1%} on average and {result.lowest:.1%} at worst, "
                f"against {probe.accuracy:.1%} and {probe.highest:.1%} at best."
            )
    for result in outcome.results:
        if not all(math.isfinite(loss) for run in result.runs for loss in run.losses):
            sentences.append(f"{result.name} has a loss that is not finite.")
        fell_back = [layer for run in result.runs for layer in run.layers.fell_back]
        if fell_back:
            sentences.append(
                f"{result.name} has layers that were fused and yet ran their stock forward: {fell_back[0]}."
            )
    return sentences


def conclusions(outcome: Outcome) -> list[str]:
    """What the figures say about the choice, in sentences."""
    probe = outcome.probe
    best = max(outcome.results, key=lambda result: result.accuracy)
    rivals = [result for result in outcome.results if not outcome.told_apart(best, result)]
    sentences = [f"Most accurate on average: {best.name}, {best.accuracy:.1%}."]
    if len(rivals) > 1:
        others = listing([result.name for result in rivals if result is not best])
        sentences.append(f"Seeds and test words do not tell it apart from {others}. {cheapest(rivals)}")
    smallest = min(outcome.adapted, key=lambda result: result.trainable)
    if best not in (probe, smallest):
        gained = (smallest.accuracy - probe.accuracy) / (best.accuracy - probe.accuracy)
        sentences.append(
            f"Smallest: {smallest.name}. It gains {gained:.0%} of what {best.name} gains on the {probe.name} "
            f"with {smallest.trainable / best.trainable:.1%} of its parameters, in "
            f"{smallest.seconds / best.seconds:.0%} of its time and "
            f"{smallest.peak_bytes / best.peak_bytes:.0%} of its memory."
        )
    return sentences


def cheapest(results: Sequence[Result]) -> str:
    """Which of them cost least; what differs by less than `SAME_COST` counts as equal."""
    costs: dict[str, Callable[[Result], float]] = {
        "time per step": lambda result: result.seconds,
        "memory": lambda result: result.peak_bytes,
        "parameters": lambda result: result.trainable,
    }
    winners: dict[str, list[str]] = {}  # names -> what they are cheapest in
    for cost, of in costs.items():
        limit = (1 + SAME_COST) * min(map(of, results))
        names = listing([result.name for result in results if of(result) <= limit])
        winners.setdefault(names, []).append(cost)
    parts = "; ".join(f"in {listing(kinds)}: {names}" for names, kinds in winners.items())
    return f"Cheapest of these {len(results)}, to within {SAME_COST:.0%}, {parts}."


def listing(names: Sequence[str]) -> str:
    """A, B and C."""
    return " and ".join(", ".join(names).rsplit(", ", 1))


def stock_notes(outcome: Outcome) -> list[str]:
    """Which rows do not show our kernels, or not everywhere."""
    return [
        f"{result.name}: {result.layers.summary}; its time and memory are partly the stock library's."
        for result in outcome.results
        if not result.layers.all_fused
    ]


def table(outcome: Outcome) -> Table:
    """A row per method."""
    columns = ("trained", "ms/step", "peak MiB", "accuracy (range)", "fused")
    result = Table("method", *columns, title=f"Result (seeds: {len(outcome.seeds)})", title_justify="left")
    for column in result.columns:
        column.no_wrap = True
    for column in result.columns[1:]:
        column.justify = "right"
    for row in outcome.results:
        result.add_row(
            row.name,
            f"{row.trainable:,}",
            f"{1e3 * row.seconds:.1f}",
            f"{row.peak_bytes / 2**20:.1f}",
            f"{row.accuracy:.1%} ({100 * row.lowest:.1f}–{100 * row.highest:.1f})",
            f"{row.layers.fused}/{row.layers.total}{'' if row.layers.all_fused else ' *'}",
        )
    return result


def as_json(outcome: Outcome) -> dict[str, Any]:
    """All figures, for programs."""
    return {
        "seeds": outcome.seeds,
        "steps": outcome.steps,
        "batch_size": outcome.batch_size,
        "majority_accuracy": outcome.majority,
        "test_words": outcome.test_words,
        "methods": [
            {
                "name": row.name,
                "learning_rate": row.learning_rate,
                "trainable_parameters": row.trainable,
                "total_parameters": row.runs[0].parameters.total,
                "seconds_per_step": row.seconds,
                "peak_bytes": row.peak_bytes,
                "mean_accuracy": row.accuracy,
                "accuracies": row.accuracies,
                "fused_layers": row.layers.fused,
                "layers": row.layers.total,
                "all_fused": row.layers.all_fused,
            }
            for row in outcome.results
        ],
        "conclusions": conclusions(outcome),
        "failures": failures(outcome),
    }
