"""Hooks fire as on the stock model; parametrized or pruned weights are left to it, with a reason."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import inputs, models, run, stock_and_fused
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import parametrizations, parametrize, prune

from peft_kernels.surgery import explain, replace_layers, restore_layers
from surgery.peft_models import assert_close, layer, make_mlp, philox

Log = list[tuple[str, Any]]
EACH_MODEL = pytest.mark.parametrize("name", models())


def shapes(values: Any) -> Any:
    """What a hook was given, without the numbers."""
    if isinstance(values, torch.Tensor):
        return tuple(values.shape), values.dtype
    return [shapes(value) for value in values] if isinstance(values, (tuple, list)) else values


def watch(module: Any, log: Log) -> None:
    """Every kind of hook that a module can have."""
    module.register_forward_pre_hook(lambda _, args: log.append(("forward pre", shapes(args))))
    module.register_forward_hook(lambda _, args, y: log.append(("forward", shapes((args, y)))))
    module.register_full_backward_pre_hook(lambda _, g: log.append(("backward pre", shapes(g))))
    module.register_full_backward_hook(lambda _, gx, gy: log.append(("backward", shapes((gx, gy)))))


def watch_tensor(tensor: torch.Tensor, name: str, log: Log) -> None:
    tensor.register_hook(lambda grad: log.append((f"gradient of {name}", grad.clone())))
    if tensor.is_leaf:
        tensor.register_post_accumulate_grad_hook(
            lambda t: log.append((f"accumulated {name}", shapes(t.grad)))
        )


def step(model: nn.Module, log: Log) -> torch.Tensor:
    """Forward and backward with hooks on x, on y and on every parameter that is trained."""
    x = inputs().requires_grad_()
    watch_tensor(x, "x", log)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            watch_tensor(parameter, name, log)
    y = run(model, x)
    watch_tensor(y, "y", log)
    y.square().sum().backward()
    return y


def assert_same_events(got: Log, expected: Log) -> None:
    """The same hooks with the same shapes and close numbers. Gradients of one layer may come in any order."""
    assert sorted(name for name, _ in got) == sorted(name for name, _ in expected)
    for (name, a), (_, b) in zip(sorted(got, key=key), sorted(expected, key=key), strict=True):
        if isinstance(a, torch.Tensor):
            assert_close(a, b)
        else:
            assert a == b, name


def key(event: tuple[str, Any]) -> str:
    name, value = event
    return name if isinstance(value, torch.Tensor) else f"{name} {value}"


@EACH_MODEL
def test_hooks_of_modules_and_tensors(name: str) -> None:
    """On replaced layers themselves: they fire, and the layers stay fused."""
    logs: list[Log] = [[], []]
    pair = stock_and_fused(name)
    for model, log in zip(pair, logs, strict=True):
        for row in explain(pair[1]).rows:
            watch(model.get_submodule(row.name), log)
        step(model, log)
    assert_same_events(*reversed(logs))
    assert len(logs[1]) > 4 * len(explain(pair[1]))
    assert all(row.fused and not row.reason for row in explain(pair[1]))


@EACH_MODEL
def test_hooks_that_change_values(name: str) -> None:
    stock, fused = stock_and_fused(name)
    for model in (stock, fused):
        target: Any = model.get_submodule(explain(fused).rows[0].name)
        if name != "bottleneck adapter":  # whose result is a tuple
            target.register_forward_hook(lambda _, args, y: y * 2)
        target.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))
        target.register_full_backward_pre_hook(
            lambda _, grads: tuple(g if g is None else g * 3 for g in grads)
        )
    logs: list[Log] = [[], []]
    results = [step(model, log) for model, log in zip((stock, fused), logs, strict=True)]
    assert_close(*results)
    assert_same_events(*reversed(logs))


@EACH_MODEL
def test_global_hooks(name: str) -> None:
    """Hooks on every module fire on sub-layers as well, which must then be called: stock, with a reason."""
    stock, fused = stock_and_fused(name)
    philox(fused)
    logs: list[Log] = [[], []]
    for model, log in zip((stock, fused), logs, strict=True):
        handles = [
            register_module_forward_pre_hook(lambda m, args, log=log: log.append(("pre", type(m).__name__))),
            register_module_forward_hook(lambda m, args, y, log=log: log.append(("hook", type(m).__name__))),
            register_module_full_backward_hook(lambda m, *_, log=log: log.append(("back", type(m).__name__))),
        ]
        run(model, inputs().requires_grad_()).square().sum().backward()
        reason = "every module has hooks (torch.nn.modules.module.register_module_...)"
        if name != "Linear4bit":  # which has no sub-layers
            assert all(reason in row.reason for row in explain(fused).rows)
        for handle in handles:
            handle.remove()
    assert logs[0] == logs[1]
    run(fused, inputs())
    assert all(row.fused and not row.reason for row in explain(fused).rows)


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


COMPUTED = "lora_A: its parameters are computed, by torch.nn.utils.parametrize"
CHANGES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "parametrize": (lambda m: parametrize.register_parametrization(m, "weight", Twice()), COMPUTED),
    "weight_norm": (parametrizations.weight_norm, COMPUTED),
    "spectral_norm": (parametrizations.spectral_norm, COMPUTED),
    "orthogonal": (parametrizations.orthogonal, COMPUTED),
    "old weight_norm": (nn.utils.weight_norm, "lora_A: it has hooks"),
    "old spectral_norm": (nn.utils.spectral_norm, "lora_A: it has hooks"),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "lora_A: it has hooks"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("first", ["replaced first", "changed first"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_computed_weights(base: str, change: str, first: str) -> None:
    """Left alone with the reason, with stock's numbers and gradients; afterwards restore_layers works."""
    stock = make_mlp(base)
    fused = copy.deepcopy(stock)
    apply, reason = CHANGES[change]
    if first == "replaced first":
        replace_layers(fused, strict=True)
    for model in (stock, fused):
        torch.manual_seed(5)
        apply(layer(model).lora_A["default"])
    if first == "changed first":
        replace_layers(fused)
    row = explain(fused).rows[0]
    assert (row.fused, row.reason) == (False, reason)
    for index in range(2):
        if index:
            restore_layers(fused)
        results: list[Any] = []
        for model in (stock, fused):
            model.zero_grad()
            y = model(inputs())
            y.square().sum().backward()
            results.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(results[0]) >= 5
        for a, b in zip(*results, strict=True):
            assert_close(b, a)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_parametrized_layer_that_was_replaced(base: str) -> None:
    """torch gives the layer itself a subclass of the fused class: it goes on, copies and is restored."""
    stock = layer(make_mlp(base)).base_layer if base == "nf4" else layer(make_mlp("ia3 dense"))
    fused = copy.deepcopy(stock)
    replace_layers(fused, strict=True)
    target = "bias" if base == "nf4" else "weight"
    for model in (stock, fused):
        where = model if base == "nf4" else model.base_layer
        parametrize.register_parametrization(where, target, Twice())
    assert_close(fused(inputs()), stock(inputs()))
    assert_close(copy.deepcopy(fused)(inputs()), stock(inputs()))
    with pytest.raises(RuntimeError, match=r"parametrized modules is only supported through state_dict"):
        pickle.dumps(fused if base == "nf4" else fused.base_layer)  # torch's own refusal
    restore_layers(fused)
    assert type(fused).__mro__[1:] == type(stock).__mro__[1:]  # the first is torch's, of each layer its own
    assert torch.equal(fused(inputs()), stock(inputs()))
    where = fused if base == "nf4" else fused.base_layer
    parametrize.remove_parametrizations(where, target)
    assert type(where) in (nn.Linear, type(layer(make_mlp("nf4")).base_layer))
