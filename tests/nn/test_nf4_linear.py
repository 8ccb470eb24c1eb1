"""NF4Linear: its numbers, and that it saves, loads, moves, casts and copies like a module of torch."""

import copy
import io
import pickle
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import peft_kernels as pk
from numerics import assert_within, bound, nf4_bound
from peft_kernels.nn import NF4Linear

DOUBLE = [False, True]


def make_bitsandbytes(linear: nn.Linear, double_quant: bool, **kwargs: Any) -> Any:
    layer = bnb.nn.Linear4bit(
        128, 96, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=double_quant, **kwargs
    )
    layer.weight.data = linear.weight.data.clone()
    layer.bias = linear.bias
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", DOUBLE)
def test_forward_and_backward(double_quant: bool, dtype: torch.dtype) -> None:
    layer = NF4Linear(128, 96, blocksize=32, double_quant=double_quant, dtype=dtype)
    x, grad = torch.randn(2, 5, 128).to(dtype).requires_grad_(), torch.randn(2, 5, 96).to(dtype)
    y = layer(x)
    dx, dbias = torch.autograd.grad(y, [x, layer.bias], grad)
    weight, x, grad = layer.nf4_weight.dequantize(torch.float32).double(), x.detach().double(), grad.double()
    exact, magnitude = (
        x @ weight.t() + layer.bias.double(),
        x.abs() @ weight.abs().t() + layer.bias.double().abs(),
    )
    assert_within("y", y.detach(), exact.detach(), nf4_bound(exact, magnitude, 128 + 3, dtype).detach())
    assert_within("dx", dx, grad @ weight, nf4_bound(grad @ weight, grad.abs() @ weight.abs(), 96 + 3, dtype))
    exact, magnitude = grad.sum((0, 1)), grad.abs().sum((0, 1))
    assert_within("dbias", dbias, exact, bound(exact, magnitude, 10, dtype))


def test_initial_weights_are_those_of_a_linear_layer() -> None:
    torch.manual_seed(4)
    layer = NF4Linear(128, 96, double_quant=True)
    torch.manual_seed(4)
    linear = nn.Linear(128, 96)
    assert torch.equal(layer.bias, linear.bias)
    quantised = pk.functional.nf4_quantize(linear.weight, 64, double_quant=True)
    assert torch.equal(layer.nf4_weight.packed, quantised.packed)
    assert NF4Linear(128, 96, bias=False).bias is None


def test_from_linear_shares_the_bias_and_keeps_the_mode() -> None:
    linear = nn.Linear(128, 96).eval()
    layer = NF4Linear.from_linear(linear, blocksize=128)
    assert layer.bias is linear.bias
    assert not layer.training
    assert (layer.in_features, layer.out_features, layer.nf4_weight.blocksize) == (128, 96, 128)
    assert layer.nf4_weight.dtype == torch.float32
    assert linear.weight.requires_grad


def test_from_weight_shares_it_and_refuses_others() -> None:
    weight = pk.functional.nf4_quantize(torch.randn(96, 128), double_quant=True)
    bias = nn.Parameter(torch.randn(96))
    layer = NF4Linear.from_weight(weight, bias)
    assert layer.nf4_weight.packed.data_ptr() == weight.packed.data_ptr()
    assert layer.bias is bias
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), pk.functional.nf4_linear(x, weight, bias))
    with pytest.raises(TypeError, match="weight must be an NF4Weight, got Tensor"):
        NF4Linear.from_weight(torch.randn(96, 128))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight must be \[N, K\], got an NF4Weight of shape \[2, 96, 64\]"):
        NF4Linear.from_weight(pk.functional.nf4_quantize(torch.randn(2, 96, 64)))
    with pytest.raises(TypeError, match=r"bias must be an nn.Parameter or None, got Tensor; wrap it"):
        NF4Linear.from_weight(weight, torch.randn(96))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias must be \[N\] = \[96\], got \[128\]"):
        NF4Linear.from_weight(weight, nn.Parameter(torch.randn(128)))


