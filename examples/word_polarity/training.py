"""Training models side by side: same batches, same moments of the machine, and same random numbers."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from word_polarity.encoder import Tokenizer
from word_polarity.words import Word


class Trainer:
    """A model with its optimiser, and what its steps gave: `losses` and `seconds`, one entry per step."""

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        learning_rate: float,
        param_groups: list[dict[str, Any]] | None = None,
    ) -> None:
        """Train the groups given, which have learning rates of their own, or all that is trainable."""
        self.model = model
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.generator_state: Tensor | None = None  # torch's, at the end of the last step
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(param_groups or trainable, lr=learning_rate)
        self._schedule = get_linear_schedule_with_warmup(self._optimizer, steps // 10, steps)

    def step(self, batch: dict[str, Tensor], seed: int) -> None:
        """One training step; all its random numbers come from `seed`."""
        torch.manual_seed(seed)
        start = time.perf_counter()
        self._optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.generator_state = torch.get_rng_state()


def train_in_turn(
    trainers: Sequence[Trainer], batches: Iterable[dict[str, Tensor]], seed: int = 0
) -> Iterator[int]:
    """Train all on every batch, each going first in its turn; yield the number of steps done.

    `seed` is that of the first step; every next one counts up.
    """
    for step, batch in enumerate(batches):
        first = step % len(trainers)
        for trainer in (*trainers[first:], *trainers[:first]):
            trainer.step(batch, seed + step)
        yield step + 1


def train_side_by_side(stock: Trainer, fused: Trainer, batches: Iterable[dict[str, Tensor]]) -> Iterator[int]:
    """Train both on every batch, each going first every other time; yield the number of steps done.

    Raises:
        RuntimeError: one of them drew more random numbers than the other, so that their masks differ.
    """
    for steps in train_in_turn((stock, fused), batches):
        assert stock.generator_state is not None
        assert fused.generator_state is not None
        if not torch.equal(stock.generator_state, fused.generator_state):
            raise RuntimeError(f"the two models drew different random numbers in step {steps - 1}")
        yield steps


def forward_backward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """What a training step does before the optimiser; leaves no gradients behind."""
    model(**batch).loss.backward()
    model.zero_grad()


def median_seconds(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Median duration of each of `runs`, called in turn, `rounds` times."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, durations in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            durations.append(time.perf_counter() - start)
    return [statistics.median(durations) for durations in seconds]


def accuracy(model: nn.Module, words: Sequence[Word], tokenizer: Tokenizer, batch_size: int = 64) -> float:
    """The share of `words` that the model, put into eval mode, gets right."""
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(words), batch_size):
            batch = tokenizer(words[start : start + batch_size])
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(words)
