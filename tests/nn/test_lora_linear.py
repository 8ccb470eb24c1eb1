"""LoRALinear: its numbers, PEFT's names and files, merging."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_kernels import functional
from peft_kernels.nn import LoRALinear, NF4Linear

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums of at most 128 terms near 1
BASES = ("dense", "nf4", "nf4_double")


def make_layer(base: str = "dense", dtype: torch.dtype = torch.float32, **kwargs: Any) -> LoRALinear:
    """64 -> 128 features, B not zero."""
    linear: Any = nn.Linear(64, 128, dtype=dtype)
    if base != "dense":
        linear = NF4Linear.from_linear(linear, double_quant=base == "nf4_double")
    layer = LoRALinear.from_linear(linear, **{"r": 4, "lora_alpha": 6} | kwargs)
    nn.init.normal_(layer.adapter[1], std=0.3)
    return layer


def base_weight(layer: LoRALinear) -> torch.Tensor:
    base = layer.base_layer
    return base.nf4_weight.dequantize(torch.float32) if isinstance(base, NF4Linear) else base.weight.detach()


@pytest.mark.parametrize("base", BASES)
def test_forward_and_training(base: str) -> None:
    layer = make_layer(base, use_rslora=True)
    assert layer.scaling == 6 / math.sqrt(4)
    x = torch.randn(2, 5, 64)
    lora_a, lora_b = layer.adapter
    expected = (
        nn.functional.linear(x, base_weight(layer), layer.base_layer.bias) + 3.0 * x @ lora_a.t() @ lora_b.t()
    )
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    grads = torch.autograd.grad(layer(x).square().mean(), layer.adapter)
    for grad, wanted in zip(grads, torch.autograd.grad(expected.square().mean(), layer.adapter), strict=True):
        torch.testing.assert_close(grad, wanted, **CLOSE)


def test_starts_as_its_base_layer() -> None:
    torch.manual_seed(3)
    layer = LoRALinear(64, 128, r=4)
    assert not layer.adapter[1].any()
    limit = 1 / math.sqrt(64)  # Kaiming uniform with a = sqrt(5) over 64 inputs
    assert limit * 0.9 < layer.adapter[0].abs().max() <= limit
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), layer.base_layer(x), **CLOSE)
    assert LoRALinear(64, 128, bias=False).base_layer.bias is None
    first = layer.adapter[0].clone()
    layer.reset_parameters()
    assert not torch.equal(layer.adapter[0], first)


@pytest.mark.parametrize("base", BASES)
def test_dropout_draws_one_seed_and_only_in_training(base: str) -> None:
    layer = make_layer(base, lora_dropout=0.4)
    x = torch.randn(3, 64)
    torch.manual_seed(8)
    y = layer(x)
    torch.manual_seed(8)
    dropped = functional.philox_dropout(x, 0.4)
    lora_a, lora_b = layer.adapter
    expected = nn.functional.linear(x, base_weight(layer), layer.base_layer.bias)
    torch.testing.assert_close(y, expected + 1.5 * dropped @ lora_a.t() @ lora_b.t(), **CLOSE)
    torch.testing.assert_close(layer.eval()(x), expected + 1.5 * x @ lora_a.t() @ lora_b.t(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapter_over_a_16_bit_base(dtype: torch.dtype) -> None:
    layer = make_layer("dense", dtype)
    assert {part.dtype for part in layer.adapter} == {torch.float32}
    assert layer(torch.randn(3, 64).to(dtype)).dtype == dtype
    assert make_layer("dense", torch.float64).adapter[0].dtype == torch.float64


def test_takes_over_a_bitsandbytes_layer() -> None:
    theirs = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32).to("cpu").eval()
    layer = LoRALinear.from_linear(theirs)
    assert isinstance(layer.base_layer, NF4Linear)
    assert layer.base_layer.weight.data_ptr() == theirs.weight.data_ptr()
    assert not layer.training
    assert not layer.base_layer.bias.requires_grad


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_peft_state_and_files_fit(base: str, use_rslora: bool, tmp_path: Path) -> None:
    """The state_dict of a PEFT model, and its adapter file, load by their own keys; results are PEFT's."""
    model = nn.Sequential(nn.Linear(64, 128))
    if base != "dense":
        linear4bit = bnb.nn.Linear4bit(
            64,
            128,
            quant_type="nf4",
            compute_dtype=torch.float32,
            compress_statistics=base == "nf4_double",
        )
        model[0] = linear4bit.to("cpu")
        model.is_loaded_in_4bit = True
    peft_model = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_rslora=use_rslora, init_lora_weights=False),
    )
    ours = nn.Sequential(make_layer(base, use_rslora=use_rslora))
    state = {key.removeprefix("base_model.model."): value for key, value in peft_model.state_dict().items()}
    assert set(state) == set(ours.state_dict())
    ours.load_state_dict(state)
    x = torch.randn(3, 64)
    expected = peft_model(x)
    torch.testing.assert_close(ours(x), expected, **CLOSE)

    peft_model.save_pretrained(tmp_path)
    nn.init.zeros_(ours[0].adapter[1])
    assert not torch.allclose(ours(x), expected, **CLOSE)
    file = load_file(tmp_path / "adapter_model.safetensors")
    keys = ours.load_state_dict(
        {key.removeprefix("base_model.model."): value for key, value in file.items()}, False
    )
    assert keys.unexpected_keys == []
    assert all(key.startswith("0.base_layer.") for key in keys.missing_keys)
    torch.testing.assert_close(ours(x), expected, **CLOSE)


