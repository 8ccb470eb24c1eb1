"""IA3Linear: its numbers, PEFT's names and files, merging."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_kernels.nn import IA3Linear, NF4Linear

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums of at most 128 terms near 1
BASES = ("dense", "nf4", "nf4_double")
EACH_BASE = pytest.mark.parametrize("base", BASES)
EACH_FORM = pytest.mark.parametrize("feedforward", [False, True], ids=["output", "feedforward"])


def make_layer(base: str = "dense", feedforward: bool = False, dtype: Any = torch.float32) -> IA3Linear:
    """64 -> 128 features, l not one."""
    linear: Any = nn.Linear(64, 128, dtype=dtype)
    if base != "dense":
        linear = NF4Linear.from_linear(linear, double_quant=base == "nf4_double")
    layer = IA3Linear.from_linear(linear, feedforward=feedforward)
    nn.init.uniform_(layer.adapter, 0.5, 1.5)
    return layer


def dense_weight(base: nn.Module) -> torch.Tensor:
    return base.nf4_weight.dequantize(torch.float32) if isinstance(base, NF4Linear) else base.weight.detach()


def expected_of(layer: IA3Linear, x: torch.Tensor) -> torch.Tensor:
    base, vector = layer.base_layer, layer.adapter.flatten()
    if layer.feedforward:
        return nn.functional.linear(x * vector, dense_weight(base), base.bias)
    return nn.functional.linear(x, dense_weight(base), base.bias) * vector


@EACH_BASE
@EACH_FORM
def test_forward_and_training(base: str, feedforward: bool) -> None:
    layer = make_layer(base, feedforward)
    x = torch.randn(2, 5, 64)
    expected = expected_of(layer, x)
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["ia3_l.default"]
    (grad,) = torch.autograd.grad(layer(x).square().mean(), layer.adapter)
    (wanted,) = torch.autograd.grad(expected.square().mean(), layer.adapter)
    torch.testing.assert_close(grad, wanted, **CLOSE)


@EACH_FORM
def test_starts_as_its_base_layer(feedforward: bool) -> None:
    layer = IA3Linear(64, 128, feedforward=feedforward)
    assert layer.adapter.shape == ((1, 64) if feedforward else (128, 1))
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), layer.base_layer(x), **CLOSE)
    nn.init.zeros_(layer.adapter)
    layer.reset_parameters()
    assert torch.equal(layer.adapter, torch.ones_like(layer.adapter))
    assert IA3Linear(64, 128, bias=False).base_layer.bias is None


def test_dtypes() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    assert layer.adapter.dtype == torch.float32
    assert layer(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    assert make_layer(dtype=torch.float64).adapter.dtype == torch.float64


def test_takes_over_a_bitsandbytes_layer() -> None:
    theirs = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32).to("cpu").eval()
    layer = IA3Linear.from_linear(theirs)
    assert isinstance(layer.base_layer, NF4Linear)
    assert layer.base_layer.weight.data_ptr() == theirs.weight.data_ptr()
    assert not layer.training
    assert not layer.base_layer.bias.requires_grad
    with pytest.raises(TypeError, match=r"linear must be a plain nn\.Linear, an NF4Linear or a bitsandbytes"):
        IA3Linear.from_linear(nn.Bilinear(2, 2, 2))


@EACH_BASE
@EACH_FORM
def test_peft_state_and_files_fit(base: str, feedforward: bool, tmp_path: Path) -> None:
    """The state_dict of a PEFT model, and its adapter file, load by their own keys; results are PEFT's."""
    model = nn.Sequential(nn.Linear(64, 128))
    if base != "dense":
        nested = base == "nf4_double"
        options = {"quant_type": "nf4", "compute_dtype": torch.float32, "compress_statistics": nested}
        model[0] = bnb.nn.Linear4bit(64, 128, **options).to("cpu")
        model.is_loaded_in_4bit = True
    config = IA3Config(
        target_modules=["0"], feedforward_modules=["0"] if feedforward else [], init_ia3_weights=False
    )
    peft_model = get_peft_model(model, config)
    ours = nn.Sequential(make_layer(base, feedforward))
    state = {key.removeprefix("base_model.model."): value for key, value in peft_model.state_dict().items()}
    assert set(state) == set(ours.state_dict())
    ours.load_state_dict(state)
    x = torch.randn(3, 64)
    expected = peft_model(x)
    torch.testing.assert_close(ours(x), expected, **CLOSE)

    peft_model.save_pretrained(tmp_path)
    nn.init.zeros_(ours[0].adapter)
    assert not torch.allclose(ours(x), expected, **CLOSE)
    file = load_file(tmp_path / "adapter_model.safetensors")
    keys = ours.load_state_dict(
        {key.removeprefix("base_model.model."): value for key, value in file.items()}, False
    )
    assert keys.unexpected_keys == []
    assert all(key.startswith("0.base_layer.") for key in keys.missing_keys)
    torch.testing.assert_close(ours(x), expected, **CLOSE)


