"""What cannot be fused runs the stock forward, bit for bit, and `explain` says why."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from peft_models import adapt, add_second_adapter, assert_close, layer, make_mlp, pair
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_kernels.surgery import explain, replace_layers


class OtherDropout(nn.Dropout):
    """A user's own dropout."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * 0.5


class OtherLinear(nn.Linear):
    """A user's own linear layer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class OtherTensor(torch.Tensor):
    """A weight that is not plain data, as DTensor or torchao's quantised tensors are."""


def activate_two(model: Any) -> None:
    add_second_adapter(model)
    model.base_model.set_adapter(["default", "second"])


def activate_one_without_weights_here(model: Any) -> None:
    model.add_adapter("second", LoraConfig(target_modules=["2"], r=2))
    model.set_adapter("second")


def set_dropout(dropout: nn.Module) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        layer(model).lora_dropout["default"] = dropout

    return change


def own_forward(module: Any) -> None:
    module.forward = MethodType(lambda self, x: type(self).forward(self, x) * 2, module)


def replace_weight(module: Any, weight: torch.Tensor) -> None:
    """As sharding does: the attribute is a tensor, and no longer a parameter."""
    del module.weight
    module.weight = weight


STATES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "disabled": ("adapters are disabled", lambda m: m.base_model.disable_adapter_layers()),
    "merged": ("merged into the base weight: default", lambda m: m.merge_adapter()),
    "two adapters": ("several active adapters: default, second", activate_two),
    "adapter elsewhere": ("no active adapter on this layer", activate_one_without_weights_here),
    "hook on lora_A": (
        "lora_A: it has hooks",
        lambda m: layer(m).lora_A["default"].register_forward_hook(lambda *args: args[2] * 2),
    ),
    "hook on lora_B": (
        "lora_B: it has hooks",
        lambda m: layer(m).lora_B["default"].register_forward_pre_hook(lambda _, x: (x[0] * 2,)),
    ),
    "hook on base": (
        "base layer: it has hooks",
        lambda m: layer(m).base_layer.register_forward_hook(lambda *args: args[2] * 2),
    ),
    "backward hook": (
        "lora_A: it has hooks",
        lambda m: layer(m).lora_A["default"].register_full_backward_hook(lambda *args: None),
    ),
    "backward pre-hook": (
        "lora_B: it has hooks",
        lambda m: layer(m).lora_B["default"].register_full_backward_pre_hook(lambda *args: None),
    ),
    "hook on dropout": (
        "lora_dropout: it has hooks",
        lambda m: layer(m).lora_dropout["default"].register_forward_hook(lambda *args: args[2] * 2),
    ),
    "forward on lora_A": (
        "lora_A: it has a forward of its own",
        lambda m: own_forward(layer(m).lora_A["default"]),
    ),
    "forward on base": (
        "base layer: it has a forward of its own",
        lambda m: own_forward(layer(m).base_layer),
    ),
    "forward on layer": (
        "it has a forward of its own",
        lambda m: setattr(layer(m), "forward", layer(m).base_layer.forward),
    ),
    "lora_A and lora_B differ": (
        "lora_A is torch.float32, lora_B torch.float64",
        lambda m: layer(m).lora_B["default"].double(),
    ),
    "scaling is a vector": (
        "its scaling is a tensor of shape [128]",
        lambda m: layer(m).scaling.update(default=torch.linspace(0, 1, 128)),
    ),
    "dropout of another class": (
        "lora_dropout: a OtherDropout, not an nn.Dropout",
        set_dropout(OtherDropout(0.1)),
    ),
    "dropout of everything": ("lora_dropout: p must be below 1", set_dropout(nn.Dropout(1.0))),
    "dropout in place": ("lora_dropout: p must be below 1", set_dropout(nn.Dropout(0.5, inplace=True))),
    "adapter tensor of another class": (
        "lora_A: its weight is a NoneType",
        lambda m: replace_weight(
            layer(m).lora_A["default"], layer(m).lora_A["default"].weight.data.as_subclass(OtherTensor)
        ),
    ),
}
DENSE_STATES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "trainable base": (
        "the base weight is trainable",
        lambda m: layer(m).base_layer.weight.requires_grad_(True),
    ),
    "sharded base": (
        "base layer: its weight is a NoneType",
        lambda m: replace_weight(layer(m).base_layer, layer(m).base_layer.weight.data),
    ),
    "adapter finer than base": (
        "the adapter is torch.float64, the layer computes in torch.float32",
        lambda m: (layer(m).lora_A.double(), layer(m).lora_B.double()),
    ),
    "adapter coarser than base": (
        "the adapter is torch.bfloat16, the layer computes in torch.float32",
        lambda m: (layer(m).lora_A.bfloat16(), layer(m).lora_B.bfloat16()),
    ),
}
# PEFT computes the base layer only, and over 4 bits that stays fused.
BASE_ONLY = ("disabled", "merged", "adapter elsewhere")