def test_merge_and_unmerge_dense() -> None:
    layer = make_layer().eval()
    x = torch.randn(3, 64)
    before, weight = layer(x), layer.base_layer.weight
    layer.merge()
    assert layer.merged
    assert isinstance(layer.base_layer, nn.Linear)
    torch.testing.assert_close(layer(x), before, **CLOSE)
    assert not any(p.requires_grad for p in layer.base_layer.parameters())
    merged = layer.base_layer
    layer.merge()
    assert layer.base_layer is merged, "merged twice"
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert layer.base_layer.weight is weight
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("base", ["nf4", "nf4_double"])
def test_merge_over_nf4_quantises_again(base: str) -> None:
    """Off by at most half a step of the code: 0.1520 of a block's absmax at its widest gap, -1 to -0.6962."""
    layer = make_layer(base).eval()
    x = torch.randn(3, 64)
    before, packed = layer(x), layer.base_layer.weight.clone()
    exact = layer.merge_to_dense().weight.detach()
    torch.testing.assert_close(nn.functional.linear(x, exact, layer.base_layer.bias), before, **CLOSE)
    layer.merge()
    assert isinstance(layer.base_layer, NF4Linear)
    assert (layer.base_layer.nested_absmax is not None) == (base == "nf4_double")
    absmax = exact.reshape(-1, 64).abs().amax(1, keepdim=True)
    error = (base_weight(layer) - exact).reshape(-1, 64).abs()
    slack = 0.0 if base == "nf4" else 0.0072 * absmax.max()  # half a step of the 8-bit absmax
    assert (error <= 0.1520 * absmax + slack).all()
    assert error.max() > 0.05 * absmax.min(), "nothing was quantised"
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, packed)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_to_dense(base: str, dtype: torch.dtype) -> None:
    layer = make_layer(base, dtype)
    dense = layer.merge_to_dense()
    lora_a, lora_b = layer.adapter
    exact = base_weight(layer).double() + 1.5 * lora_b.double() @ lora_a.double()
    assert dense.weight.dtype == dense.bias.dtype == dtype
    torch.testing.assert_close(dense.weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(dense.bias, layer.base_layer.bias)
    assert dense.bias is not layer.base_layer.bias
    assert not layer.merged
    layer.merge()
    assert torch.equal(layer.merge_to_dense().weight, dense.weight), "the update was added twice"


@pytest.mark.parametrize("base", BASES)
def test_a_broken_adapter_is_not_merged(base: str) -> None:
    layer = make_layer(base)
    with torch.no_grad():
        layer.adapter[0][0, 0] = math.nan
    for merge in (layer.merge, layer.merge_to_dense):
        with pytest.raises(ValueError, match="merged weight must be finite"):
            merge()
    assert not layer.merged


def test_a_merged_layer_refuses_to_be_saved() -> None:
    model = nn.Sequential(make_layer())
    model[0].merge()
    with pytest.raises(RuntimeError, match=r"0 must not be merged to be saved.*unmerge\(\)"):
        model.state_dict()
    state = nn.Sequential(make_layer()).state_dict()
    with pytest.raises(RuntimeError, match=r"0 must not be merged to be loaded.*unmerge\(\)"):
        model.load_state_dict(state)
    model[0].unmerge()
    model.load_state_dict(state)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_copies_and_moves(base: str, merged: bool) -> None:
    layer = make_layer(base).eval()
    x = torch.randn(3, 64)
    plain = layer(x)
    if merged:
        layer.merge()
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), expected)
        assert copied.merged == merged
        copied.unmerge()
        assert torch.equal(copied(x), plain)
        nn.init.zeros_(copied.adapter[1])
        assert torch.equal(layer(x), expected)
    layer.to("meta")
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}


def test_compile_fullgraph() -> None:
    layer = make_layer("nf4_double", lora_dropout=0.2)
    x = torch.randn(3, 64)
    torch.manual_seed(1)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, layer(x), **CLOSE)


def test_repr_and_errors() -> None:
    assert "r=4, scaling=1.5, lora_dropout=0.0, merged=False" in repr(make_layer())
    with pytest.raises(ValueError, match="r must be positive, got 0"):
        LoRALinear(4, 4, r=0)
    with pytest.raises(TypeError, match=r"r must be an int, got 2.0"):
        LoRALinear(4, 4, r=2.0)
    with pytest.raises(ValueError, match=r"lora_dropout must be in \[0, 1\), got 1.0"):
        LoRALinear(4, 4, lora_dropout=1.0)
