"""Models of the `adapters` library, stock and fused side by side: results, compositions, life cycle."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_models import adapters, make_model, philox, randomise, run, run_with_gradients
from torch import nn

from peft_kernels.surgery import explain, replace_layers, restore_layers

ac = adapters.composition
CONFIGS: dict[str, Callable[..., Any]] = {
    "SeqBn": adapters.SeqBnConfig,
    "DoubleSeqBn": adapters.DoubleSeqBnConfig,
    "ParBn": adapters.ParBnConfig,
}
EVERY_OPTION = {
    "learned": {"scaling": "learned"},
    "channel": {"scaling": "channel"},
    "gating": {"use_gating": True},
    "norms": {"ln_before": True, "ln_after": True},
    "residual before norm": {"ln_after": True, "adapter_residual_before_ln": True},
    "dropout": {"dropout": 0.4},
    "post_add": {"residual_before_ln": "post_add", "original_ln_before": True},
}


def config(name: str = "SeqBn", **options: Any) -> Any:
    return CONFIGS[name](reduction_factor=4, **options)


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Up to rounding: the two sum in different orders, in a model of two layers.

    Some gradients, as of the bias of AdapterFusion's keys, are nothing but the rounding of larger ones.
    """
    assert got.keys() == expected.keys()
    noise = 1e-6 * max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=2e-4, atol=2e-5 * float(tensor.abs().max()) + noise, msg=name
        )


def fused_copy(stock: Any) -> Any:
    fused = copy.deepcopy(stock)
    assert all(row.fused for row in replace_layers(fused, strict=True))
    return fused


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_config(name: str, kind: str) -> None:
    stock = make_model(config(name), kind=kind)
    fused = fused_copy(stock)
    assert_close(run_with_gradients(fused), run_with_gradients(stock))
    assert len(explain(fused)) == (4 if name == "DoubleSeqBn" else 2)
    assert {row.layer for row in explain(fused)} <= {"adapters.Adapter", "adapters.ParallelAdapter"}


@pytest.mark.parametrize("option", EVERY_OPTION)
@pytest.mark.parametrize("name", ["SeqBn", "ParBn"])
def test_each_option(option: str, name: str) -> None:
    stock = make_model(config(name, **EVERY_OPTION[option]))
    philox(stock)
    assert_close(run_with_gradients(fused_copy(stock)), run_with_gradients(stock))


ACTIVATIONS = (
    "relu",
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "swish",
    "tanh",
    "leakyrelu",
    "leaky_relu",
    "linear",
)


@pytest.mark.parametrize("activation", ACTIVATIONS)  # fmt: skip
def test_each_activation(activation: str) -> None:
    stock = make_model(config(non_linearity=activation))
    assert_close(run_with_gradients(fused_copy(stock)), run_with_gradients(stock))


COMPOSITIONS: dict[str, Callable[[], Any]] = {
    "stack": lambda: ac.Stack("a0", "a1"),
    "fuse": lambda: ac.Fuse("a0", "a1"),
    "fuse over stack": lambda: ac.Stack("a2", ac.Fuse("a0", "a1")),
    "parallel": lambda: ac.Parallel("a0", "a1"),
    "batch split": lambda: ac.BatchSplit("a0", "a1", batch_sizes=[1, 3]),
    "split": lambda: ac.Split("a0", "a1", splits=[2, 4]),
    "average": lambda: ac.Average("a0", "a1", weights=[0.3, 0.7]),
}


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_compositions(composition: str) -> None:
    stock = make_model(config(), config(), config())
    setup = COMPOSITIONS[composition]()
    if "fuse" in composition:
        stock.add_adapter_fusion(ac.Fuse("a0", "a1"))
        randomise(stock)
        stock.train_adapter_fusion(ac.Fuse("a0", "a1"), unfreeze_adapters=True)
    else:
        stock.train_adapter(setup)
    stock.set_active_adapters(setup)
    fused = fused_copy(stock)
    expected = run_with_gradients(stock)
    assert len(expected) > 8
    assert_close(run_with_gradients(fused), expected)


def test_gating_scores() -> None:
    stock = make_model(config(use_gating=True))
    fused = fused_copy(stock)
    results = []
    for model in (stock, fused):
        model.set_active_adapters("a0")
        output = model(input_ids=torch.arange(6)[None], output_adapter_gating_scores=True)
        results.append([output[0], *(torch.as_tensor(score) for score in flat(output.adapter_gating_scores))])
    assert len(results[0]) == 3
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def flat(scores: Any) -> list[Any]:
    return [s for item in scores.values() for s in flat(item)] if isinstance(scores, dict) else [scores]


