"""torch.compile takes a fused model as it takes a stock one: whole, and with the same results."""

from typing import Any

import pytest
import torch
from peft_models import BASES, assert_close, layer, linear4bit, make_mlp, pair
from torch import nn

from peft_kernels.surgery import replace_layers
from peft_kernels.surgery.bitsandbytes_linear import FusedLinear4bit

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def results(call: Any, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients, the dropout seed drawn afresh."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", BASES)
def test_training(base: str, dropout: float) -> None:
    model = make_mlp(base, lora_dropout=dropout)
    replace_layers(model, strict=True)
    call = compiled(model)
    for rows in (6, 3):  # the second recompiles with a symbolic size
        x = torch.randn(rows, 64)
        eager, traced = results(model, model, x), results(call, model, x)
        assert len(eager) == 6
        for a, b in zip(eager, traced, strict=True):
            assert_close(b, a)


@pytest.mark.parametrize("base", BASES)
def test_the_graph_contains_the_fused_op(base: str) -> None:
    model = make_mlp(base)
    replace_layers(model, strict=True)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=keep)(torch.randn(3, 64))
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count("peft_kernels.adapted_linear.default") == 2
    assert not [target for target in targets if "linear" in target and "peft_kernels" not in target]


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_states_are_guarded(base: str) -> None:
    """Switching and disabling adapters recompiles; nothing of an earlier state is baked in."""
    model = make_mlp(base)
    replace_layers(model, strict=True)
    call = compiled(model)
    x = torch.randn(3, 64)
    assert_close(call(x), model(x))
    with model.disable_adapter():
        assert_close(call(x), model(x))
    for lora in (layer(model), layer(model, "base_model.model.2")):
        lora.set_scale("default", 3.0)
    assert_close(call(x), model(x))


def test_weights_are_read_and_not_baked_in() -> None:
    bare, other = linear4bit(nn.Linear(64, 64), "nf4"), linear4bit(nn.Linear(64, 64), "nf4")
    other.bias = bare.bias
    replace_layers(nn.ModuleList([bare, other]))
    x = torch.randn(3, 64)
    before, expected = bare(x), other(x)
    call = compiled(bare)
    assert_close(call(x), before)
    bare.weight.data = other.weight.data
    bare.weight.quant_state.absmax = other.weight.quant_state.absmax
    assert_close(call(x), expected)


def test_replacing_after_compiling() -> None:
    stock, model = pair(make_mlp())
    call = compiled(model)
    x = torch.randn(3, 64)
    assert_close(call(x), stock(x))
    replace_layers(model)
    assert_close(call(x), stock(x))


def test_a_stock_layer_in_a_fused_graph() -> None:
    """Two active adapters: PEFT's forward is traced in place of the fused one, over the fused base."""
    model = make_mlp("nf4")
    replace_layers(model, strict=True)
    layer(model).lora_A["default"].register_forward_hook(lambda *args: args[2] * 2)
    assert isinstance(layer(model).base_layer, FusedLinear4bit)
    x = torch.randn(3, 64)
    assert_close(compiled(model)(x), model(x))
