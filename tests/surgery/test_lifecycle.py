"""What PEFT and torch do to a model works on a fused one, with the results it has on a stock one."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.ia3 import Linear as IA3Linear
from peft.tuners.ia3 import bnb as ia3_bnb
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import bnb as lora_bnb
from peft_models import (
    BASES,
    IA3_BASES,
    add_second_adapter,
    assert_close,
    fill_adapter,
    layer,
    make_llama,
    make_mlp,
    pair,
    quantise,
    states_equal,
    tokens,
)
from safetensors.torch import load_file
from torch import nn

from peft_kernels.surgery import explain, replace_layers, restore_layers


def bits_of(model: nn.Module) -> Any:
    """Keys and bytes of the state_dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def stock_and_fused(kind: str) -> tuple[PeftModel, PeftModel]:
    """A stock model and its fused copy, training, both with an adapter that does something."""
    stock, fused = pair(make_mlp(kind))
    replace_layers(fused, strict=True)
    return stock, fused


@pytest.fixture(params=(*BASES, *IA3_BASES))
def models(request: pytest.FixtureRequest) -> tuple[PeftModel, PeftModel]:
    """Every kind of model."""
    return stock_and_fused(request.param)


@pytest.fixture(params=(*BASES, *(kind for kind in IA3_BASES if "nf4" not in kind)))
def mergeable(request: pytest.FixtureRequest) -> tuple[PeftModel, PeftModel]:
    """Those that PEFT can merge: not IA3 over 4 bits."""
    return stock_and_fused(request.param)


X = torch.linspace(-2, 2, 5 * 64).reshape(5, 64)


def test_state_dict_is_untouched(models: tuple[PeftModel, PeftModel]) -> None:
    stock, fused = models
    fused(X)
    assert states_equal(stock, fused)
    assert_same_bits(dict(stock.named_parameters()), dict(fused.named_parameters()))


def test_class_looks_like_the_stock_class(models: tuple[PeftModel, PeftModel]) -> None:
    stock, fused = models
    assert repr(fused) == repr(stock)
    for a, b in zip(stock.modules(), fused.modules(), strict=True):
        assert isinstance(b, type(a))
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(a), attribute) == getattr(type(b), attribute)
    stock_classes = (LoraLinear, lora_bnb.Linear4bit, IA3Linear, ia3_bnb.Linear4bit)
    assert isinstance(layer(fused), stock_classes)
    assert type(layer(fused)) not in stock_classes


def test_adapter_file_round_trip(models: tuple[PeftModel, PeftModel], tmp_path: Path) -> None:
    """What a fused model saves is what a stock one saves, and loads into either."""
    stock, fused = models
    for name, model in (("stock", stock), ("fused", fused)):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "fused")]
    assert_same_bits(*files)
    expected = fused(X)
    fill_adapter(fused, seed=9)
    assert not torch.allclose(fused(X), expected)
    fused.load_adapter(tmp_path / "fused", "again")
    fused.set_adapter("again")
    assert torch.equal(fused(X), expected)
    assert all(row.fused for row in explain(fused))
    if isinstance(layer(stock), ia3_bnb.Linear4bit):
        return  # which PEFT cannot unload
    bare = stock.unload()
    loaded = PeftModel.from_pretrained(bare, tmp_path / "fused").train()
    assert_close(loaded(X), expected)


def test_adapters_come_and_go(models: tuple[PeftModel, PeftModel]) -> None:
    """A second adapter, on the fused layers: added, used, deleted; each step as on the stock model."""
    for model in models:
        add_second_adapter(model)
        model.set_adapter("second")
    stock, fused = models
    assert all(row.fused for row in explain(fused))
    assert_close(fused(X), stock(X))
    for model in models:
        model.set_adapter("default")
        model.delete_adapter("second")
    assert_close(fused(X), stock(X))
    with stock.disable_adapter(), fused.disable_adapter():
        assert_close(fused(X), stock(X))


def test_adapter_on_new_targets_is_stock_until_replaced_again() -> None:
    model = make_mlp("nf4", target_modules=["0"])
    assert [row.fused for row in replace_layers(model)] == [True, True]  # the second is a bare Linear4bit
    model.add_adapter("second", LoraConfig(target_modules=["2"], r=2))
    fill_adapter(model, "second")
    model.set_adapter("second")
    rows = explain(model).rows
    assert [(row.layer, row.fused) for row in rows] == [("lora.Linear4bit", True), ("lora.Linear4bit", False)]
    assert rows[1].reason == "a stock layer; replace_layers fuses it"
    stock_result = model(X)
    assert [row.fused for row in replace_layers(model, strict=True)] == [True, True]
    assert_close(model(X), stock_result)


