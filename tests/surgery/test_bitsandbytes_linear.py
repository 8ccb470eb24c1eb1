"""A bare Linear4bit: its numbers, bitsandbytes' layout for the CPU, weights that change under the layer."""

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from peft_models import make_linear4bit
from torch import nn

from numerics import assert_within, bound, gamma, nf4_bound
from peft_kernels.surgery import Row, explain, replace_layers, restore_layers
from peft_kernels.surgery.bitsandbytes_linear import nf4_weight

QUANTISATION = ("nf4", "nf4_double")


def exact_weight(layer: Any) -> torch.Tensor:
    """float64 [N, K], by bitsandbytes' own dequantisation."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(layer.weight.data, state).double()


def pack_for_cpu(layer: Any) -> None:
    """What a stock forward in eval mode does to a layer on a CPU with AVX512-BF16; here on every CPU."""
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", QUANTISATION)
def test_product_and_gradient(base: str, dtype: torch.dtype) -> None:
    layer = make_linear4bit(base, compute_dtype=dtype)
    weight = exact_weight(layer)
    replace_layers(layer, strict=True)
    x, grad = torch.randn(2, 5, 128).to(dtype), torch.randn(2, 5, 96).to(dtype)
    x.requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert y.dtype == dx.dtype == dtype
    x = x.detach().double()
    exact, magnitude = x @ weight.t() + layer.bias.double(), x.abs() @ weight.abs().t() + layer.bias.abs()
    assert_within("y", y, exact, nf4_bound(exact, magnitude, 128 + 3, dtype))
    exact, magnitude = grad.double() @ weight, grad.double().abs() @ weight.abs()
    assert_within("gradient of x", dx, exact, nf4_bound(exact, magnitude, 96 + 3, dtype))


def test_compute_dtype() -> None:
    layer = make_linear4bit(compute_dtype=torch.bfloat16)
    replace_layers(layer)
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), layer(x.bfloat16()).float())
    assert layer(x).dtype == torch.float32


def test_autocast_does_not_change_the_compute_dtype() -> None:
    """bitsandbytes says so too and returns fp32, but its CPU op calls F.linear, which autocast rounds."""
    stock = make_linear4bit()
    fused = copy.deepcopy(stock)
    replace_layers(fused)
    x = torch.randn(3, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, theirs = fused(x), stock(x)
    assert y.dtype == theirs.dtype == torch.float32
    weight = exact_weight(stock)
    exact = x.double() @ weight.t() + stock.bias
    magnitude = x.double().abs() @ weight.abs().t() + stock.bias.abs()
    assert_within("y", y, exact, bound(exact, magnitude, 128 + 3, torch.float32))
    assert_within("bitsandbytes' y", theirs, exact, gamma(4, torch.bfloat16) * magnitude)


def test_trainable_bias() -> None:
    layer = make_linear4bit()
    layer.bias.requires_grad_(True)
    replace_layers(layer)
    layer(torch.randn(7, 128)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((96,), 7.0))


def test_bias_keeps_its_dtype() -> None:
    """bitsandbytes casts the parameter itself to the compute dtype, for good."""
    stock, fused = (
        make_linear4bit(compute_dtype=torch.bfloat16),
        make_linear4bit(compute_dtype=torch.bfloat16),
    )
    stock.bias.data, fused.bias.data = stock.bias.data.float(), fused.bias.data.float()
    replace_layers(fused)
    for layer in (stock, fused):
        layer(torch.randn(2, 128))
    assert (stock.bias.dtype, fused.bias.dtype) == (torch.bfloat16, torch.float32)
    fused.half()
    assert fused(torch.randn(2, 128)).dtype == torch.float32


@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_any_quant_storage(quant_storage: torch.dtype) -> None:
    layer, plain = make_linear4bit(quant_storage=quant_storage), make_linear4bit()
    assert layer.weight.dtype == quant_storage
    replace_layers(nn.ModuleList([layer, plain]), strict=True)
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"quant_type": "fp4"}, "it is quantised to fp4, not nf4"),
        ({}, "its weight is a NoneType, not a Params4bit"),
    ],
    ids=["fp4", "sharded"],
)
def test_unreadable_weights(kwargs: dict[str, Any], reason: str) -> None:
    layer = make_linear4bit(**kwargs)
    x = torch.randn(3, 128)
    expected = copy.deepcopy(layer)(x)
    if "NoneType" in reason:
        weight = layer.weight
        del layer.weight
        layer.weight = weight.data.as_subclass(torch.Tensor)
        layer.weight.quant_state = weight.quant_state
    row = replace_layers(layer).rows[0]
    assert (row.fused, row.reason) == (False, reason)
    with pytest.raises(ValueError, match=reason):
        replace_layers(layer, strict=True)
    assert torch.equal(layer(x), expected)


def test_a_weight_that_is_not_quantised_yet() -> None:
    """Its layer was never moved to a device; bitsandbytes refuses to compute with it."""
    layer = bnb.nn.Linear4bit(128, 96, quant_type="nf4")
    assert replace_layers(layer).rows[0].reason == "its weight is not quantised yet"
    with pytest.raises(AssertionError):
        layer(torch.randn(3, 128))


def test_input_as_wide_as_the_transposed_weight_is_left_to_bitsandbytes() -> None:
    stock = make_linear4bit()
    fused = copy.deepcopy(stock)
    replace_layers(fused)
    x = torch.randn(3, 96)  # features of W^T
    stock.bias = fused.bias = None
    with pytest.warns(DeprecationWarning, match="quantized from a"):
        assert torch.equal(fused(x), stock(x))
    assert "the input has 96 features, the weight is [96, 128]" in explain(fused).rows[0].reason


@pytest.mark.parametrize("when", ["before replacing", "after replacing"])
@pytest.mark.parametrize("base", QUANTISATION)
def test_rearranged_bytes_are_put_back(base: str, when: str) -> None:
    """Codes exactly; absmax as bitsandbytes left them: bf16, and double-quantised again if they were."""
    layer = make_linear4bit(base)
    codes, weight, keys = layer.weight.data.clone(), exact_weight(layer), list(layer.state_dict())
    if when == "before replacing":
        pack_for_cpu(layer)
        replace_layers(layer, strict=True)
        assert torch.equal(layer.weight.data, codes), "only the first call would put them back"
    else:
        replace_layers(layer, strict=True)
        layer(torch.randn(3, 128))
        pack_for_cpu(layer)
    x = torch.randn(3, 128)
    y = layer(x)
    assert explain(layer).rows == (Row("", "bitsandbytes.Linear4bit", True, ""),)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(layer.weight.data, codes)
    assert layer.weight.quant_state is layer.quant_state
    assert list(layer.state_dict()) == keys
    # absmax carry one bf16 rounding; double quantisation adds half a step of its code: 64 make 0.1 ... 1
    found, largest = exact_weight(layer), weight.abs().max()
    allowed = gamma(1, torch.bfloat16) * weight.abs() + (
        0.9 / 64 / 2 * 1.01 * largest if base == "nf4_double" else 0
    )
    assert_within("weight", found, weight, allowed + 1e-9)
    exact, magnitude = (
        x.double() @ found.t() + layer.bias,
        x.double().abs() @ found.abs().t() + layer.bias.abs(),
    )
    assert_within("y", y, exact, bound(exact, magnitude, 128 + 3, torch.float32))


def test_statistics_that_bitsandbytes_left_transposed_are_not_misread() -> None:
    """Its state_dict() after an eval forward on such a CPU does so to absmax without double quantisation."""
    layer = make_linear4bit()
    pack_for_cpu(layer)
    layer.state_dict()
    assert layer.weight.quant_state.absmax.shape == (2, 96)
    row = replace_layers(layer).rows[0]
    assert (row.fused, row.reason) == (False, "its absmax is torch.bfloat16, not torch.float32")
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.float()
    row = explain(layer).rows[0]
    assert (row.fused, row.reason) == (False, "absmax must be [ceil(n/blocksize)] = [192], got [2, 96]")


def test_a_fused_layer_is_never_rearranged() -> None:
    layer = make_linear4bit().eval()
    codes = layer.weight.data.clone()
    replace_layers(layer)
    with torch.no_grad():
        y = layer(torch.randn(3, 128))
    assert y.isfinite().all()
    assert torch.equal(layer.weight.data, codes)
    restore_layers(layer)
    x = torch.randn(3, 128)
    exact = x.double() @ exact_weight(layer).t() + layer.bias
    magnitude = x.double().abs() @ exact_weight(layer).abs().t() + layer.bias.abs()
    with torch.no_grad():
        y = layer(x)  # bitsandbytes' own eval forward: bf16 inside where the CPU has AVX512-BF16
    assert_within("y", y, exact, gamma(4, torch.bfloat16) * magnitude)


def new_parameter(layer: Any, other: Any) -> None:
    layer.weight = other.weight


def new_bytes(layer: Any, other: Any) -> None:
    layer.weight.data = other.weight.data
    layer.weight.quant_state.absmax.copy_(other.weight.quant_state.absmax)


def bytes_in_place(layer: Any, other: Any) -> None:
    layer.weight.data.copy_(other.weight.data)
    layer.weight.quant_state.absmax.copy_(other.weight.quant_state.absmax)


def new_state(layer: Any, other: Any) -> None:
    layer.weight.data = other.weight.data
    layer.weight.quant_state = other.weight.quant_state


def new_statistics(layer: Any, other: Any) -> None:
    """As `QuantState.to(device)`, which moving a layer calls."""
    layer.weight.data.copy_(other.weight.data)
    layer.weight.quant_state.absmax = other.weight.quant_state.absmax


@pytest.mark.parametrize("part", ["offset", "state2", "absmax", "code"])
def test_a_change_of_one_part_of_the_second_level_is_noticed(part: str) -> None:
    layer = make_linear4bit("nf4_double")
    layer.bias = None
    replace_layers(layer, strict=True)
    x = torch.randn(3, 128)
    layer(x)
    state = layer.weight.quant_state
    if part == "offset":
        state.offset = state.offset * 3
    elif part == "state2":
        state.state2 = copy.copy(state.state2)
        state.state2.absmax = state.state2.absmax * 3
    else:
        setattr(state.state2, part, getattr(state.state2, part) * 3)
    weight = exact_weight(layer)
    exact, magnitude = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    assert_within("y", layer(x), exact, bound(exact, magnitude, 128 + 3, torch.float32))


def test_a_code_that_is_not_nf4_any_more_is_noticed() -> None:
    layer = make_linear4bit()
    replace_layers(layer, strict=True)
    layer(torch.randn(3, 128))
    layer.weight.quant_state.code = layer.weight.quant_state.code * 2
    reason = nf4_weight(layer)
    assert isinstance(reason, str)
    assert explain(layer).rows[0].reason == reason


def test_a_new_blocksize_is_noticed() -> None:
    layer = make_linear4bit()
    layer.bias = None
    replace_layers(layer, strict=True)
    layer(torch.randn(3, 128))
    layer.weight.quant_state.blocksize = 128
    row = explain(layer).rows[0]
    assert (row.fused, row.reason) == (False, "absmax must be [ceil(n/blocksize)] = [96], got [192]")
    assert nf4_weight(layer) == row.reason


def test_absmax_that_was_rounded_is_left_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a cast of everything in a file to bf16; the kernels take fp32, in a trace as outside."""
    layer = make_linear4bit()
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.bfloat16()
    stock = copy.deepcopy(layer)
    reason = "its absmax is torch.bfloat16, not torch.float32"
    assert replace_layers(layer).rows[0].reason == reason
    x = torch.randn(3, 128, requires_grad=True)
    assert torch.equal(layer(x), stock(x))
    assert nf4_weight(layer) == reason
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert nf4_weight(layer) == reason