@EACH_BASE
@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_to_dense(base: str, feedforward: bool, dtype: torch.dtype) -> None:
    layer = make_layer(base, feedforward, dtype)
    dense = layer.merge_to_dense()
    exact = dense_weight(layer.base_layer).double() * layer.adapter.double()
    assert dense.weight.dtype == dense.bias.dtype == dtype
    torch.testing.assert_close(dense.weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    bias = layer.base_layer.bias.double() * (1 if feedforward else layer.adapter.double().flatten())
    torch.testing.assert_close(dense.bias.double(), bias, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert dense.bias.data_ptr() != layer.base_layer.bias.data_ptr()
    layer.merge()
    assert torch.equal(layer.merge_to_dense().weight, dense.weight), "l was multiplied in twice"


@EACH_FORM
def test_merge_and_unmerge_dense(feedforward: bool) -> None:
    layer = make_layer(feedforward=feedforward).eval()
    x = torch.randn(3, 64)
    before, weight = layer(x), layer.base_layer.weight
    layer.merge()
    assert layer.merged
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_over_nf4_is_exact_for_positive_scales(dtype: torch.dtype) -> None:
    """A row times l > 0 is its codes with absmax times l; NF4 has no codes for the others, which move."""
    layer = make_layer("nf4", dtype=dtype)
    with torch.no_grad():
        layer.adapter[::4] *= -1
    base, vector = layer.base_layer, layer.adapter.detach()
    before = dense_weight(base) * vector
    layer.merge()
    merged, positive = layer.base_layer, (vector > 0).flatten()
    assert torch.equal(merged.absmax.view(128, -1)[positive], (base.absmax.view(128, -1) * vector)[positive])
    assert torch.equal(merged.weight.view(128, -1)[positive], base.weight.view(128, -1)[positive])
    error = (dense_weight(merged) - before).abs()
    # Two products are rounded on either side, in another order.
    assert (error[positive] <= 3 * torch.finfo(torch.float32).eps * before[positive].abs()).all()
    step = 0.1520 * before.abs().amax(1, keepdim=True)  # half the widest gap of the code, -1 to -0.6962
    slack = torch.finfo(dtype).eps * before.abs().amax(1, keepdim=True)
    assert (error <= step + slack).all()
    assert (error[~positive] > 0.01 * step[~positive]).any(), "nothing was quantised"
    layer.unmerge()
    assert layer.base_layer is base


@pytest.mark.parametrize(
    ("base", "feedforward"), [("nf4", True), ("nf4_double", False), ("nf4_double", True)]
)
def test_merge_over_nf4_quantises_again(base: str, feedforward: bool) -> None:
    """Where it must: off by at most half a step of the code, and of the 8-bit absmax."""
    layer = make_layer(base, feedforward)
    exact = layer.merge_to_dense().weight.detach()
    layer.merge()
    assert isinstance(layer.base_layer, NF4Linear)
    assert (layer.base_layer.nested_absmax is not None) == (base == "nf4_double")
    absmax = exact.reshape(-1, 64).abs().amax(1, keepdim=True)
    error = (dense_weight(layer.base_layer) - exact).reshape(-1, 64).abs()
    slack = 0.0 if base == "nf4" else 0.0072 * absmax.max()  # half a step of the 8-bit absmax
    assert (error <= 0.1520 * absmax + slack).all()


def test_rows_that_are_not_whole_blocks_are_quantised_again() -> None:
    layer = IA3Linear.from_linear(NF4Linear(96, 6))
    nn.init.uniform_(layer.adapter, 0.5, 1.5)
    exact = layer.merge_to_dense().weight.detach()
    layer.merge()
    absmax = exact.reshape(-1, 64).abs().amax(1, keepdim=True)
    assert ((dense_weight(layer.base_layer) - exact).reshape(-1, 64).abs() <= 0.1520 * absmax).all()


@EACH_BASE
def test_a_broken_adapter_is_not_merged(base: str) -> None:
    layer = make_layer(base)
    with torch.no_grad():
        layer.adapter[0] = math.nan
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
@EACH_BASE
def test_copies_and_moves(base: str, merged: bool) -> None:
    layer = make_layer(base).eval()
    x = torch.randn(3, 64)
    plain = layer(x)
    if merged:
        layer.merge()
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), expected)
        copied.unmerge()
        assert torch.equal(copied(x), plain)
        nn.init.zeros_(copied.adapter)
        assert torch.equal(layer(x), expected)
    layer.to("meta")
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}


@EACH_FORM
def test_compile_fullgraph(feedforward: bool) -> None:
    layer = make_layer("nf4_double", feedforward)
    x = torch.randn(3, 64)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x), **CLOSE)


def test_repr() -> None:
    assert "in_features=64, out_features=128, feedforward=True, merged=False" in repr(
        make_layer(feedforward=True)
    )
