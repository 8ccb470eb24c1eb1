"""The demo of methods: its verdict, its conclusions, its methods, and a few steps on the real encoder."""

import dataclasses
import io
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import demo_methods
import peft_kernels as pk
from peft_kernels.parameters import Kind, TrainableParameters
from peft_methods import comparison, tuning
from peft_methods.comparison import compare, layers_of, split
from peft_methods.methods import METHODS
from peft_methods.plot import save_plot
from peft_methods.results import (
    Layers,
    Outcome,
    Result,
    Run,
    as_json,
    cheapest,
    conclusions,
    failures,
    stock_notes,
    table,
)
from word_polarity.encoder import Tokenizer
from word_polarity.training import forward_backward
from word_polarity.words import load_words, split_words

# peft 0.21 asks transformers 5 for a property by its former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
NAMES = [method.name for method in METHODS]
BY_NAME = {method.name: method for method in METHODS}

BLOCKS, D, D_FF, RANK, BOTTLENECK = 6, 384, 1536, 8, 24
HEAD = 2 * D + 2
LORA = RANK * (
    BLOCKS * (4 * (D + D) + 2 * (D + D_FF)) + (D + D)
)  # all linear layers of a block, and the pooler
TRAINABLE = {
    "frozen probe": {},
    "IA3": {"IA3 vector": BLOCKS * (2 * D + D_FF)},
    "LoRA": {"LoRA A + B": LORA},
    "rsLoRA": {"LoRA A + B": LORA},
    "LoRA+": {"LoRA A + B": LORA},
    "DoRA": {"LoRA A + B": LORA, "DoRA magnitude": BLOCKS * (5 * D + D_FF) + D},
    "bottleneck": {"bottleneck adapter": BLOCKS * 2 * (2 * D * BOTTLENECK + BOTTLENECK + D)},
}


# Verdict and conclusions, on made-up figures.


def result(
    name: str, accuracies: list[float], trainable: int = 100, seconds: float = 0.1, **changes
) -> Result:
    parameters = TrainableParameters((Kind("other", 1, trainable, 4 * trainable),), 10_000)
    run = Run(Layers(3, 3, 2, 0), parameters, [9.0, seconds, seconds], [0.7, 0.6], 0.0)
    run = dataclasses.replace(run, **changes)
    runs = tuple(dataclasses.replace(run, accuracy=accuracy) for accuracy in accuracies)
    return Result(name, 1e-3, peak_bytes=trainable * 2**10, runs=runs)


PROBE = result("frozen probe", [0.68, 0.70], trainable=2)


def outcome(*adapted: Result, probe: Result = PROBE, test_words: int = 100_000) -> Outcome:
    return Outcome(
        (probe, *adapted), majority=0.57, test_words=test_words, seeds=(0, 1), steps=3, batch_size=16
    )


def test_good_outcome_has_no_failures():
    assert failures(outcome(result("LoRA", [0.71, 0.9]))) == []


@pytest.mark.parametrize(
    ("probe", "adapted", "sentence"),
    [
        (result("frozen probe", [0.6, 0.57]), result("LoRA", [0.9]), "frozen probe learns nothing: 57.0%"),
        (PROBE, result("IA3", [0.70, 0.9]), "IA3 is not clearly better than the frozen probe"),
        (PROBE, result("IA3", [math.nan, 0.9]), "IA3 is not clearly better"),
        (PROBE, result("LoRA", [0.9], losses=[0.7, math.nan]), "LoRA has a loss that is not finite"),
        (
            PROBE,
            result("LoRA", [0.9], layers=Layers(2, 3, 2, 0, ("query: the input is odd",))),
            "LoRA has layers that were fused and yet ran their stock forward: query: the input is odd",
        ),
    ],
)  # fmt: skip
def test_each_failure_is_one_sentence(probe, adapted, sentence):
    (found,) = failures(outcome(adapted, probe=probe))
    assert sentence in found


