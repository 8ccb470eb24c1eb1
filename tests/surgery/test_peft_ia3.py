"""Fused IA3 layers compute what PEFT's own do, and leave to PEFT what they cannot compute."""

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, get_peft_model
from peft.tuners.ia3 import bnb as ia3_bnb
from peft.tuners.ia3.layer import Linear as StockLinear
from peft_models import IA3_BASES, add_second_adapter, assert_close, layer, linear4bit, make_mlp, pair
from torch import nn
from transformers.pytorch_utils import Conv1D

from numerics import Tensors, assert_within, bound, gamma, gradients
from peft_kernels import NF4Weight
from peft_kernels.surgery import explain, replace_layers

# Roundings to a 16-bit dtype besides the last. Fused: the product of two vectors; an operand; the weight, or
# the GEMM's result; z or the sum of g; the product's gradient; that times the other vector. PEFT rounds after
# every step: two more.
ROUNDINGS, STOCK_ROUNDINGS = 6, 8
KINDS = ("dense", "nf4", "nf4_double")


def make_stock(kind: str, linear: nn.Linear, feedforward: bool, vectors: list[torch.Tensor]) -> Any:
    """PEFT's layer over `linear` with an active adapter for each vector."""
    names = [f"adapter{i}" for i in range(len(vectors))]
    if kind == "dense":
        stock: Any = StockLinear(linear, names[0], config=IA3Config(), is_feedforward=feedforward)
    else:
        stock = ia3_bnb.Linear4bit(linear4bit(linear, kind), names[0], IA3Config(), feedforward)
    for name, vector in zip(names, vectors, strict=True):
        stock.update_layer(name, IA3Config())
        stock.ia3_l[name].data = vector.reshape((1, -1) if feedforward else (-1, 1)).clone()
    stock.set_adapter(names)
    for parameter in stock.base_layer.parameters():
        parameter.requires_grad_(False)
    return stock


def run(ia3: Any, x: torch.Tensor, grad: torch.Tensor) -> Tensors:
    """Output and gradients of one call; PEFT's output may have another dtype than x."""
    x = x.detach().requires_grad_()
    y = ia3(x)
    vectors = list(ia3.ia3_l.values())
    grads = torch.autograd.grad(y, [x, *vectors], grad.to(y.dtype).reshape(y.shape))
    named = {f"l{i}": g.flatten() for i, g in enumerate(grads[1:])}
    return {"y": y.detach().flatten(0, -2), "x": grads[0].flatten(0, -2), **named}


def exact_weight(base: nn.Linear) -> torch.Tensor:
    """float64 [N, K], unrounded."""
    if not isinstance(base, bnb.nn.Linear4bit):
        return base.weight.double()
    return NF4Weight.from_bitsandbytes(base.weight).dequantize(torch.float32).double()