def test_returns_what_the_stock_layer_returns() -> None:
    stock = make_model(config(use_gating=True)).encoder.layer[0].output.adapters["a0"]
    fused = copy.deepcopy(stock)
    replace_layers(fused, strict=True)
    x, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    for arguments in ((x, residual), (x, residual, True)):
        for one, two in zip(fused(*arguments), stock(*arguments), strict=True):
            assert one.shape == two.shape
            assert one.dtype == two.dtype
            torch.testing.assert_close(one, two)
    with torch.autocast("cpu", torch.bfloat16):
        for one, two in zip(fused(x, residual), stock(x, residual), strict=True):
            assert one.dtype == two.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    stock = make_model(config("DoubleSeqBn")).to(dtype)
    fused = fused_copy(stock)
    got, exact = run_with_gradients(fused), run_with_gradients(copy.deepcopy(stock).double())
    expected = run_with_gradients(stock)
    assert {tensor.dtype for tensor in got.values()} == {dtype}

    def distance(results: Any) -> float:
        """Relative error by tensor, root mean square: that of a single tensor is an accident of rounding."""
        errors = [(results[name].double() - tensor).norm() / tensor.norm() for name, tensor in exact.items()]
        return float(torch.stack(errors).square().mean().sqrt())

    assert distance(got) <= 1.25 * distance(expected) + 1e-12  # as close to float64 as the library


def layer_of(model: Any) -> Any:
    return model.encoder.layer[0].output.adapters["a0"]


def change_activation(layer: Any) -> None:
    layer.non_linearity.f = nn.Hardswish()


REASONS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "phm": ({"phm_layer": True}, lambda _: None, "adapter_down: a PHMLayer, not an nn.Linear"),
    "activation": ({"non_linearity": "mish"}, lambda _: None, "no kernel has its activation, MishActivation"),
    "another activation": ({}, change_activation, "no kernel has its activation, Hardswish"),
    "hook": ({}, lambda a: a.adapter_up.register_forward_hook(lambda *_: None), "adapter_up: it has hooks"),
    "hook on the sequence": (
        {}, lambda a: a.adapter_down.register_forward_hook(lambda *_: None), "adapter_down: it has hooks"
    ),
    "more layers": ({}, lambda a: a.adapter_down.append(nn.Identity()), "adapter_down: its layers are not"),
    "dropout": ({}, lambda a: setattr(a, "dropout", nn.AlphaDropout(0.0)), "dropout: a AlphaDropout, not an"),
    "dtype": ({}, lambda a: a.adapter_up.half(), "a parameter is torch.float16, the layer computes in"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_falls_back_with_a_reason(case: str) -> None:
    options, change, reason = REASONS[case]
    layer = layer_of(make_model(config(**options)))
    change(layer)
    model = nn.ModuleList([layer])
    row = replace_layers(model).rows[0]
    assert not row.fused
    assert row.reason.startswith(reason)
    if case not in ("dtype", "phm"):  # which cannot run alone
        stock = copy.deepcopy(model)
        restore_layers(stock)
        x = torch.randn(2, 3, 32)
        torch.manual_seed(1)
        expected = stock[0](x, x)
        torch.manual_seed(1)
        for one, two in zip(model[0](x, x), expected, strict=True):
            assert torch.equal(one, two)


def test_stochastic_depth_falls_back_in_training_only() -> None:
    layer = layer_of(make_model(config()))
    layer.DropPath = nn.Dropout(0.5)  # torchvision's StochasticDepth behaves like it where it is told apart
    model = nn.ModuleList([layer])
    assert replace_layers(model).rows[0].reason == "stochastic depth"
    model.eval()
    assert explain(model).rows[0].fused


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ((torch.randn(2, 3, 32), torch.randn(3, 32)), "the residual is [3, 32], the input [2, 3, 32]"),
        ((torch.randn(2, 3, 32), torch.randn(2, 3, 32).half()), "the residual is torch.float16, the layer"),
    ],
)
def test_inputs_that_fall_back(inputs: tuple[torch.Tensor, torch.Tensor], reason: str) -> None:
    layer = layer_of(make_model(config()))
    stock = copy.deepcopy(layer)
    model = nn.ModuleList([layer])
    replace_layers(model, strict=True)
    for one, two in zip(layer(*inputs), stock(*inputs), strict=True):
        assert torch.equal(one, two)
    assert explain(model).rows[0].reason.startswith(f"last call ran the stock forward: {reason}")
    layer(inputs[0], inputs[0])
    assert explain(model).rows[0].reason == ""


def test_gating_of_two_dimensions_falls_back() -> None:
    layer = layer_of(make_model(config(use_gating=True)))
    stock, x = copy.deepcopy(layer), torch.randn(3, 32)
    replace_layers(layer, strict=True)
    assert torch.equal(layer(x, x)[0], stock(x, x)[0])


