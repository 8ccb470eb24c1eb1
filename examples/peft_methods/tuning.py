"""Choosing each method's learning rate, on validation words that neither training nor the test sees."""

import itertools
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from peft_methods.comparison import split
from peft_methods.methods import Method
from word_polarity.encoder import Tokenizer
from word_polarity.progress import step_progress
from word_polarity.training import accuracy, train_in_turn
from word_polarity.words import shuffled_batches

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEED = 100  # none of those that the results are reported for


def sweep(methods: Sequence[Method], steps: int, batch_size: int, console: Console) -> dict[str, list[float]]:
    """Validation accuracy of each method at each of `RATES`, trained as for the comparison."""
    train_words, validation_words, _ = split()
    tokenizer = Tokenizer()
    words = itertools.islice(shuffled_batches(train_words, batch_size, SEED), steps)
    batches = [tokenizer(some) for some in words]
    found = {}
    with step_progress(console) as progress:
        task = progress.add_task("", total=len(methods) * steps)
        for method in methods:
            trainers = [method.trainer(method.build(SEED), steps, rate) for rate in RATES]
            for _ in train_in_turn(trainers, batches, SEED * steps):
                progress.update(task, advance=1, description=method.name)
            found[method.name] = [
                accuracy(trainer.model, validation_words, tokenizer) for trainer in trainers
            ]
    return found


def best_rate(accuracies: Sequence[float]) -> float:
    """The rate with the highest accuracy; of equals the lowest."""
    return RATES[accuracies.index(max(accuracies))]


def table(found: dict[str, list[float]]) -> Table:
    """A row per method, a column per learning rate."""
    result = Table(
        "method", *(f"{rate:.0e}" for rate in RATES), title="Validation accuracy", title_justify="left"
    )
    for name, accuracies in found.items():
        best = best_rate(accuracies)
        result.add_row(
            name,
            *(
                f"[bold]{value:.1%}[/]" if rate == best else f"{value:.1%}"
                for rate, value in zip(RATES, accuracies, strict=True)
            ),
        )
    return result
