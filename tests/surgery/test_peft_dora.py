"""PEFT's DoRA layers, fused: the numbers of PEFT's own forward, and what happens to the norms they keep."""

import copy
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft_models import (
    BASES,
    adapt,
    assert_close,
    fill_adapter,
    layer,
    linear4bit,
    make_llama,
    make_mlp,
    pair,
    philox,
    quantise,
    tokens,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from dora_problem import DoRAProblem
from factories import Problem
from numerics import Tensors, gamma
from peft_kernels.surgery import explain, replace_layers, restore_layers

# How often PEFT's layer rounds to the dtype it computes in, one step after the other, for a term of its
# result: W, B A, scaling, their sum, the norm, g, g - 1, D(x), its product, x A^T, u B^T, scaling, g, bias
# out and in, the sums; for a gradient the same in reverse.
STOCK_ROUNDINGS = 32


def make_dora(base: str = "dense", dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """Linear, GELU, Linear with a DoRA adapter on both, magnitudes that are not the norms."""
    model = make_mlp(base, dtype, use_dora=True, **config)
    stretch(model)
    return model


def stretch(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(torch.linspace(0.5, 2.0, parameter.numel()))


def leaves_of(dora: Any) -> Tensors:
    """The parameters of a layer's adapter, by the names of `dora_linear`."""
    return {
        "lora_a": dora.lora_A["default"].weight,
        "lora_b": dora.lora_B["default"].weight,
        "magnitude": dora.lora_magnitude_vector["default"].weight,
    }


def run(dora: Any, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    """Output and gradients of one call, its dropout seed drawn from a generator in the same state."""
    leaves = {"x": x.detach().requires_grad_(), **leaves_of(dora)}
    torch.manual_seed(5)
    y = dora(leaves["x"])
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    return y.detach(), dict(zip(leaves, grads, strict=True))


def problem_of(stock: Any, x: torch.Tensor, grad: torch.Tensor) -> DoRAProblem:
    """What a DoRA layer has to compute for x [M, K]."""
    base, weight = stock.base_layer, stock.base_layer.weight.data
    kernel_weight = weight
    if isinstance(base, bnb.nn.Linear4bit):
        kernel_weight = pk.NF4Weight.from_bitsandbytes(base.weight)
        weight = kernel_weight.dequantize(torch.float32)
    torch.manual_seed(5)
    parameters = leaves_of(stock)
    magnitude = parameters.pop("magnitude").detach()
    tensors = {"x": x, **parameters} | ({} if base.bias is None else {"bias": base.bias})
    problem = Problem(
        tensors={name: tensor.detach() for name, tensor in tensors.items()},
        weight=kernel_weight,
        exact_weight=weight.double(),
        grad=grad,
        scaling=stock.scaling["default"],
        dropout_p=getattr(stock.lora_dropout["default"], "p", 0.0) if stock.training else 0.0,
        seed=int(torch.randint(0, 2**63 - 1, ())),
    )
    return DoRAProblem(problem, magnitude)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """A PEFT DoRA layer and an input for it."""
    base = draw(st.sampled_from(BASES))
    k = draw(st.integers(1, 70)) if base == "dense" else 64 * draw(st.integers(1, 3))
    return {
        "base": base,
        "shape": (draw(st.integers(1, 70)), k),
        "tokens": draw(st.integers(1, 30)),
        "r": draw(st.integers(1, 9)),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "fp32_adapter": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.25])),
        "use_rslora": draw(st.booleans()),
        "training": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(case=layers())
def test_random_layers_agree_with_peft(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    (n, k), dtype = case["shape"], case["dtype"]
    model = nn.Sequential(nn.Linear(k, n, bias=case["bias"], dtype=dtype))
    if case["base"] != "dense":
        quantise(model, case["base"])
    config = {"r": case["r"], "lora_dropout": case["dropout"], "use_rslora": case["use_rslora"]}
    stock, fused = (
        layer(m).train(case["training"])
        for m in pair(
            adapt(model, ["0"], use_dora=True, autocast_adapter_dtype=case["fp32_adapter"], **config)
        )
    )
    for dora in (stock, fused):
        stretch(dora)
    philox(stock)
    assert replace_layers(fused, strict=True).rows[0].fused
    x, grad = torch.randn(case["tokens"], k).to(dtype), torch.randn(case["tokens"], n).to(dtype)
    dora = problem_of(stock, x, grad)
    dora.check(*run(fused, x, grad))
    # PEFT casts x to the dtype of the adapter, but rounds the base's product to that of the base.
    dora.check(*run(stock, x, grad), extra=gamma(STOCK_ROUNDINGS, dtype))
    assert explain(fused).rows[0].reason == ""


@pytest.mark.parametrize("base", BASES)
def test_training_side_by_side(base: str) -> None:
    """Four AdamW steps of a transformers model, dropout included: the losses are the same."""
    stock, fused = pair(make_llama(base, lora_dropout=0.1, use_dora=True))
    philox(stock)
    assert len(replace_layers(fused, strict=True)) == (6 if base == "dense" else 14)
    batch = tokens()
    losses: list[list[float]] = []
    for model in (stock, fused):
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < 0.97 * losses[0][0], "nothing was learnt"
    assert {row.reason for row in explain(fused)} == {""}


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_eval_follows_training_merging_and_switching(base: str) -> None:
    stock, fused = pair(make_dora(base))
    replace_layers(fused, strict=True)
    x = torch.randn(3, 64)
    for model in (stock, fused):
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False  # its bf16 kernel in eval mode
        model.eval()
    assert_close(fused(x), stock(x))
    for model in (stock, fused):  # a step in eval mode, by an ordinary optimizer
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(x).square().mean().backward()
        optimizer.step()
    assert_close(fused(x), stock(x))
    for model in (stock, fused):
        model.add_adapter("second", model.peft_config["default"])
        model.set_adapter("second")
        fill_adapter(model, "second", seed=2)
        stretch(model)
    assert_close(fused(x), stock(x))
    for model in (stock, fused):
        model.set_adapter("default")
    assert_close(fused(x), stock(x))
    with stock.disable_adapter(), fused.disable_adapter():
        assert_close(fused(x), stock(x))
    if base == "dense":
        for model in (stock, fused):
            model.merge_adapter()
        assert "merged into the base weight" in explain(fused).rows[0].reason
        assert_close(fused(x), stock(x))
        for model in (stock, fused):
            model.unmerge_adapter()
        assert_close(fused(x), stock(x))
    assert {row.reason for row in explain(fused)} == {""}


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_in_training_mode_nothing_is_kept(base: str) -> None:
    """Optimizers that write past torch's notice, and then eval mode."""
    stock, fused = (model.eval() for model in pair(make_dora(base)))
    for module in stock.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    replace_layers(fused, strict=True)
    x = torch.randn(3, 64)
    fused(x)
    for model in (stock, fused):
        model.train()(x)
        layer(model).lora_B["default"].weight.data.mul_(3.0)
        model.eval()
    assert_close(fused(x), stock(x))


def test_peft_writes_the_base_weight_past_torch() -> None:
    """An OLoRA takes its start out of the base weight, through `.data`."""
    stock, fused = (model.eval() for model in pair(make_dora()))
    replace_layers(fused, strict=True)
    x = torch.randn(3, 64)
    fused(x)
    for model in (stock, fused):
        torch.manual_seed(0)
        model.add_adapter("olora", LoraConfig(target_modules=["0", "2"], init_lora_weights="olora"))
        model.set_adapter("default")
    assert_close(fused(x), stock(x))


def test_merging_another_adapter_in_bf16_and_back_leaves_another_weight() -> None:
    model = make_dora(dtype=torch.bfloat16).eval()
    model.add_adapter("plain", LoraConfig(target_modules=["0", "2"], lora_alpha=400, init_lora_weights=False))
    replace_layers(model, strict=True)
    dora, x = layer(model), torch.randn(3, 64).bfloat16()
    dora(x)
    dora.merge(adapter_names=["plain"])
    dora.unmerge()
    y = dora(x)
    pk.invalidate_norms(model)
    assert torch.equal(dora(x), y)


def test_writes_past_torch_need_invalidate_norms() -> None:
    stock, fused = (model.eval() for model in pair(make_dora()))
    replace_layers(fused, strict=True)
    x = torch.randn(3, 64)
    fused(x)
    for model in (stock, fused):
        layer(model).lora_B["default"].weight.data.mul_(3.0)
    pk.invalidate_norms(fused)
    assert_close(fused(x), stock(x))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_saving_copying_and_restoring(base: str, tmp_path: Path) -> None:
    stock, fused = (model.eval() for model in pair(make_dora(base)))
    replace_layers(fused, strict=True)
    x = torch.randn(3, 64)
    y = fused(x)
    assert list(fused.state_dict()) == list(stock.state_dict())
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert "_scale_cache" not in layer(copied).__dict__
        assert torch.equal(copied(x), y)
    fused.save_pretrained(tmp_path)
    fresh = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
    for i in (0, 2):
        fresh[i] = copy.deepcopy(layer(stock, f"base_model.model.{i}").base_layer)
    fresh.is_loaded_in_4bit = base == "nf4"  # how PEFT knows
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    replace_layers(loaded, strict=True)
    assert torch.equal(loaded(x), y)
    restore_layers(fused)
    assert "_scale_cache" not in layer(fused).__dict__
    assert type(layer(fused)) is type(layer(stock))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_repeats_the_mask(use_reentrant: bool) -> None:
    model = make_dora("nf4_double", lora_dropout=0.5)
    replace_layers(model, strict=True)
    x = torch.randn(6, 64, requires_grad=True)
    results = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in (x, *model.parameters()) if p.grad is not None)])
        x.grad = None
        model.zero_grad()
    plain, checkpointed = results
    assert len(plain) == 8
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_compile(base: str, training: bool, fresh_compiler: None) -> None:
    model = make_dora(base).train(training)
    replace_layers(model, strict=True)
    x = torch.randn(3, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), model(x))
    with torch.no_grad():
        layer(model).lora_B["default"].weight.mul_(2.0)
    assert_close(compiled(x), model(x))