def test_forward_mode_falls_back() -> None:
    layer = layer_of(make_model(config()))
    replace_layers(layer, strict=True)
    x = torch.randn(3, 32)
    _, tangent = torch.func.jvp(lambda t: layer(t, t)[0], (x,), (torch.ones_like(x),))
    assert tangent.abs().max() > 0


def test_other_methods_of_the_library_are_listed() -> None:
    model = make_model(config())
    assert len(explain(model)) == 2
    assert {row.reason for row in explain(model)} == {"a stock layer; replace_layers fuses it"}
    model.add_adapter("lora", config="lora")
    rows = replace_layers(model).rows
    assert [row.fused for row in rows if row.layer == "adapters.Adapter"] == [True, True]
    others = [row for row in rows if row.layer != "adapters.Adapter"]
    assert others
    assert {row.reason for row in others} == {"no fused kernel for this type of layer"}


def test_fused_again_and_restored() -> None:
    stock = make_model(config())
    fused = fused_copy(stock)
    replaced = layer_of(fused)
    assert replace_layers(fused, strict=True)
    assert layer_of(fused) is replaced
    assert repr(fused) == repr(stock)
    assert list(fused.state_dict()) == list(stock.state_dict())
    run(fused)
    restore_layers(fused)
    for one, two in zip(fused.modules(), stock.modules(), strict=True):
        assert type(one) is type(two)
        assert set(one.__dict__) == set(two.__dict__)
    assert torch.equal(run(fused), run(stock))


def torch_copy(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, torch_copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_and_independent(make_copy: Callable[[Any], Any]) -> None:
    layer = layer_of(make_model(config(non_linearity="swish")))
    replace_layers(layer, strict=True)
    x = torch.randn(2, 3, 32)
    expected = layer(x, x)[0]
    copied = make_copy(layer)
    assert torch.equal(copied(x, x)[0], expected)
    assert explain(copied).rows[0].fused
    with torch.no_grad():
        copied.adapter_up.weight.zero_()
    assert torch.equal(layer(x, x)[0], expected)


def test_train_and_eval() -> None:
    stock = make_model(config(dropout=0.5))
    philox(stock)
    fused = fused_copy(stock)
    for mode in (False, True, False):
        stock.train(mode), fused.train(mode)
        torch.testing.assert_close(run(fused), run(stock))
    assert not torch.allclose(run(fused), run(fused.train()))


def test_adapters_come_and_go() -> None:
    stock = make_model(config())
    fused = fused_copy(stock)
    for model in (stock, fused):
        torch.manual_seed(8)
        model.add_adapter("later", config=config("ParBn"))
        randomise(model, seed=5)
        model.train_adapter("later")
        model.set_active_adapters("later")
    assert [row.fused for row in explain(fused)] == [True, False] * 2
    assert_close(run_with_gradients(fused), run_with_gradients(stock))
    assert all(row.fused for row in replace_layers(fused, strict=True))
    assert_close(run_with_gradients(fused), run_with_gradients(stock))
    for model in (stock, fused):
        model.set_active_adapters("a0")
        model.delete_adapter("later")
    torch.testing.assert_close(run(fused), run(stock))
    for model in (stock, fused):
        model.set_active_adapters(None)
    assert torch.equal(run(fused), run(stock))


@pytest.mark.parametrize("safe", [False, True])
def test_saved_adapters_load_both_ways(tmp_path: Path, safe: bool) -> None:
    stock = make_model(config("DoubleSeqBn", scaling="learned"))
    fused = fused_copy(stock)
    for name, saver, loader in (("one", fused, stock), ("two", stock, fused)):
        saver.save_adapter(str(tmp_path / name), "a0", use_safetensors=safe)
        expected = run(saver.eval())
        loader.eval().delete_adapter("a0")
        loader.load_adapter(str(tmp_path / name), use_safetensors=safe, set_active=True)
        torch.testing.assert_close(run(loader), expected)
    replace_layers(fused, strict=True)
    torch.testing.assert_close(run(fused), expected)


def test_gradient_checkpointing() -> None:
    results = []
    for checkpointing in (False, True):
        model = make_model(config("DoubleSeqBn", dropout=0.3))
        replace_layers(model, strict=True)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        results.append(run_with_gradients(model))
    results[1] = {name: results[1][name] for name in results[0]}
    assert_close(*results)


def test_compiles() -> None:
    layer = layer_of(make_model(config()))
    replace_layers(layer, strict=True)
    x = torch.randn(2, 3, 32)
    compiled = torch.compile(lambda t: layer(t, t)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x, x)[0])