@pytest.mark.parametrize("double_quant", DOUBLE)
def test_from_bitsandbytes_shares_the_bytes(double_quant: bool) -> None:
    theirs = make_bitsandbytes(nn.Linear(128, 96), double_quant)
    ours = NF4Linear.from_bitsandbytes(theirs)
    assert ours.weight.data_ptr() == theirs.weight.data_ptr()
    x = torch.randn(3, 128)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double_quant", DOUBLE)
def test_state_dict_is_that_of_bitsandbytes(double_quant: bool, quant_storage: torch.dtype) -> None:
    theirs = make_bitsandbytes(nn.Linear(128, 96), double_quant, quant_storage=quant_storage)
    ours = NF4Linear.from_bitsandbytes(theirs).state_dict(prefix="a.")
    expected = theirs.state_dict(prefix="a.")
    assert set(ours) == set(expected)
    for key, value in expected.items():
        if key == "a.weight.quant_state.bitsandbytes__nf4":  # JSON: the order of its keys is free
            assert set(bytes(ours[key].tolist())) == set(bytes(value.tolist()))
        else:
            assert ours[key].dtype == value.dtype
            assert torch.equal(ours[key].view(torch.uint8), value.view(torch.uint8)), key


@pytest.mark.parametrize("double_quant", DOUBLE)
def test_loads_what_bitsandbytes_saved(double_quant: bool) -> None:
    theirs = make_bitsandbytes(nn.Linear(128, 96), double_quant)
    ours = NF4Linear(128, 96, blocksize=128, double_quant=not double_quant)
    state = theirs.state_dict()
    assert ours.load_state_dict(state).missing_keys == []
    x = torch.randn(3, 128)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    state["weight"].zero_()
    assert ours.weight.any(), "it shares memory with the state_dict"


@pytest.mark.parametrize("double_quant", DOUBLE)
def test_bitsandbytes_loads_what_it_saved(double_quant: bool) -> None:
    ours = NF4Linear(128, 96, double_quant=double_quant)
    state = ours.state_dict()
    statistics = {
        key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")
    }
    theirs = bnb.nn.Linear4bit(128, 96, quant_type="nf4", compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit.from_prequantized(
        state["weight"], statistics, device="cpu", module=theirs
    )
    theirs.bias = ours.bias
    x = torch.randn(3, 128)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)


def test_state_dict_of_a_model_round_trip_and_strictness() -> None:
    model = nn.Sequential(NF4Linear(128, 96), nn.ReLU(), NF4Linear(96, 64, bias=False, double_quant=True))
    other = nn.Sequential(NF4Linear(128, 96), nn.ReLU(), NF4Linear(96, 64, bias=False, double_quant=True))
    state = model.state_dict()
    other.load_state_dict(state)
    x = torch.randn(3, 128)
    assert torch.equal(model(x), other(x))
    with pytest.raises(RuntimeError, match=r'Missing key.* "2\.weight"'):
        other.load_state_dict({key: value for key, value in state.items() if not key.startswith("2.")})
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "0\.wait"'):
        other.load_state_dict(state | {"0.wait": torch.ones(1)})
    dense = {key: value for key, value in state.items() if not key.startswith("0.weight.")}
    with pytest.raises(RuntimeError, match=r"0.weight: state_dict must have '0.weight.quant_state"):
        other.load_state_dict(dense | nn.Sequential(nn.Linear(128, 96)).state_dict())
    with pytest.raises(RuntimeError, match=r"0.weight: must be \[96, 128\], got \[128, 96\]"):
        other.load_state_dict(state | nn.Sequential(NF4Linear(96, 128, bias=False)).state_dict())
    assert torch.equal(model(x), other(x)), "a refused state_dict changed the weights"