def outcome(model: nn.Module, x: torch.Tensor) -> Any:
    """What a call returns, or the error it raises."""
    torch.manual_seed(3)
    try:
        return model(x.clone())
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("state", [*STATES, *DENSE_STATES])
def test_dense_states(state: str) -> None:
    """PEFT's own result, bit for bit (errors too), and the reason; also if the state came before fusing."""
    reason, change = (STATES | DENSE_STATES)[state]
    stock, fused = pair(make_mlp())
    replace_layers(fused, strict=True)
    for model in (stock, fused):
        change(model)
    row = explain(fused).rows[0]
    assert not row.fused
    assert row.reason.startswith(reason)
    x = torch.randn(5, 64)
    expected, got = outcome(layer(stock), x), outcome(layer(fused), x)
    assert type(expected) is type(got)
    assert expected == got if isinstance(expected, str) else torch.equal(expected, got)
    assert replace_layers(stock).rows[0] == row
    with pytest.raises(ValueError, match=r"(?s)strict=True.*base_model\.model\.0: " + reason[:10]):
        replace_layers(stock, strict=True)


@pytest.mark.parametrize("state", STATES)
def test_4bit_states(state: str) -> None:
    """As above; the stock model has the fused base product, for the two to be comparable bit for bit."""
    reason, change = STATES[state]
    stock, fused = pair(make_mlp("nf4"))
    for name in ("base_model.model.0", "base_model.model.2"):
        replace_layers(layer(stock, name).base_layer, strict=True)
    replace_layers(fused, strict=True)
    for model in (stock, fused):
        change(model)
    row = explain(fused).rows[0]
    assert row.fused == (state in BASE_ONLY)
    assert row.reason.startswith(reason) or row.reason.startswith(f"base layer: {reason}")
    x = torch.randn(5, 64)
    expected, got = outcome(layer(stock), x), outcome(layer(fused), x)
    assert type(expected) is type(got)
    assert expected == got if isinstance(expected, str) else torch.equal(expected, got)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_state_that_ends_leaves_the_layer_fused(base: str) -> None:
    model = make_mlp(base)
    replace_layers(model, strict=True)
    x = torch.randn(5, 64)
    before = model(x)
    with model.disable_adapter():
        assert not torch.equal(model(x), before)
        assert "disabled" in explain(model).rows[0].reason
    assert torch.equal(model(x), before)
    add_second_adapter(model)
    model.base_model.set_adapter(["default", "second"])
    assert not explain(model).rows[0].fused
    model.set_adapter("second")
    assert explain(model).rows[0].fused
    assert not torch.equal(model(x), before)
    model.set_adapter("default")
    assert torch.equal(model(x), before)
    hook = layer(model).lora_A["default"].register_forward_hook(lambda *args: None)
    assert not explain(model).rows[0].fused
    hook.remove()
    assert explain(model).rows[0].fused


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"lora_bias": True}, "lora_bias: the adapter has a bias"),
        ({"alora_invocation_tokens": [1]}, "adapter variant ALoraLinearVariant"),
    ],
)
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported for CAUSAL_LM:UserWarning")
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_variants(base: str, config: dict[str, Any], reason: str) -> None:
    stock, fused = pair(make_mlp(base, **config))
    assert {row.reason for row in replace_layers(fused)} == {reason}
    if base == "nf4":
        replace_layers(layer(stock).base_layer)
    x = torch.randn(5, 64)
    assert torch.equal(layer(fused)(x), layer(stock)(x))


