"""replace_layers, restore_layers and explain as such: selection, all or nothing, idempotence, the report."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from peft_models import assert_close, layer, make_llama, make_mlp, pair
from torch import nn

from peft_kernels.surgery import Report, Row, explain, replace, replace_layers, restore_layers
from peft_kernels.surgery.bitsandbytes_linear import FusedLinear4bit
from peft_kernels.surgery.registry import FusedLayer


def types_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def fused_names(report: Report) -> list[str]:
    return [row.name.removeprefix("base_model.model.") for row in report.fused]


def test_replacing_twice_changes_nothing() -> None:
    model = make_mlp("nf4")
    report = replace_layers(model)
    once = types_of(model)
    assert replace_layers(model, strict=True) == report
    assert types_of(model) == once
    assert layer(model).stock_class is type(layer(make_mlp("nf4")))


def test_layers_of_one_type_share_a_class() -> None:
    model = make_mlp()
    replace_layers(model)
    assert type(layer(model)) is type(layer(model, "base_model.model.2"))


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("q_proj", ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ("layers.0.*", ["0.self_attn.q_proj", "0.self_attn.v_proj", "0.mlp.down_proj"]),
        (["*.1.mlp.down_proj", "layers.0.*.v_proj"], ["0.self_attn.v_proj", "1.mlp.down_proj"]),
        (["base_model.model.model.layers.1.mlp.down_proj"], ["1.mlp.down_proj"]),
        ("1.self_attn.[qv]_proj", ["1.self_attn.q_proj", "1.self_attn.v_proj"]),
        (lambda name, module: module.out_features == 32, ["0.self_attn.v_proj", "1.self_attn.v_proj"]),
        (lambda name, module: False, []),
    ],
)
def test_only(only: Any, expected: list[str]) -> None:
    model = make_llama()
    report = replace_layers(model, only=only)
    assert fused_names(report) == [f"model.layers.{name}" for name in expected]
    assert len(report) == 6
    assert {row.reason for row in report.skipped} <= {"a stock layer; replace_layers fuses it"}
    # A second call adds to the first.
    assert len(replace_layers(model).fused) == 6


@pytest.mark.parametrize("only", ["k_proj", ["q_proj", "nonsense"], "proj", "base_layer"])
def test_a_pattern_that_matches_nothing_is_an_error(only: Any) -> None:
    model = make_llama()
    before = types_of(model)
    name = only if isinstance(only, str) else only[1]
    with pytest.raises(ValueError, match=f"only must match .* got '{name}', which matches none"):
        replace_layers(model, only=only)
    assert types_of(model) == before
    with pytest.raises(ValueError, match=r"as a glob \(it is not read as a regular expression\)"):
        replace_layers(model, only=r".*\.0$")


@pytest.mark.parametrize("only", [nn.Linear, 3, [nn.Linear], ["q_proj", 3], nn.ReLU()], ids=repr)
def test_only_of_another_type(only: Any) -> None:
    with pytest.raises(TypeError, match="only must be a glob pattern, several of them, or a function"):
        replace_layers(make_mlp(), only=only)


def test_only_without_a_pattern() -> None:
    with pytest.raises(ValueError, match="only must have at least one pattern, got none"):
        replace_layers(make_mlp(), only=[])


@pytest.mark.parametrize("call", [replace_layers, restore_layers, explain])
@pytest.mark.parametrize("model", [None, "path"])
def test_a_model_that_is_none(call: Any, model: Any) -> None:
    with pytest.raises(TypeError, match=f"model must be an nn.Module, got {model!r}"):
        call(model)


def test_a_whole_model_in_the_wrong_place_is_not_printed_whole() -> None:
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(100)))
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got OrderedDict") as of_state:
        replace_layers(layers.state_dict())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="only must be a glob pattern") as of_only:
        replace_layers(make_mlp(), only=layers)  # type: ignore[arg-type]
    assert max(len(str(error.value)) for error in (of_state, of_only)) < 500


def test_strict_needs_a_layer() -> None:
    for model, only in ((nn.Sequential(nn.Linear(4, 4)), None), (make_mlp(), lambda name, module: False)):
        with pytest.raises(
            ValueError, match=r"strict=True requires PEFT, adapters or bitsandbytes layers .* got none"
        ):
            replace_layers(model, only=only, strict=True)


def test_a_failing_report_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_mlp("nf4")
    before = types_of(model)

    def fail(model: nn.Module) -> Report:
        raise MemoryError

    monkeypatch.setattr(replace, "explain", fail)
    with pytest.raises(MemoryError):
        replace_layers(model)
    assert types_of(model) == before


def test_strict_names_every_layer_and_changes_nothing() -> None:
    model = make_mlp(lora_bias=True)
    before = types_of(model)
    with pytest.raises(ValueError, match="2 of 2 cannot") as error:
        replace_layers(model, strict=True)
    assert "base_model.model.0: lora_bias: the adapter has a bias" in str(error.value)
    assert "base_model.model.2: lora_bias: the adapter has a bias" in str(error.value)
    assert types_of(model) == before


def test_strict_minds_only_the_selected_layers() -> None:
    model = make_mlp()
    layer(model).base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="1 of 2 cannot"):
        replace_layers(model, strict=True)
    assert fused_names(replace_layers(model, only="2", strict=True)) == ["2"]


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_failure_half_way_is_undone(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_mlp("nf4")
    stock, before = pair(model)[1], types_of(model)
    calls = []

    def fail_later(self: FusedLinear4bit) -> None:
        calls.append(self)
        if len(calls) > fails_at:
            raise MemoryError

    monkeypatch.setattr(FusedLinear4bit, "on_fused", fail_later)
    with pytest.raises(MemoryError):
        replace_layers(model)
    assert len(calls) == fails_at + 1
    assert types_of(model) == before
    x = torch.randn(3, 64)
    assert torch.equal(model(x), stock(x))


def test_a_failure_leaves_earlier_replacements_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_mlp("nf4")
    replace_layers(model, only="0")
    before = types_of(model)

    def fail(self: FusedLinear4bit) -> None:
        raise MemoryError

    monkeypatch.setattr(FusedLinear4bit, "on_fused", fail)
    with pytest.raises(MemoryError):
        replace_layers(model)
    assert types_of(model) == before
    assert fused_names(explain(model)) == ["0"]


def test_restoring_one_part_of_a_model() -> None:
    model = make_mlp("nf4")
    replace_layers(model)
    restore_layers(layer(model))
    assert fused_names(explain(model)) == ["2"]
    restore_layers(layer(model, "base_model.model.2").base_layer)
    row = explain(model).rows[1]
    assert row.reason == "base layer: not fused; call replace_layers(model) again"
    stock = make_mlp("nf4")
    restored = pair(model)[1]
    restore_layers(restored)
    x = torch.randn(3, 64)
    assert_close(model(x), restored(x))
    assert len(replace_layers(model, strict=True).fused) == 2
    assert [type(m) for m in restored.modules()] == types_of(stock)


def test_a_model_that_is_one_layer() -> None:
    lora = layer(make_mlp())
    assert replace_layers(lora).rows == (Row("", "lora.Linear", True, ""),)
    restore_layers(lora)
    assert not isinstance(lora, FusedLayer)


def test_shared_layers_are_listed_once() -> None:
    shared = layer(make_mlp())
    model = nn.Sequential(shared, nn.Identity(), shared)
    assert [row.name for row in replace_layers(model)] == ["0"]


def test_model_without_anything_to_replace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    report = replace_layers(model)
    assert (len(report), list(report), report.fused, report.skipped) == (0, [], (), ())
    assert str(report) == "no PEFT, adapters or bitsandbytes layers"


def test_surgery_imports_neither_peft_nor_bitsandbytes() -> None:
    """Importing PEFT takes seconds, and it need not be installed."""
    code = (
        "import sys, peft_kernels.surgery as s, torch;"
        "s.replace_layers(torch.nn.Linear(2, 2));"
        "sys.exit('peft' in sys.modules or 'bitsandbytes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
