"""The report of `replace_layers` and `explain`: readable in 80 columns, and as data and Markdown."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_models import linear4bit
from rich.console import Console
from torch import nn

from peft_kernels.ops.linear.regimes import plans
from peft_kernels.surgery import Report, Row, replace_layers
from peft_kernels.surgery.names import patterns

STOCK = "a stock layer; replace_layers fuses it"


def llama(skipped: tuple[int, ...] = ()) -> Report:
    """As of a model with 32 layers of 7 projections; in some, q_proj is not fused."""
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    projections += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = [(i, f"base_model.model.model.layers.{i}.{p}") for i in range(32) for p in projections]
    stock = [(i in skipped and "q_proj" in name) for i, name in names]
    return Report(
        tuple(Row(n, "lora.Linear4bit", not s, STOCK * s) for (_, n), s in zip(names, stock, strict=True))
    )


def test_a_large_model_is_a_few_lines_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(llama(skipped=(3, 4, 9))).splitlines()
    assert lines[0] == "221 of 224 PEFT, adapters and bitsandbytes layers fused"
    assert lines[1] == "fused: 221 lora.Linear4bit"
    assert lines[2] == "    29  base_model.model.model.layers.0-2,5-8,10-31.self_attn.q_proj"
    assert lines[8] == "    32  base_model.model.model.layers.0-31.mlp.down_proj"
    assert lines[9] == f"not fused: 3 lora.Linear4bit: {STOCK}"
    assert lines[10:] == ["     3  base_model.model.model.layers.3-4,9.self_attn.q_proj"]
    assert max(map(len, lines)) <= 80


def test_every_layer_is_in_the_listing() -> None:
    report = llama(skipped=(3,))
    listed = [line.split()[-1] for line in report.listing().splitlines() if line.startswith("     1  ")]
    assert sorted(listed) == sorted(row.name for row in report)


def test_report_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readable in a log: plain characters, names whole, reasons wrapped, square brackets as they are."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    reason = (
        "its scaling is a tensor of shape [128], and so on, for longer than a line of this width has place"
    )
    report = Report(
        (Row("model.layers.0.q_proj", "lora.Linear", True, ""), Row("b", "lora.Linear", False, reason))
    )
    text = str(report)
    assert repr(report) == text  # what a notebook shows
    assert "\x1b" not in text
    assert text.startswith("1 of 2 PEFT, adapters and bitsandbytes layers fused\n")
    assert "     1  model.layers.0.q_proj\n" in text
    assert f"not fused: 1 lora.Linear: {reason}" in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 80
    console = Console(width=200)
    with console.capture() as captured:
        console.print(report)
    assert reason in captured.get()


def test_a_remark_on_a_fused_layer_is_shown_apart() -> None:
    rows = (
        Row("a", "lora.Linear", True, ""),
        Row("b", "lora.Linear", True, "last call ran the stock forward"),
    )
    assert str(Report(rows)).splitlines()[1:] == [
        *("fused: 1 lora.Linear", "     1  a"),
        *("fused: 1 lora.Linear: last call ran the stock forward", "     1  b"),
    ]


def test_reasons_are_counted() -> None:
    rows = [Row(str(i), "lora.Linear", i == 0, "" if i == 0 else f"reason {i % 2}") for i in range(6)]
    assert list(Report(tuple(rows)).reasons.items()) == [("reason 1", 3), ("reason 0", 2)]


def test_markdown_has_the_same_lines_as_the_text() -> None:
    report = llama(skipped=(3,))
    marked = report.to_markdown().replace("`", "").replace(" × ", " ").replace("- ", "")
    text = str(report)
    assert [line.split() for line in marked.splitlines() if line] == [
        line.split() for line in text.splitlines()
    ]
    assert report.to_markdown().splitlines()[2] == "- fused: 223 `lora.Linear4bit`"
    assert Report(()).to_markdown() == str(Report(()))


def test_data_is_json_and_complete() -> None:
    model = nn.Sequential(
        linear4bit(nn.Linear(64, 64)), linear4bit(nn.Linear(64, 64), compute_dtype=torch.half)
    )
    report = replace_layers(model, only="0")
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (data["schema_version"], data["total"], data["fused"]) == (1, 2, 1)
    assert data["reasons"] == {STOCK: 1}
    assert [Row(**layer) for layer in data["layers"]] == list(report)
    assert len(data["works"]) == len(report.works)
    for work, original in zip(data["works"], report.works, strict=True):
        assert work["layers"] == original.layers
        assert work["product"]["in_features"] == 64
        assert work["product"]["device"] == "cpu"
        assert getattr(torch, work["product"]["dtype"]) == original.product.dtype
        for direction, plan in original.plans.items():
            methods = [(r["first"], r["last"], r["method"]) for r in work["plans"][direction]]
            assert methods == [(r.first, r.last, r.method) for r in plan.regimes]


def test_report_says_how_nf4_products_are_computed() -> None:
    model = nn.Sequential(
        *(linear4bit(nn.Linear(64, 64)) for _ in range(2)),
        linear4bit(nn.Linear(64, 64), compute_dtype=torch.bfloat16),
    )
    report = replace_layers(model)
    assert [work.layers for work in report.works] == [2, 1]
    for work in report.works:
        assert work.plans == plans(work.product)
        assert str(work.plans["forward"]) in " ".join(str(report).split())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["q"], {"q": 1}),
        (["h.0.q", "h.1.q", "h.3.q"], {"h.0-1,3.q": 3}),
        (["h.0.q", "h.0.k"], {"h.0.q": 1, "h.0.k": 1}),
        (["h.0.e.0", "h.0.e.1", "h.1.e.0", "h.1.e.1"], {"h.0-1.e.0-1": 4}),
        (["h.0.e.0", "h.0.e.1", "h.1.e.0"], {"h.*.e.*": 3}),  # a range of each would say four
        (["h.2.e.0", "h.2.e.5"], {"h.2.e.0,5": 2}),
        (["10", "9"], {"9-10": 2}),
        ([], {}),
    ],
)
def test_patterns(names: list[str], expected: dict[str, int]) -> None:
    assert patterns(names) == expected


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from("qk"))))
def test_patterns_stand_for_those_names_and_no_others(layers: set[tuple[int, int, str]]) -> None:
    names = [f"h.{i}.e.{j}.{k}" for i, j, k in layers]
    found = patterns(names)
    assert sum(found.values()) == len(names)
    expanded = {name for pattern in found if "*" not in pattern for name in expand(pattern)}
    assert expanded <= set(names)
    starred = [pattern for pattern in found if "*" in pattern]
    assert len(expanded) == len(names) - sum(found[pattern] for pattern in starred)


def expand(pattern: str) -> list[str]:
    names = [""]
    for part in pattern.split("."):
        values = []
        for run in part.split(","):
            first, _, last = run.partition("-")
            values += (
                [str(i) for i in range(int(first), int(last or first) + 1)] if first.isdecimal() else [run]
            )
        names = [f"{name}.{value}".lstrip(".") for name in names for value in values]
    return names