def test_transposed_base() -> None:
    model = adapt(nn.Sequential(Conv1D(128, 64)), ["0"], fan_in_fan_out=True)
    stock, fused = pair(model)
    assert replace_layers(fused).rows[0].reason == "fan_in_fan_out: the base weight is transposed"
    assert torch.equal(fused(x := torch.randn(3, 64)), stock(x))


def test_base_of_another_class() -> None:
    stock, fused = pair(adapt(nn.Sequential(OtherLinear(64, 128)), ["0"]))
    assert replace_layers(fused).rows[0].reason == "base layer: a OtherLinear, not an nn.Linear"
    assert torch.equal(fused(x := torch.randn(3, 64)), stock(x))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_adapter_names(base: str) -> None:
    """Mixed batches are the multi-adapter family's business; until then they are PEFT's."""
    model = make_mlp(base).eval()
    add_second_adapter(model)
    model.set_adapter("default")
    stock, fused = (layer(m) for m in pair(model))
    replace_layers(fused, strict=True)
    x = torch.randn(3, 64)
    names = ["default", "second", "__base__"]
    stock.base_layer.support_avx512bf16_for_cpu = False  # no bf16 kernel in eval mode
    assert_close(fused(x, adapter_names=names), stock(x, adapter_names=names))
    assert explain(fused).rows[0].reason == "last call ran the stock forward: called with adapter_names"
    fused(x)
    assert explain(fused).rows[0].reason == ""


def test_alora_offsets_and_stray_arguments_are_left_to_peft() -> None:
    stock, fused = (layer(m) for m in pair(make_mlp()))
    replace_layers(fused)
    x = torch.randn(3, 64)
    assert torch.equal(fused(x, alora_offsets=None), stock(x, alora_offsets=None))
    assert "called with alora_offsets" in explain(fused).rows[0].reason
    with pytest.raises(TypeError):
        fused(x, 1)
    assert "called with 1 more arguments" in explain(fused).rows[0].reason


def test_inputs_that_peft_refuses_are_refused_alike() -> None:
    stock, fused = (layer(m) for m in pair(make_mlp()))
    replace_layers(fused)
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        x = torch.ones(3, 64, dtype=dtype)
        expected = outcome(stock, x)
        assert isinstance(expected, str)
        assert outcome(fused, x) == expected
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., K\] = \[\.\.\., 64\], got \[3, 65\]"):
        fused(torch.ones(3, 65))


def test_input_of_another_class() -> None:
    stock, fused = (layer(m) for m in pair(make_mlp()))
    replace_layers(fused)
    x = torch.randn(3, 64).as_subclass(OtherTensor)
    assert type(fused(x)) is OtherTensor
    assert torch.equal(fused(x), stock(x))
    assert explain(fused).rows[0].reason == "last call ran the stock forward: the input is a OtherTensor"


def test_meta_device() -> None:
    """Where models are measured without being run."""
    model = make_mlp()
    replace_layers(model)
    assert model.to("meta")(torch.empty(3, 64, device="meta")).shape == (3, 32)
    assert "last call ran the stock forward: the input is on the meta device" in explain(model).rows[0].reason


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_complex_numbers() -> None:
    stock, fused = (layer(m.to(torch.complex64)) for m in pair(make_mlp()))
    assert replace_layers(fused).rows[0].reason == "the layer computes in torch.complex64"
    x = torch.randn(3, 64, dtype=torch.complex64)
    assert torch.equal(fused(x), stock(x))


def test_trainable_base_without_gradients() -> None:
    model = make_mlp()
    replace_layers(model)
    layer(model).base_layer.weight.requires_grad_(True)
    with torch.no_grad():
        assert explain(model).rows[0].fused
    assert not explain(model).rows[0].fused


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_disabled_input_casting(base: str) -> None:
    """PEFT then gives a bf16 input to an fp32 adapter, and torch refuses."""
    stock, fused = pair(make_mlp(base, torch.bfloat16))
    replace_layers(fused, strict=True)
    x = torch.randn(3, 64).bfloat16()
    messages = []
    for model in (stock, fused):
        with disable_input_dtype_casting(model), pytest.raises(RuntimeError) as error:
            model(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    with disable_input_dtype_casting(fused):
        assert "casting the input is disabled" in explain(fused).rows[0].reason
    assert fused(x).dtype == torch.bfloat16
    assert explain(fused).rows[0].reason == ""
