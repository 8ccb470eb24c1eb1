"""The demo: its data, its measuring, its verdict, and a run of three steps on the real encoder."""

import copy
import dataclasses
import io
import itertools
import math
from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from torch import nn

import demo
import peft_kernels as pk
from word_polarity import comparison
from word_polarity.encoder import Tokenizer, add_lora, load_encoder, share_dropout_masks
from word_polarity.memory import peak_bytes, saved_for_backward_bytes
from word_polarity.results import TOLERANCE, Outcome, Run, failures, notes, relative_differences
from word_polarity.training import Trainer, median_seconds, train_in_turn, train_side_by_side
from word_polarity.words import Word, load_words, majority_share, parse_lexicon, shuffled_batches, split_words

# peft 0.21 asks transformers 5 for a property by its former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WORDS = [Word(f"word{i}", positive=i % 3 == 0) for i in range(20)]


def test_lexicon_keeps_plain_words_with_a_polarity():
    entries = [
        ("good", 1.9),
        ("bad", 0.5),
        (":)", 2),
        ("so-so", -0.5),
        ("plain", 0),
        ("étoile", 1),
        ("bad", -2),
    ]
    lexicon = "".join(f"{token}\t{valence}\t0.9\t[1, 2]\n" for token, valence in entries)
    assert parse_lexicon(lexicon) == [Word("good", True), Word("bad", False)]


def test_vader_lexicon_has_the_words_that_the_demo_speaks_of():
    words = load_words()
    train, test = split_words(words, seed=0)
    assert (len(train), len(test)) == (5407, 1802)
    assert len({word.text for word in words}) == len(words)
    assert majority_share(words) == pytest.approx(0.558, abs=5e-4)
    polarity = {word.text: word.positive for word in words}
    assert polarity["happy"]
    assert not polarity["terrible"]


def test_split_is_a_partition_fixed_by_the_seed():
    train, test = split_words(WORDS, seed=3)
    assert len(test) == 5
    assert sorted(word.text for word in train + test) == sorted(word.text for word in WORDS)
    assert (train, test) == split_words(WORDS, seed=3)
    assert (train, test) != split_words(WORDS, seed=4)


def test_majority_share_counts_either_class():
    assert majority_share(WORDS) == 13 / 20
    assert majority_share([Word("a", True), Word("b", True), Word("c", False)]) == 2 / 3


def test_batches_go_through_all_words_before_a_word_comes_again():
    batches = list(itertools.islice(shuffled_batches(WORDS, batch_size=5, seed=0), 8))
    first, second = (list(itertools.chain(*batches[part : part + 4])) for part in (0, 4))
    assert set(first) == set(second) == set(WORDS)
    assert first != second
    assert batches == list(itertools.islice(shuffled_batches(WORDS, batch_size=5, seed=0), 8))
    assert {len(batch) for batch in itertools.islice(shuffled_batches(WORDS, batch_size=7, seed=0), 8)} == {7}


@pytest.mark.parametrize("batch_size", [0, 21])
def test_batch_size_out_of_range_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must be in 1\.\.20.*got {batch_size}"):
        next(shuffled_batches(WORDS, batch_size, seed=0))


def test_peak_is_the_most_held_at_one_time():
    def run():
        first = torch.empty(1000)
        del first
        both = [torch.empty(500), torch.empty(700)]
        del both

    assert peak_bytes(run) == 4 * 1200


def test_saved_bytes_count_activations_once_and_parameters_not():
    layer = nn.Linear(8, 4, bias=False)
    x = torch.ones(3, 8, requires_grad=True)

    def forward():
        hidden = layer(x)  # saves x and the weight
        return (hidden * hidden).sum()  # saves hidden, twice

    assert saved_for_backward_bytes(layer, forward) == 4 * (3 * 8 + 3 * 4)


def test_median_seconds_are_in_the_order_of_the_runs():
    calls = []
    slow, fast = median_seconds([lambda: calls.append(sum(range(10**6))), lambda: calls.append(0)], rounds=3)
    assert slow > fast > 0
    assert len(calls) == 6


def test_models_take_turns_at_going_first_on_the_same_batches_and_seeds():
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def step(self, batch, seed):
            calls.append((self.name, batch, seed))

    steps = list(train_in_turn([Recorder(name) for name in "abc"], ["x", "y"], seed=7))
    assert steps == [1, 2]
    assert calls == [("a", "x", 7), ("b", "x", 7), ("c", "x", 7), ("b", "y", 8), ("c", "y", 8), ("a", "y", 8)]