def test_merge_and_unmerge(mergeable: tuple[PeftModel, PeftModel]) -> None:
    """PEFT puts a new Params4bit in place; the fused layer must notice, both ways."""
    stock, fused = models = mergeable
    before = fused(X)
    for model in models:
        model.merge_adapter()
    assert_close(fused(X), stock(X))
    assert_same_bits(bits_of(stock), bits_of(fused))
    assert {row.reason for row in explain(fused)} == {"merged into the base weight: default"}
    merged = fused(X)
    for model in models:
        model.unmerge_adapter()
    assert_close(fused(X), stock(X))
    assert_same_bits(bits_of(stock), bits_of(fused))
    assert not torch.equal(fused(X), merged)
    if layer(fused).__class__.__name__ == "Linear":
        assert_close(fused(X), before)  # over 4 bits unmerging does not give back W


def test_merge_and_unload(mergeable: tuple[PeftModel, PeftModel]) -> None:
    stock, fused = (model.merge_and_unload() for model in mergeable)
    assert_close(fused(X), stock(X))
    assert_same_bits(bits_of(stock), bits_of(fused))
    assert all(row.fused and row.layer == "bitsandbytes.Linear4bit" for row in explain(fused))
    restore_layers(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in stock.modules()]


def torch_copy(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, torch_copy, *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(6))],
    ids=["deepcopy", "torch.save", *(f"pickle protocol {p}" for p in range(6))],
)
def test_copies_are_fused_and_independent(
    models: tuple[PeftModel, PeftModel], make_copy: Callable[[Any], Any]
) -> None:
    _, fused = models
    expected = fused(X)
    copied = make_copy(fused)
    assert torch.equal(copied(X), expected)
    assert explain(copied) == explain(fused)
    assert all(row.fused for row in explain(copied))
    assert type(layer(copied)) is type(layer(fused))
    assert "_nf4_cache" not in make_copy(fused).base_model.model[0].base_layer.__dict__
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(fused(X), expected), "the copy shares memory with the original"
    assert not torch.equal(copied(X), expected), "the copy computes with the original's weights"


def test_restored_layers_are_stock_again(models: tuple[PeftModel, PeftModel]) -> None:
    stock, fused = models
    fused(X)
    restore_layers(fused)
    for a, b in zip(stock.modules(), fused.modules(), strict=True):
        assert type(a) is type(b)
        assert set(a.__dict__) == set(b.__dict__)
    assert torch.equal(fused(X), stock(X))
    restore_layers(fused)  # harmless
    assert replace_layers(fused, strict=True)


def test_checkpoint_of_the_whole_model(models: tuple[PeftModel, PeftModel]) -> None:
    """load_state_dict copies into the parameters the fused layers use."""
    _, fused = models
    expected, state = fused(X), copy.deepcopy(fused.state_dict())
    fill_adapter(fused, seed=9)
    assert not torch.allclose(fused(X), expected)
    adapter = {key: value for key, value in state.items() if "lora_" in key or "ia3_l" in key}
    assert fused.load_state_dict(adapter, strict=False).unexpected_keys == []
    assert torch.equal(fused(X), expected)


def test_casting_a_dense_model() -> None:
    cast_before, cast_after = pair(make_mlp())
    replace_layers(cast_before.bfloat16())
    replace_layers(cast_after)
    cast_after(X)
    cast_after.bfloat16()
    assert torch.equal(cast_after(X.bfloat16()), cast_before(X.bfloat16()))
    assert explain(cast_after).rows[0].reason == ""


def test_gradient_checkpointing_of_transformers() -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_llama("nf4", lora_dropout=0.2)
        replace_layers(model, strict=True)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(1)
        batch = tokens()
        model(input_ids=batch, labels=batch).loss.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == 12
    for plain, checkpointed in zip(*results, strict=True):
        assert_close(checkpointed, plain)


def test_eval_after_training_and_training_after_eval() -> None:
    """On AVX512-BF16 CPUs a stock Linear4bit cannot train any more once it was evaluated; a fused one can."""
    model = nn.Sequential(nn.Linear(64, 128, bias=False))
    quantise(model, "nf4")
    replace_layers(model, strict=True)
    trained = model.train()(X)
    with torch.no_grad():
        assert torch.equal(model.eval()(X), trained)
    x = X.clone().requires_grad_()
    model.train()(x).sum().backward()
    weight = bnb.functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state)
    assert_close(x.grad, weight.sum(0).expand(5, 64))