def test_a_zero_row() -> None:
    """PEFT's result is NaN there (peft #2049)."""
    linear = nn.Linear(64, 128)
    with torch.no_grad():
        linear.weight[5] = 0.0
    model = adapt(nn.Sequential(linear), ["0"], use_dora=True)
    with torch.no_grad():
        layer(model).lora_B["default"].weight[5] = 0.0
    stock, fused = (layer(m) for m in pair(model))
    replace_layers(fused, strict=True)
    x = torch.randn(3, 64)
    assert stock(x)[:, 5].isnan().all()
    assert torch.equal(fused(x)[:, 5], fused.base_layer.bias[5].expand(3))


def test_a_layer_in_eval_mode_ignores_a_dropout_in_training_mode() -> None:
    stock, fused = (layer(m).eval() for m in pair(make_dora(lora_dropout=0.5)))
    for dora in (stock, fused):
        dora.lora_dropout["default"].train()
    replace_layers(fused, strict=True)
    x = torch.randn(3, 64)
    assert_close(fused(x), stock(x))


def test_what_is_left_to_peft() -> None:
    stock, fused = pair(make_dora())
    hook = layer(fused).lora_magnitude_vector["default"].register_forward_hook(lambda *args: None)
    reason = replace_layers(fused).rows[0].reason
    assert reason.startswith("lora_magnitude_vector: ")
    x = torch.randn(3, 64)
    assert torch.equal(layer(fused)(x), layer(stock)(x))  # bit for bit: the very same forward
    hook.remove()
    assert explain(fused).rows[0].fused
    fused.eval()
    stock.eval()
    names = ["default", "__base__", "default"]
    with pytest.raises(ValueError, match="DoRA"):
        layer(stock)(x, adapter_names=names)
    with pytest.raises(ValueError, match="DoRA"):
        layer(fused)(x, adapter_names=names)


def test_dtypes_and_classes_that_are_left_to_peft() -> None:
    dora = layer(make_dora())
    replace_layers(dora, strict=True)
    dora.lora_magnitude_vector["default"].half()
    assert "the adapter is torch.float16, the layer computes in torch.float32" in explain(dora).rows[0].reason

    class OtherVector(type(dora.lora_magnitude_vector["default"])):
        pass

    dora = layer(make_dora())
    dora.lora_magnitude_vector["default"].__class__ = OtherVector
    reason = replace_layers(dora).rows[0].reason
    assert reason == "lora_magnitude_vector: a OtherVector, not a DoraLinearLayer"


def test_report_of_a_4bit_dora_layer_has_its_product() -> None:
    model = nn.Sequential(linear4bit(nn.Linear(64, 128)))
    model.is_loaded_in_4bit = True
    report = replace_layers(adapt(model, ["0"], use_dora=True), strict=True)
    assert [work.layers for work in report.works] == [1]
