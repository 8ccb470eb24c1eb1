"""The demo's story: all methods trained on the same words at the same moments, then tested on others."""

import functools
import itertools
import statistics
from collections.abc import Sequence

from rich.console import Console
from torch import Tensor, nn

import peft_kernels as pk
from peft_methods.methods import Method
from peft_methods.results import Layers, Outcome, Result, Run
from word_polarity.encoder import Tokenizer
from word_polarity.memory import peak_bytes
from word_polarity.progress import step_progress
from word_polarity.training import Trainer, accuracy, forward_backward, train_in_turn
from word_polarity.words import Word, load_words, majority_share, shuffled_batches, split_words

SPLIT_SEED = 0


def split() -> tuple[list[Word], list[Word], list[Word]]:
    """(train, validation, test); learning rates were chosen on the validation words, never on the test."""
    learn, test = split_words(load_words(), SPLIT_SEED)
    train, validation = split_words(learn, SPLIT_SEED, 0.2)
    return train, validation, test


def compare(
    methods: Sequence[Method], steps: int, batch_size: int, seeds: Sequence[int], console: Console
) -> Outcome:
    """Train each method once per seed, for `steps` steps of `batch_size` words, step by step in turn.

    A seed stands for the start of head and adapter, the order of the words, and dropout.
    """
    console.rule("[bold]1. The task: is this word positive or negative?", align="left")
    train_words, _, test_words = split()
    tokenizer = Tokenizer()
    console.print(f"{len(train_words):,} words to train on, {len(test_words):,} to test on (VADER lexicon).")

    console.rule("[bold]2. The model: pre-trained MiniLM in 4 bits, fine-tuned in these ways", align="left")
    peaks = []
    for method in methods:
        with console.status(f"Measuring the memory of a step: {method.name}"):
            model = method.build(seeds[0])
            peaks.append(step_peak_bytes(method, model, tokenizer(train_words[:batch_size])))
        trained = pk.trainable_parameters(model).trainable
        console.print(f"{method.name:14}{trained:>9,} parameters  {layers_of(model).summary}")

    console.rule(f"[bold]3. Training all of them in turn (seeds: {len(seeds)})", align="left")
    runs: list[list[Run]] = [[] for _ in methods]
    with step_progress(console) as progress:
        task = progress.add_task("", total=len(seeds) * steps)
        for number, seed in enumerate(seeds, 1):
            words = itertools.islice(shuffled_batches(train_words, batch_size, seed), steps)
            batches = [tokenizer(some) for some in words]
            trainers = [method.trainer(method.build(seed), steps, method.learning_rate) for method in methods]
            for _ in train_in_turn(trainers, batches, seed * steps):
                text = f"seed {number} of {len(seeds)}, {milliseconds(trainers):.0f} ms a step of all"
                progress.update(task, advance=1, description=text)
            for trainer, done in zip(trainers, runs, strict=True):
                progress.update(task, description=f"seed {number} of {len(seeds)}, testing")
                done.append(finished(trainer, test_words, tokenizer))
    results = [
        Result(method.name, method.learning_rate, peak, tuple(done))
        for method, peak, done in zip(methods, peaks, runs, strict=True)
    ]
    return Outcome(
        tuple(results), majority_share(test_words), len(test_words), tuple(seeds), steps, batch_size
    )


def finished(trainer: Trainer, test_words: Sequence[Word], tokenizer: Tokenizer) -> Run:
    """What a training gave."""
    model = trainer.model
    layers = layers_of(model)  # as they ran in training, so before the test
    return Run(
        layers,
        pk.trainable_parameters(model),
        trainer.seconds,
        trainer.losses,
        accuracy(model, test_words, tokenizer),
    )


def milliseconds(trainers: Sequence[Trainer]) -> float:
    """What a step of all takes at present."""
    return 1e3 * sum(statistics.median(trainer.seconds[-50:]) for trainer in trainers)


def step_peak_bytes(method: Method, model: nn.Module, batch: dict[str, Tensor]) -> int:
    """The most memory that a training step holds above the model: activations, gradients and Adam's state."""
    forward_backward(model, batch)  # what is allocated once, on first use, is no cost of a step
    trainer = method.trainer(model, 10, method.learning_rate)
    return peak_bytes(functools.partial(trainer.step, batch, seed=0))


def layers_of(model: nn.Module) -> Layers:
    """Which layers of a model run fused, after a call: those that fell back in it do not."""
    report = pk.explain(model)
    fell_back = {row.name: row.reason for row in report.fused if "ran the stock forward" in row.reason}
    fused = [row.name for row in report.fused if row.name not in fell_back]
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    adapter = [name for name in trained if "classifier" not in name]
    stock = [name for name in adapter if not any(name.startswith(f"{layer}.") for layer in fused)]
    reasons = tuple(f"{name}: {reason}" for name, reason in fell_back.items())
    return Layers(len(fused), len(report), len(adapter), len(stock), reasons)