@pytest.mark.parametrize("base", QUANTISATION)
def test_quant_state_on_the_meta_device(base: str) -> None:
    layer = make_linear4bit(base)
    layer.weight.quant_state.to("meta")
    row = replace_layers(layer).rows[0]
    assert (row.fused, row.reason) == (False, "its weight is on the meta device")


@pytest.mark.parametrize("when", ["before replacing", "after replacing"])
@pytest.mark.parametrize("base", QUANTISATION)
def test_what_is_put_back_in_inference_mode_can_be_trained(base: str, when: str) -> None:
    layer = make_linear4bit(base).eval()
    x = torch.randn(3, 128, requires_grad=True)
    if when == "after replacing":
        replace_layers(layer, strict=True)
    with torch.inference_mode():
        pack_for_cpu(layer)
        replace_layers(layer, strict=True)
        layer(x)
    state = layer.weight.quant_state
    tensors = [layer.weight.data, *layer.__dict__["_nf4_cache"].weight.base_weight()[:5], state.code]
    assert not any(tensor.is_inference() for tensor in tensors if tensor is not None)
    restore_layers(layer.train())
    layer(x).sum().backward()
    exact = exact_weight(layer).sum(0).expand(3, 128)
    magnitude = exact_weight(layer).abs().sum(0).expand(3, 128)
    assert_within("gradient of x", x.grad, exact, bound(exact, magnitude, 96 + 3, torch.float32))