def outcome(**changes) -> Outcome:
    """An outcome with nothing to complain about, but for `changes`."""
    stock = Run("stock", [0.7, 0.5, 0.3], [0.3, 0.2, 0.1], 0.9, peak_bytes=3, saved_bytes=2, trainable=1)
    fused = dataclasses.replace(stock, name="fused", seconds=[0.1, 0.1, 0.1])
    good = Outcome(stock, fused, majority=0.56, own_dropout=1.1, reload_difference=1e-6)
    return dataclasses.replace(good, **changes)


def fused_losses(*losses: float) -> Run:
    return dataclasses.replace(outcome().fused, losses=list(losses))


def test_good_outcome_has_no_failures():
    assert failures(outcome()) == []
    assert outcome().speedup == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fused": fused_losses(0.7, 0.5 * (1 + 1.1 * TOLERANCE), 0.3)}, "losses differ by up to 1.1e-04"),
        ({"fused": fused_losses(0.7, math.nan, 0.3)}, "losses differ by up to nan"),
        (
            {"own_dropout": 0.4},
            "stock's takes 0.80 times as long",
        ),  # nn.Dropout would be faster
        ({"reload_difference": 2 * TOLERANCE}, "saved adapter gives other outputs"),
        ({"reload_difference": math.nan}, "saved adapter gives other outputs"),
    ],
)
def test_each_failure_is_one_sentence(changes, sentence):
    (found,) = failures(outcome(**changes))
    assert sentence in found


def test_differences_are_relative_to_the_first():
    torch.testing.assert_close(
        relative_differences([2.0, -4.0], [2.5, -4.0]), torch.tensor([0.25, 0.0], dtype=torch.float64)
    )


def test_note_on_accuracy_only_where_it_differs():
    assert len(notes(outcome())) == 1
    assert len(notes(outcome(fused=dataclasses.replace(outcome().fused, accuracy=0.91)))) == 2


@pytest.mark.parametrize(
    ("result", "status", "verdict"),
    [(outcome(), 0, "PASSED"), (outcome(own_dropout=0.1), 1, "FAILED Our step is not faster")],
)
def test_exit_status_and_plot(monkeypatch, capsys, tmp_path, result, status, verdict):
    monkeypatch.setattr(comparison, "compare", lambda *_: result)
    assert demo.main(["--output", str(tmp_path / "new")]) == status
    assert verdict in capsys.readouterr().out
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--batch-size", "-1"], ["--quick", "--steps", "9"]])
def test_options_without_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_quick_is_fifty_steps():
    assert demo.parse_options(["--quick"]).steps == 50


@pytest.fixture(scope="module")
def model() -> peft.PeftModel:
    """The demo's starting point; copy before changing it."""
    return add_lora(load_encoder(seed=0), seed=0).train()


def test_unequal_masks_are_noticed(model):
    """Without shared masks the comparison must not pass for one: it stops at the first step."""
    fused = copy.deepcopy(model)
    pk.replace_layers(fused)
    batch = Tokenizer()(WORDS[:4])
    with pytest.raises(RuntimeError, match="different random numbers in step 0"):
        next(train_side_by_side(Trainer(copy.deepcopy(model), 1, 1e-3), Trainer(fused, 1, 1e-3), [batch]))


def test_shared_masks_are_the_fused_ones(model):
    """Equal amounts of random numbers would also be drawn by unequal masks; equal losses need equal masks."""
    stock, fused = copy.deepcopy(model), copy.deepcopy(model)
    share_dropout_masks(stock)
    pk.replace_layers(fused)
    batch = Tokenizer()(WORDS)
    with torch.no_grad():  # adapters start as the identity; give them a say
        for name, parameter in itertools.chain(stock.named_parameters(), fused.named_parameters()):
            if "lora_B" in name:
                parameter.fill_(0.01)
    losses = []
    for network, seed in ((stock, 0), (fused, 0), (fused, 1)):
        torch.manual_seed(seed)
        losses.append(network(**batch).loss.item())
    same, other = (relative_differences(losses[:1], [loss]).item() for loss in losses[1:])
    assert same < 1e-6 < TOLERANCE < other


def test_three_steps_on_the_real_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "TIMING_ROUNDS", 1)
    monkeypatch.setattr(comparison, "load_words", lambda: load_words()[::20])
    screen = io.StringIO()
    result = comparison.compare(3, 8, tmp_path, Console(file=screen, width=120))
    assert len(result.stock.losses) == len(result.fused.losses) == 3
    assert float(result.loss_differences.max()) < 1e-6
    assert result.reload_difference < 1e-5
    assert result.fused.trainable == result.stock.trainable > 300_000
    assert result.fused.saved_bytes < 0.8 * result.stock.saved_bytes
    assert result.fused.peak_bytes < 0.8 * result.stock.peak_bytes
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in Path(tmp_path).iterdir()
    }
    assert "37 of 37 layers fused" in screen.getvalue()