@settings(max_examples=480, derandomize=True, deadline=None, database=None)
@given(
    kind=st.sampled_from(KINDS),
    feedforward=st.booleans(),
    bias=st.booleans(),
    dtypes=st.sampled_from([(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]),
    adapters=st.integers(1, 2),
    leading=st.sampled_from([(), (2,)]),
    m=st.integers(1, 40),
    n=st.integers(2, 90),  # bitsandbytes takes two packed weights, one byte, for a transposed matrix
    k=st.one_of(st.sampled_from([64, 128, 192]), st.integers(2, 130)),
    seed=st.integers(0, 2**32 - 1),
)
def test_agrees_with_peft(
    kind: str,
    feedforward: bool,
    bias: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    adapters: int,
    leading: tuple[int, ...],
    m: int,
    n: int,
    k: int,
    seed: int,
) -> None:
    """Outputs and all gradients of random layers, ours and PEFT's, within rounding of float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    dtype, vector_dtype = dtypes
    linear = nn.Linear(k, n, bias).to(dtype)
    linear.weight.data = (normal(n, k) / k**0.5).to(dtype)
    if bias:
        linear.bias.data = normal(n).to(dtype)
    vectors = [1 + 0.3 * normal(k if feedforward else n).to(vector_dtype) for _ in range(adapters)]
    stock = make_stock(kind, linear, feedforward, vectors)
    fused = copy.deepcopy(stock)
    assert replace_layers(fused, strict=True).rows[0].fused
    x, grad = normal(*leading, m, k).to(dtype), normal(*leading, m, n).to(dtype)

    base = stock.base_layer
    inputs = {"x": x.flatten(0, -2)} | {f"l{i}": vector for i, vector in enumerate(vectors)}
    flat_grad, offset = grad.flatten(0, -2), base.bias.double() if bias else torch.zeros(n).double()

    def formula(t: Tensors, weight: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        x, *factors = (tensor.double() for tensor in t.values())
        product = torch.stack(factors).prod(0)
        return (x * product) @ weight.t() + offset if feedforward else (x @ weight.t() + offset) * product

    def results(t: Tensors, weight: torch.Tensor, offset: torch.Tensor, grad: torch.Tensor) -> Tensors:
        of = lambda t: formula(t, weight, offset)  # noqa: E731
        return {"y": of(t), **gradients(of, t, grad)}

    weight = exact_weight(base)
    exact = results(inputs, weight, offset, flat_grad)
    sizes = results(
        {name: t.abs() for name, t in inputs.items()}, weight.abs(), offset.abs(), flat_grad.abs()
    )
    count = x.numel() // k + n + k + 8  # products and sums that a term passes, over M, N and K
    for who, ia3, roundings in (("fused", fused, ROUNDINGS), ("PEFT's", stock, STOCK_ROUNDINGS)):
        if who != "fused" and kind != "dense" and k % base.weight.blocksize:
            continue  # bitsandbytes on a CPU mistakes the scales of rows that are not whole blocks
        for name, result in run(ia3, x, grad).items():
            allowed = bound(exact[name], sizes[name], count, result.dtype)
            if dtype == torch.bfloat16:
                allowed = allowed + gamma(roundings, dtype) * sizes[name]
            if who == "fused":
                assert result.dtype == (vector_dtype if name.startswith("l") else dtype)
            assert_within(f"{who} {name}", result, exact[name], allowed)
    assert explain(fused).rows[0].reason == ""


@pytest.mark.parametrize("base", IA3_BASES)
def test_output_keeps_the_dtype_of_the_input(base: str) -> None:
    """PEFT's over 4 bits is float32."""
    model = make_mlp(base, torch.bfloat16)
    replace_layers(model, strict=True)
    assert model(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    assert layer(model).ia3_l["default"].dtype == torch.float32
    assert {row.reason for row in explain(model)} == {""}


@pytest.mark.parametrize("base", ["ia3 dense", "ia3 nf4"])
def test_autocast(base: str) -> None:
    """Within what rounding x, the weight, an operand, the result and PEFT's every step can cause."""
    stock, fused = (layer(m) for m in pair(make_mlp(base)))
    replace_layers(fused, strict=True)
    x = torch.randn(24, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, y_fused = stock(x), fused(x)
    assert y.dtype == y_fused.dtype == (torch.bfloat16 if base == "ia3 dense" else torch.float32)
    weight, vector = exact_weight(stock.base_layer), stock.ia3_l["default"].detach().double().flatten()
    size = (x.double().abs() @ weight.abs().t() + stock.base_layer.bias.double().abs()) * vector.abs()
    assert_within(
        "y", y_fused.detach(), y.detach().double(), 2 * gamma(STOCK_ROUNDINGS, torch.bfloat16) * size
    )
    assert explain(fused).rows[0].reason == ""


@pytest.mark.parametrize("base", ["ia3 dense", "ia3 nf4"])
def test_several_active_adapters_multiply(base: str) -> None:
    stock, fused = pair(make_mlp(base))
    for model in (stock, fused):
        add_second_adapter(model)
        model.base_model.set_adapter(["default", "second"])
    assert replace_layers(fused, strict=True)
    x = torch.randn(5, 64)
    assert_close(fused(x), stock(x))
    assert {row.reason for row in explain(fused)} == {""}


def activate_one_without_weights_here(model: Any) -> None:
    model.add_adapter("second", IA3Config(target_modules=["2"], feedforward_modules=["2"]))
    model.set_adapter("second")


def activate_two_dtypes(model: Any) -> None:
    add_second_adapter(model)
    layer(model).ia3_l["second"].data = layer(model).ia3_l["second"].data.double()
    model.base_model.set_adapter(["default", "second"])


def replace_vector(model: Any) -> None:
    """As sharding does: the attribute is a tensor, and no longer a parameter."""
    ia3_l = layer(model).ia3_l
    ia3_l.__dict__["default"] = ia3_l._parameters.pop("default").data


STATES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "disabled": ("adapters are disabled", lambda m: m.base_model.disable_adapter_layers()),
    "adapter elsewhere": ("no active adapter on this layer", activate_one_without_weights_here),
    "two dtypes": ("the active adapters are torch.float32 and torch.float64", activate_two_dtypes),
    "sharded adapter": ("ia3_l: it is a Tensor, not a Parameter", replace_vector),
    "hook on base": (
        "base layer: it has hooks",
        lambda m: layer(m).base_layer.register_forward_hook(lambda *args: args[2] * 2),
    ),
    "adapter coarser than base": (
        "the adapter is torch.bfloat16, the layer computes in torch.float32",
        lambda m: layer(m).ia3_l.bfloat16(),
    ),
}
DENSE_STATES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "merged": ("merged into the base weight: default", lambda m: m.merge_adapter()),
    "trainable base": (
        "the base weight is trainable",
        lambda m: layer(m).base_layer.weight.requires_grad_(True),
    ),
}
BASE_ONLY = (
    "disabled",
    "adapter elsewhere",
)  # PEFT computes the base layer only; over 4 bits that stays fused


@pytest.mark.parametrize("state", [*STATES, *DENSE_STATES])
def test_dense_states(state: str) -> None:
    """PEFT's own result, bit for bit, and the reason."""
    reason, change = (STATES | DENSE_STATES)[state]
    stock, fused = pair(make_mlp("ia3 dense"))
    replace_layers(fused, strict=True)
    for model in (stock, fused):
        change(model)
    row = explain(fused).rows[0]
    assert not row.fused
    assert row.reason.startswith(reason)
    x = torch.randn(5, 64)
    assert torch.equal(layer(fused)(x), layer(stock)(x))


@pytest.mark.parametrize("state", STATES)
def test_4bit_states(state: str) -> None:
    """As above; the stock model has the fused base product, for the two to be comparable bit for bit."""
    reason, change = STATES[state]
    stock, fused = pair(make_mlp("ia3 nf4"))
    replace_layers(layer(stock).base_layer, strict=True)
    replace_layers(fused, strict=True)
    for model in (stock, fused):
        change(model)
    row = explain(fused).rows[0]
    assert row.fused == (state in BASE_ONLY)
    assert row.reason.startswith(reason)
    x = torch.randn(5, 64)
    assert torch.equal(layer(fused)(x), layer(stock)(x))


@pytest.mark.parametrize("feedforward", [False, True])
def test_explain_knows_which_layers_scale_their_input(feedforward: bool) -> None:
    size = 64 if feedforward else 32
    model = nn.Sequential(make_stock("nf4", nn.Linear(64, 32), feedforward, [torch.ones(size)]))
    replace_layers(model, strict=True)
    (work,) = explain(model).works
    assert work.product.input_scale == feedforward
    assert (", its input scaled" in str(explain(model))) == feedforward


def test_transposed_base() -> None:
    config = IA3Config(target_modules=["0"], feedforward_modules=[], fan_in_fan_out=True)
    stock, fused = pair(get_peft_model(nn.Sequential(Conv1D(128, 64)), config))
    assert replace_layers(fused).rows[0].reason == "fan_in_fan_out: the base weight is transposed"
    assert torch.equal(fused(x := torch.randn(3, 64)), stock(x))


def test_8_bit_base() -> None:
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))
    model.is_loaded_in_8bit = True
    fused = get_peft_model(model, IA3Config(target_modules=["0"], feedforward_modules=[]))
    rows = replace_layers(fused).rows
    assert [(row.layer, row.fused) for row in rows] == [
        ("ia3.Linear8bitLt", False),
        ("bitsandbytes.Linear8bitLt", False),
    ]
    assert rows[0].reason == "its base layer is in 8 bits; fused are NF4 and dense ones"


@pytest.mark.parametrize("base", ["ia3 dense", "ia3 nf4"])
def test_compile(base: str, fresh_compiler: None) -> None:
    model = make_mlp(base)
    replace_layers(model, strict=True)
    x = torch.randn(5, 64, requires_grad=True)
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = call(x)
        parameters = [p for p in model.parameters() if p.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *parameters])])
    assert len(results[0]) == 4
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager)


@pytest.mark.parametrize("base", IA3_BASES)
def test_training_side_by_side(base: str) -> None:
    """AdamW steps on a small regression: the losses are PEFT's, and fall."""
    x, target = torch.randn(64, 64), torch.randn(64, 32)
    losses: list[list[float]] = []
    for model in pair(make_mlp(base)):
        if losses:
            replace_layers(model, strict=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(5):
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