def test_methods_are_told_apart_by_all_seeds_and_beyond_the_choice_of_words():
    """Of n words, two shares near 0.9 differ by chance by 2 sqrt(2 0.9 0.1 / n): 1.9 points for n = 2000."""
    worse, better = result("LoRA", [0.880, 0.882]), result("DoRA", [0.899, 0.901])
    assert not outcome(test_words=1800).told_apart(better, worse)
    assert outcome(test_words=2200).told_apart(better, worse)
    assert not outcome(test_words=2200).told_apart(worse, better)
    assert not outcome(test_words=2200).told_apart(better, result("LoRA", [0.80, 0.899]))


def test_conclusions_are_computed():
    small = result("IA3", [0.75, 0.75], trainable=10, seconds=0.05)
    lora = result("LoRA", [0.88, 0.90], trainable=200, seconds=0.1)
    dora = result("DoRA", [0.89, 0.93], trainable=220, seconds=0.3)
    assert conclusions(outcome(small, lora, dora)) == [
        "Most accurate on average: DoRA, 91.0%.",
        "Seeds and test words do not tell it apart from LoRA. "
        "Cheapest of these 2, to within 5%, in time per step, memory and parameters: LoRA.",
        "Smallest: IA3. It gains 27% of what DoRA gains on the frozen probe with 4.5% of its parameters, in "
        "17% of its time and 5% of its memory.",
    ]
    clear = result("DoRA", [0.95, 0.96], trainable=220, seconds=0.3)
    assert len(conclusions(outcome(small, lora, clear))) == 2
    assert conclusions(outcome(small)) == ["Most accurate on average: IA3, 75.0%."]


def test_cheapest_names_all_that_cost_the_same():
    results = [
        result("LoRA", [0.9], trainable=200, seconds=0.103),
        result("rsLoRA", [0.9], trainable=200, seconds=0.1),
        result("DoRA", [0.9], trainable=208, seconds=0.2),
        result("IA3", [0.9], trainable=250, seconds=0.2),
    ]
    assert cheapest(results) == (
        "Cheapest of these 4, to within 5%, in time per step: LoRA and rsLoRA; "
        "in memory and parameters: LoRA, rsLoRA and DoRA."
    )


def test_stock_layers_are_said_to_be_stock():
    layers = Layers(36, 54, 18, 18)
    (note,) = stock_notes(outcome(result("LoRA", [0.9]), result("IA3", [0.9], layers=layers)))
    assert note.startswith("IA3: 36 of 54 layers fused; its adapter runs stock")
    assert not layers.all_fused
    # all layers that are listed may be fused, and the adapter be in none of them
    assert not Layers(37, 37, 18, 4).all_fused
    assert "in part stock" in Layers(37, 37, 18, 4).summary


def test_table_fits_a_narrow_terminal():
    screen = io.StringIO()
    Console(file=screen, width=80).print(
        table(outcome(result("bottleneck", [0.9, 0.91, 0.92], 359_810, layers=Layers(37, 55, 3, 3))))
    )
    text = screen.getvalue()
    assert "…" not in text
    for part in ("bottleneck", "359,810", "100.0", "91.0% (90.0–92.0)", "37/55 *"):
        assert part in text


def test_plot_and_figures(tmp_path):
    found = outcome(*(result(name, [0.8, 0.9], 100) for name in NAMES[1:]))
    save_plot(found, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads(json.dumps(as_json(found)))
    assert [method["name"] for method in figures["methods"]] == NAMES
    assert figures["methods"][1]["accuracies"] == [0.8, 0.9]
    assert figures["failures"] == []


@pytest.mark.parametrize(
    ("accuracy", "status", "verdict"), [(0.9, 0, "PASSED"), (0.6, 1, "FAILED LoRA is not clearly")]
)
def test_exit_status(monkeypatch, capsys, tmp_path, accuracy, status, verdict):
    monkeypatch.setattr(comparison, "compare", lambda *_: outcome(result("LoRA", [accuracy])))
    assert demo_methods.main(["--output", str(tmp_path / "new")]) == status
    assert verdict in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"methods.png", "methods.json"}


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seeds", "0"], ["--batch-size", "-1"]])
def test_options_without_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo_methods.main(arguments)
    assert f"{arguments[0]} must be at least 1" in capsys.readouterr().err


