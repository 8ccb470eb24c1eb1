"""The demo's story: two models that start equal, one with fused layers, trained side by side and compared."""

import copy
import functools
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import peft
from rich.console import Console
from torch import Tensor, nn

import peft_kernels as pk
from word_polarity.encoder import Tokenizer, add_lora, load_encoder, share_dropout_masks
from word_polarity.memory import peak_bytes, saved_for_backward_bytes
from word_polarity.progress import step_progress
from word_polarity.results import Outcome, Run, relative_differences
from word_polarity.training import Trainer, accuracy, forward_backward, median_seconds, train_side_by_side
from word_polarity.words import Word, load_words, majority_share, shuffled_batches, split_words

SEED = 0
LEARNING_RATE = 5e-4
RELOAD_WORDS = 256  # as many logits are compared after loading the adapter again
TIMING_ROUNDS = 20


def compare(steps: int, batch_size: int, adapter: Path, console: Console) -> Outcome:
    """Train both models for `steps` steps of `batch_size` words, saving ours to the folder `adapter`."""
    console.rule("[bold]1. The task: is this word positive or negative?", align="left")
    train_words, test_words = split_words(load_words(), SEED)
    tokenizer = Tokenizer()
    batches = [
        tokenizer(words) for words in itertools.islice(shuffled_batches(train_words, batch_size, SEED), steps)
    ]
    console.print(f"{len(train_words):,} words to train on, {len(test_words):,} to test on (VADER lexicon).")

    console.rule("[bold]2. The model: pre-trained MiniLM in 4 bits with LoRA, twice", align="left")
    with console.status("Loading and quantising"):
        stock = add_lora(load_encoder(SEED), SEED).train()
    fused = copy.deepcopy(stock)
    report = pk.replace_layers(fused)
    console.print("Stock: Hugging Face PEFT over bitsandbytes NF4 with double quantisation, r = 8.")
    console.print("Ours:  a copy after pk.replace_layers(model):", end=" ")
    console.print(f"{len(report.fused)} of {len(report)} layers fused.")
    for row in report.skipped:
        console.print(f"       not fused: {row.name} ({row.layer}): {row.reason}")

    console.rule("[bold]3. Training both, step by step in turn", align="left")
    with console.status("Measuring memory and the price of equal dropout masks"):
        stock_memory, fused_memory = measure_memory(stock, batches[0]), measure_memory(fused, batches[0])
        original = copy.deepcopy(stock)
        share_dropout_masks(stock)
        own_dropout = relative_duration(original, stock, batches[0])
    stock_trainer, fused_trainer = (Trainer(model, steps, LEARNING_RATE) for model in (stock, fused))
    train_with_progress(stock_trainer, fused_trainer, batches, console)

    console.rule("[bold]4. Our adapter, saved and loaded into a stock model", align="left")
    with console.status("Saving and loading"):
        reload_difference = reload_adapter(fused, adapter, test_words[:RELOAD_WORDS], tokenizer)
    console.print(f"Saved by PEFT in {adapter.resolve()}", soft_wrap=True)
    console.print(f"Loaded by PEFT, without our layers: outputs agree to {reload_difference:.1e}.")

    def run(name: str, trainer: Trainer, memory: tuple[int, int]) -> Run:
        trainable = pk.trainable_parameters(trainer.model).trainable
        right = accuracy(trainer.model, test_words, tokenizer)
        return Run(name, trainer.losses, trainer.seconds, right, *memory, trainable)

    with console.status(f"Testing both on {len(test_words):,} words"):
        return Outcome(
            stock=run("PEFT + bitsandbytes", stock_trainer, stock_memory),
            fused=run("peft_kernels", fused_trainer, fused_memory),
            majority=majority_share(test_words),
            own_dropout=own_dropout,
            reload_difference=reload_difference,
        )


def measure_memory(model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, int]:
    """(peak, kept for backward) of one forward and backward pass, in bytes."""
    forward_backward(model, batch)  # what is allocated once, on first use, is no cost of a step
    peak = peak_bytes(functools.partial(forward_backward, model, batch))
    return peak, saved_for_backward_bytes(model, lambda: model(**batch).loss)


def relative_duration(model: nn.Module, reference: nn.Module, batch: dict[str, Tensor]) -> float:
    """Duration of the model's forward and backward pass, over that of `reference`."""
    passes = [functools.partial(forward_backward, timed, batch) for timed in (model, reference)]
    duration, reference_duration = median_seconds(passes, TIMING_ROUNDS)
    return duration / reference_duration


def train_with_progress(
    stock: Trainer, fused: Trainer, batches: Sequence[dict[str, Tensor]], console: Console
) -> None:
    """Train both, showing loss and time per step of each."""
    with step_progress(console) as progress:
        task = progress.add_task("", total=len(batches))
        for step in train_side_by_side(stock, fused, batches):
            stock_ms, fused_ms = (1e3 * statistics.median(run.seconds[-50:]) for run in (stock, fused))
            stock_text = f"stock {stock.losses[-1]:.4f} {stock_ms:.0f} ms"
            fused_text = f"ours {fused.losses[-1]:.4f} {fused_ms:.0f} ms"
            progress.update(task, completed=step, description=f"{stock_text} | {fused_text}")
    largest = float(relative_differences(stock.losses, fused.losses).max())
    console.print(f"The losses agree to {largest:.1e} (relative) at every one of the {len(batches)} steps.")


def reload_adapter(
    fused: peft.PeftModel, adapter: Path, words: Sequence[Word], tokenizer: Tokenizer
) -> float:
    """Save the adapter, load it into a new stock model: largest logit difference, over the largest logit."""
    fused.save_pretrained(str(adapter))
    another_head = load_encoder(SEED + 1)  # which loading must overwrite
    reloaded = peft.PeftModel.from_pretrained(another_head, str(adapter))
    expected, actual = (full_precision_logits(model, words, tokenizer) for model in (fused, reloaded))
    return float((actual - expected).abs().max() / expected.abs().max())


def full_precision_logits(model: peft.PeftModel, words: Sequence[Word], tokenizer: Tokenizer) -> Tensor:
    """Logits [words, 2] in eval mode, computed in fp32 by stock bitsandbytes too.

    On processors with bf16 instructions it would turn to bf16, unless its input requires a gradient.
    """
    model.eval().enable_input_require_grads()
    logits: Tensor = model(**tokenizer(words)).logits.detach()
    model.disable_input_require_grads()
    return logits
