"""The Trainer of transformers and accelerate's loop, on MiniLM with real weights, beside the stock model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from subjects import inputs, models, stock_and_fused, without_dropout
from transformers import Trainer, TrainingArguments

import peft_kernels as pk
from surgery.peft_models import assert_close
from word_polarity.encoder import Tokenizer, add_lora, load_encoder
from word_polarity.results import TOLERANCE
from word_polarity.words import load_words

STEPS, BATCH = 20, 8


class Recording(Trainer):
    """Keeps each step's loss; what Trainer logs is rounded to four digits."""

    losses: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


@pytest.mark.slow
def test_trainer(tmp_path: Path) -> None:
    """20 steps: the loss falls, each is the stock model's, and the saved adapter loads into a stock model.

    How far training spreads rounding errors is measured: beside them trains a stock model whose adapters
    differ from the start by a unit in the last place. Each of our 37 layers rounds otherwise at each step: as
    random signs that adds up to sqrt(37 * 20) = 27 such differences, and to 5 times as many at most.
    """
    words, tokenizer = load_words()[: STEPS * BATCH], Tokenizer()
    stock = without_dropout(add_lora(load_encoder(0), 0))
    fused, other = copy.deepcopy(stock), copy.deepcopy(stock)
    pk.replace_layers(fused, strict=True)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
    losses: list[list[float]] = []
    for name, model in (("stock", stock), ("fused", fused), ("other", other)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=STEPS,
            save_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            seed=0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Recording(model, arguments, train_dataset=words, data_collator=tokenizer)
        trainer.losses = []
        trainer.train()
        losses.append(trainer.losses)
    expected, got, spread = (torch.tensor(each, dtype=torch.float64) for each in losses)
    assert len(got) == STEPS
    assert got[-5:].mean() < 0.9 * got[:5].mean()
    assert (got - expected).abs().max() <= 5 * 27 * (spread - expected).abs().max()
    assert all(row.fused for row in pk.explain(fused))

    loaded = PeftModel.from_pretrained(load_encoder(1), tmp_path / "fused" / f"checkpoint-{STEPS}")
    batch = tokenizer(words[:BATCH])
    logits = []
    for model in (fused, loaded):
        model.eval().enable_input_require_grads()  # or bitsandbytes computes in bf16
        logits.append(model(**batch).logits.detach())
    assert (logits[1] - logits[0]).abs().max() <= TOLERANCE * logits[0].abs().max()


@pytest.mark.parametrize("name", models())
def test_accelerate(name: str) -> None:
    """prepare, backward and accumulation over two micro-batches, as with the stock model."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    pair = stock_and_fused(name)
    for model in pair:
        without_dropout(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        for micro_batch in range(4):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(inputs(seed=micro_batch)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        assert accelerator.unwrap_model(prepared) is model
    for expected, got in zip(*(model.parameters() for model in pair), strict=True):
        if expected.requires_grad:
            assert_close(got.detach(), expected.detach())
    assert all(row.fused and not row.reason for row in pk.explain(pair[1]))
    AcceleratorState._reset_state(reset_partial_state=True)