def test_unknown_method_is_refused():
    with pytest.raises(SystemExit, match=r"--tune must be given methods of frozen probe, IA3.*, got LoRa"):
        demo_methods.main(["--tune", "LoRA", "LoRa"])


# Data and learning rates.


def test_words_are_split_in_three():
    train, validation, test = split()
    assert (len(train), len(validation), len(test)) == (4326, 1081, 1802)
    assert len({word.text for word in (*train, *validation, *test)}) == len(load_words())
    assert test == split_words(load_words(), seed=0)[1]  # the words that `make demo` tests on


def test_best_rate_is_the_most_accurate_and_of_equals_the_lowest():
    assert tuning.best_rate([0.1, 0.7, 0.9, 0.9, 0.2, 0.1, 0.0, 0.0]) == tuning.RATES[2]


def test_learning_rates_are_those_that_the_page_shows_to_be_best():
    rows = re.findall(r"^\| ([\w+ ]+?) \| (\d.*%.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    best = {
        name: tuning.RATES[[cell.startswith("**") for cell in cells.split(" | ")].index(True)]
        for name, cells in rows
        if cells.count("%") == len(tuning.RATES)
    }
    assert best == {method.name: method.learning_rate for method in METHODS}


# The real encoder.


@pytest.mark.parametrize("name", NAMES)
def test_trainable_parameters_are_those_of_the_papers(name):
    found = {kind.name: kind.parameters for kind in pk.trainable_parameters(BY_NAME[name].build(0)).kinds}
    if "LoRA A" in found:
        found["LoRA A + B"] = found.pop("LoRA A") + found.pop("LoRA B")
    assert found == {"head or saved module": HEAD, **TRAINABLE[name]}


def test_lora_plus_trains_b_faster():
    method = BY_NAME["LoRA+"]
    trainer = method.trainer(method.build(0), 10, 1e-4)
    rates = {group["initial_lr"] for group in trainer._optimizer.param_groups if group["params"]}
    assert rates == {1e-4, 16 * 1e-4}


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_runs_fused(name):
    model = BY_NAME[name].build(0)
    forward_backward(model, Tokenizer()(load_words()[:4]))
    layers = layers_of(model)
    assert layers.total > 30
    assert layers.all_fused, layers


def test_a_layer_that_falls_back_is_not_counted_as_fused():
    model = BY_NAME["LoRA"].build(0)
    query = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    query.eval()(torch.ones(1, 384), adapter_names=["default"])
    layers = layers_of(model)
    assert (layers.fused, layers.total, layers.stock_tensors) == (36, 37, 2)
    assert "query: last call ran the stock forward" in layers.fell_back[0]


@pytest.mark.slow
def test_a_few_steps_of_every_method(monkeypatch):
    monkeypatch.setattr(comparison, "load_words", lambda: load_words()[::20])
    screen = io.StringIO()
    found = compare(METHODS, 3, 8, (0, 1), Console(file=screen, width=120))
    assert [row.name for row in found.results] == NAMES
    for row in found.results:
        assert len(row.runs) == 2
        assert row.runs[0].losses != row.runs[1].losses
        for run in row.runs:
            assert len(run.losses) == len(run.seconds) == 3
            assert all(math.isfinite(loss) for loss in run.losses)
        assert row.trainable == HEAD + sum(TRAINABLE[row.name].values())
        assert row.layers.fell_back == ()
    peaks = {row.name: row.peak_bytes for row in found.results}
    # AdamW holds two fp32 numbers per parameter after a step; activations of the probe end at the encoder
    assert all(row.peak_bytes > 2 * 4 * row.trainable for row in found.results)
    assert peaks["frozen probe"] < 0.5 * min(peaks[name] for name in NAMES[1:])
    text = screen.getvalue()
    assert all(name in text for name in itertools.chain(NAMES, ["37 of 37 layers fused"]))