@pytest.mark.parametrize("change", [new_parameter, new_bytes, bytes_in_place, new_state, new_statistics])
def test_changed_weights_are_noticed(change: Callable[[Any, Any], None]) -> None:
    layer, other = make_linear4bit(seed=0), make_linear4bit(seed=1)
    other.bias = layer.bias
    replace_layers(nn.ModuleList([layer, other]))
    x = torch.randn(3, 128)
    before, expected = layer(x), other(x)
    assert not torch.equal(before, expected)
    change(layer, other)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("part", ["state", "shape"])
def test_a_new_shape_of_the_same_bytes_is_noticed(part: str) -> None:
    layer = make_linear4bit()
    layer.bias = None
    replace_layers(layer)
    layer(torch.randn(3, 128))
    weight = exact_weight(layer)
    if part == "state":
        layer.weight.quant_state = copy.copy(layer.weight.quant_state)
    layer.weight.quant_state.shape = torch.Size((48, 256))
    expected = torch.eye(256, dtype=torch.float64) @ weight.reshape(48, 256).t()
    torch.testing.assert_close(layer(torch.eye(256)).double(), expected, rtol=1e-6, atol=0)
    assert explain(layer).rows[0].reason == "", "the stock forward ran, which reads the shape afresh"


def test_wrapped_weight_is_kept_between_calls() -> None:
    """Wrapping costs more than the rest of the layer's own work."""
    layer = make_linear4bit()
    replace_layers(layer)
    layer(torch.randn(3, 128))
    kept = layer.__dict__["_nf4_cache"].weight
    layer(torch.randn(3, 128))
    assert layer.__dict__["_nf4_cache"].weight is kept
    assert kept.packed.data_ptr() == layer.weight.data_ptr(), "the weight was copied"