def test_load_by_assignment() -> None:
    layer, other = NF4Linear(128, 96), NF4Linear(128, 96)
    state = other.state_dict()
    layer.load_state_dict(state, assign=True)
    assert layer.weight.data_ptr() == other.weight.data_ptr()
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("double_quant", DOUBLE)
def test_casts_leave_the_weight_alone(double_quant: bool) -> None:
    layer = NF4Linear(128, 96, double_quant=double_quant)
    weight = layer.nf4_weight.dequantize()
    for cast in (layer.to(torch.bfloat16), layer.half(), layer.double(), layer.float()):
        assert torch.equal(cast.nf4_weight.dequantize(), weight)
    assert layer.bfloat16().bias.dtype == torch.bfloat16
    assert layer(torch.randn(3, 128).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("double_quant", DOUBLE)
def test_moves_with_all_its_parts(double_quant: bool) -> None:
    layer = NF4Linear(128, 96, double_quant=double_quant).to("meta")
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert layer.nf4_weight.absmax.device.type == "meta"
    source = NF4Linear(128, 96, double_quant=double_quant)
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), source(x))


def test_the_weight_is_never_trained() -> None:
    layer = NF4Linear(128, 96)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    with pytest.raises(RuntimeError, match="floating point"):
        layer.weight.requires_grad_(True)
    packed = layer.weight.clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1.0)
    layer(torch.randn(3, 128)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, packed)


@pytest.mark.parametrize("double_quant", DOUBLE)
def test_copies(double_quant: bool) -> None:
    layer = NF4Linear(128, 96, double_quant=double_quant)
    x = torch.randn(3, 128)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(copied(x), expected)
        copied.weight.zero_()
        assert torch.equal(layer(x), expected)


def test_compile_fullgraph() -> None:
    layer = NF4Linear(128, 96, double_quant=True)
    x = torch.randn(3, 128, requires_grad=True)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double_quant", DOUBLE)
def test_int8_activations_are_for_eval_mode(double_quant: bool) -> None:
    layer = NF4Linear(128, 96, double_quant=double_quant, activation="int8")
    exact = NF4Linear(128, 96, double_quant=double_quant)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(3, 128, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, exact(x))
    y.sum().backward()
    assert x.grad is not None
    layer.eval()
    with pytest.raises(ValueError, match="x must not require a gradient with activation='int8'"):
        layer(x)
    with pytest.raises(ValueError, match=r"bias must not .*; call it under torch\.inference_mode\(\)"):
        layer(x.detach())
    rounded = pk.functional.nf4_linear(x.detach(), layer.nf4_weight, layer.bias.detach(), activation="int8")
    with torch.inference_mode():
        assert torch.equal(layer(x), rounded)
        assert torch.equal(copy.deepcopy(layer)(x), rounded)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), rounded)
        layer.activation = None
        assert torch.equal(layer(x), exact(x))


def test_repr_and_errors() -> None:
    assert repr(NF4Linear(128, 96, double_quant=True)) == (
        "NF4Linear(in_features=128, out_features=96, bias=True, blocksize=64, double_quant=True)"
    )
    assert repr(NF4Linear(128, 96, activation="int8")).endswith("double_quant=False, activation='int8')")
    with pytest.raises(ValueError, match="activation must be None or 'int8', got 'int4'"):
        NF4Linear(128, 96, activation="int4")
    with pytest.raises(ValueError, match="blocksize must be one of"):
        NF4Linear(128, 96, blocksize=48)
    with pytest.raises(ValueError, match="weight must be float32"):
        NF4Linear.from_linear(nn.Linear(128, 96, dtype=torch.float64))
    with pytest.raises(ValueError, match="packed must be quantised"):
        NF4Linear.from_bitsandbytes(bnb.nn.Linear4bit(128, 96, quant_type="nf4"))
    with pytest.raises(ValueError, match="got 'fp4'"):
        NF4Linear.from_bitsandbytes(bnb.nn.LinearFP4(128, 96).to("cpu"))
