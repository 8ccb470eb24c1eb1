"""DoRALinear: its numbers, PEFT's names and files, merging, and how long it keeps its norms."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import peft_kernels as pk
from peft_kernels.nn import DoRALinear, NF4Linear, scale_cache

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums of at most 128 terms near 1
BASES = ("dense", "nf4", "nf4_double")


def make_layer(base: str = "dense", dtype: torch.dtype = torch.float32, **kwargs: Any) -> DoRALinear:
    """64 -> 128 features, B not zero, the magnitude not the norm."""
    linear: Any = nn.Linear(64, 128, dtype=dtype)
    if base != "dense":
        linear = NF4Linear.from_linear(linear, double_quant=base == "nf4_double")
    layer = DoRALinear.from_linear(linear, **{"r": 4, "lora_alpha": 6} | kwargs)
    nn.init.normal_(layer.adapter[1], std=0.3)
    with torch.no_grad():
        layer.magnitude.mul_(torch.linspace(0.5, 2.0, 128))
    return layer


def adapted_weight(layer: DoRALinear) -> torch.Tensor:
    """The definition, in fp32, with gradients to A, B and the magnitude but none through the norm."""
    base = layer.unmerged_base_layer or layer.base_layer
    weight = base.nf4_weight.dequantize(torch.float32) if isinstance(base, NF4Linear) else base.weight
    lora_a, lora_b = layer.adapter
    weight = weight + layer.scaling * lora_b @ lora_a
    return weight * (layer.magnitude / weight.detach().norm(dim=1))[:, None]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one element whenever a layer computes its norms."""
    calls: list[int] = []

    def counting(*args: Any) -> torch.Tensor:
        calls.append(1)
        return pk.functional.dora_norm(*args)

    monkeypatch.setattr("peft_kernels.nn.scale_cache.dora_norm", counting)
    return calls


@pytest.mark.parametrize("base", BASES)
def test_forward_and_training(base: str) -> None:
    layer = make_layer(base, use_rslora=True)
    x = torch.randn(2, 5, 64)
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert sorted(parameters) == [
        "lora_A.default.weight",
        "lora_B.default.weight",
        "lora_magnitude_vector.default.weight",
    ]
    expected = nn.functional.linear(x, adapted_weight(layer), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    got = torch.autograd.grad(layer(x).square().mean(), list(parameters.values()))
    for grad, wanted in zip(
        got, torch.autograd.grad(expected.square().mean(), list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(grad, wanted, **CLOSE)


@pytest.mark.parametrize("base", BASES)
def test_starts_as_its_base_layer(base: str) -> None:
    linear: Any = nn.Linear(64, 128)
    linear = linear if base == "dense" else NF4Linear.from_linear(linear, double_quant=base == "nf4_double")
    layer = DoRALinear.from_linear(linear, r=4)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), linear(x), **CLOSE)
    first = layer.adapter[0].clone()
    with torch.no_grad():
        layer.magnitude.zero_()
        layer.adapter[1].fill_(1.0)
    layer.reset_parameters()
    assert not torch.equal(layer.adapter[0], first)
    torch.testing.assert_close(layer(x), linear(x), **CLOSE)


def test_dtypes_and_from_scratch() -> None:
    layer = DoRALinear(64, 128, bias=False, r=4, dtype=torch.bfloat16)
    assert {p.dtype for p in (*layer.adapter, layer.magnitude)} == {torch.float32}
    assert layer(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    assert layer.base_layer.bias is None
    assert DoRALinear(8, 8, dtype=torch.float64).magnitude.dtype == torch.float64
    assert DoRALinear(8, 8, device="meta").magnitude.is_meta


def test_dropout_only_in_training() -> None:
    layer = make_layer(lora_dropout=0.4)
    x = torch.randn(3, 64)
    torch.manual_seed(8)
    y = layer(x)
    torch.manual_seed(8)
    dropped = pk.functional.philox_dropout(x, 0.4)
    base = layer.base_layer
    update = adapted_weight(layer) - base.weight
    expected = base(x) + nn.functional.linear(dropped, update)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(layer.eval()(x), base(x) + nn.functional.linear(x, update), **CLOSE)


def test_norms_are_kept_in_eval_mode_only(computed: list[int]) -> None:
    layer = make_layer().eval()
    x = torch.randn(3, 64)
    y = layer(x)
    assert torch.equal(layer(x), y)
    assert len(computed) == 1
    layer.train()(x)
    layer.adapter[1].data.mul_(3.0)  # as bitsandbytes' optimizers do
    assert not torch.equal(layer(x), y)
    expected = nn.functional.linear(x, adapted_weight(layer), layer.base_layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected, **CLOSE)
    assert len(computed) == 2


def write_a(layer: DoRALinear) -> None:
    with torch.no_grad():
        layer.adapter[0].mul_(3.0)


def write_b(layer: DoRALinear) -> None:
    with torch.no_grad():
        layer.adapter[1].mul_(3.0)


def write_the_base(layer: DoRALinear) -> None:
    with torch.no_grad():
        layer.base_layer.weight[:, ::2].mul_(3.0)


def train_a_step(layer: DoRALinear) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(3, 64)).square().mean().backward()
    optimizer.step()


def load_other_weights(layer: DoRALinear) -> None:
    layer.load_state_dict({key: 2 * value for key, value in layer.state_dict().items()})


def assign_other_weights(layer: DoRALinear) -> None:
    layer.load_state_dict({key: 2 * value for key, value in layer.state_dict().items()}, assign=True)


def replace_the_base(layer: DoRALinear) -> None:
    layer.base_layer = nn.Linear(64, 128).requires_grad_(False)


def change_the_scaling(layer: DoRALinear) -> None:
    layer.scaling = 7.0


def round_the_weights(layer: DoRALinear) -> None:
    layer.bfloat16().float()  # in new memory, which may lie where the old did


def put_other_data(layer: DoRALinear) -> None:
    parameter = layer.adapter[1]
    other, parameter.data = 3.0 * parameter.detach(), torch.empty(0)  # the old memory is free now
    parameter.data = other.clone()


def stretch_the_magnitude(layer: DoRALinear) -> None:
    with torch.no_grad():
        layer.magnitude.mul_(1.5)


def write_past_torch(layer: DoRALinear) -> None:
    layer.adapter[1].data.mul_(3.0)
    pk.invalidate_norms(nn.Sequential(layer))


@pytest.mark.parametrize(
    "change",
    [
        write_a, write_b, write_the_base, train_a_step, load_other_weights, assign_other_weights,
        replace_the_base, change_the_scaling, round_the_weights, put_other_data, stretch_the_magnitude,
        write_past_torch,
    ],
)  # fmt: skip
def test_any_change_makes_the_norms_anew(change: Any) -> None:
    layer = make_layer().eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
    change(layer)
    expected = nn.functional.linear(x, adapted_weight(layer), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected, **CLOSE)  # with gradients on the way, and without
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **CLOSE)
    assert not torch.allclose(layer(x), before, **CLOSE)


@pytest.mark.parametrize("scales", ["absmax", "nested_absmax", "nested_offset"])
def test_new_scales_of_a_4_bit_base_are_noticed(scales: str) -> None:
    layer = make_layer("nf4" if scales == "absmax" else "nf4_double").eval()
    x = torch.randn(3, 64)
    layer(x)
    tensor = getattr(layer.base_layer, scales).view(-1)
    tensor[: tensor.numel() // 2 + 1] *= 3.0
    expected = nn.functional.linear(x, adapted_weight(layer), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_memory_that_is_used_again_is_not_taken_for_the_old() -> None:
    layer = make_layer().eval()
    x, parameter = torch.randn(3, 64), layer.adapter[1]
    layer(x)
    for _ in range(20):  # where memory were free, it would soon be used again
        parameter.data = parameter.data.clone()
        parameter.data = 1.25 * parameter.data
        expected = nn.functional.linear(x, adapted_weight(layer), layer.base_layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)  # B grows to 87 times its size


def test_a_trainable_base_without_gradients() -> None:
    layer = make_layer().eval()
    x = torch.randn(3, 64)
    expected = layer(x)
    layer.base_layer.requires_grad_(True)
    scale_cache.scale_cache(layer).clear()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(layer(x), expected)


def test_tensors_may_be_swapped_and_moved() -> None:
    layer = make_layer().eval()
    x = torch.randn(3, 64)
    layer(x)
    torch.utils.swap_tensors(layer.adapter[1], nn.Parameter(3.0 * layer.adapter[1].detach()))
    expected = nn.functional.linear(x, adapted_weight(layer), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    layer.double()
    assert scale_cache.scale_cache(layer)._kept is None  # or it would hold the memory that is left


def test_threads_may_share_a_layer() -> None:
    layer = make_layer().eval()
    x = torch.randn(3, 64)
    expected = layer(x).detach()

    def call(turn: int) -> bool:
        if turn % 3 == 0:
            pk.invalidate_norms(layer)
        with torch.inference_mode():
            return torch.equal(layer(x), expected)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(call, range(600)))


def test_writes_past_torch_go_unnoticed() -> None:
    """What `invalidate_norms` is for; if this fails, torch has learnt to notice, and it can go."""
    layer = make_layer().eval()
    x = torch.randn(3, 64)
    layer(x)
    layer.adapter[1].data.mul_(3.0)
    expected = nn.functional.linear(x, adapted_weight(layer), layer.base_layer.bias)
    assert not torch.allclose(layer(x), expected, **CLOSE)


def test_inference_mode_and_gradients_share_the_norms(computed: list[int]) -> None:
    layer = make_layer().eval()
    x = torch.randn(3, 64)
    with torch.inference_mode():
        y = layer(x)
    layer(x).sum().backward()
    assert len(computed) == 1
    assert layer.magnitude.grad is not None
    assert torch.equal(layer(x), y)


def test_layers_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = make_layer().eval()
        x = torch.randn(3, 64)
        layer(x)
        layer.adapter[1].mul_(2.0)  # without a version counter
        expected = nn.functional.linear(x, adapted_weight(layer), layer.base_layer.bias)
        torch.testing.assert_close(layer(x), expected, **CLOSE)


@pytest.mark.parametrize("base", BASES)
def test_peft_state_and_files_fit(base: str, tmp_path: Path) -> None:
    ours = nn.Sequential(make_layer(base))
    dense = ours[0].frozen_weight
    dense = dense if isinstance(dense, torch.Tensor) else dense.dequantize(torch.float32)
    model = nn.Sequential(nn.Linear(64, 128))
    model[0].weight.data.copy_(dense)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, init_lora_weights=False)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        peft_model.base_model.model[0].lora_magnitude_vector["default"].weight.mul_(1.5)
    adapter = {
        key.removeprefix("base_model.model."): value
        for key, value in peft_model.state_dict().items()
        if "base_layer.weight" not in key
    }
    missing = ours.load_state_dict(adapter, strict=False).missing_keys
    assert all(key.startswith("0.base_layer.") for key in missing)
    x = torch.randn(3, 64)
    expected = peft_model(x)
    torch.testing.assert_close(ours(x), expected, **CLOSE)

    peft_model.save_pretrained(tmp_path)
    nn.init.ones_(ours[0].magnitude)
    assert not torch.allclose(ours(x), expected, **CLOSE)
    file = load_file(tmp_path / "adapter_model.safetensors")
    keys = ours.load_state_dict(
        {key.removeprefix("base_model.model."): value for key, value in file.items()}, False
    )
    assert keys.unexpected_keys == []
    assert all(key.startswith("0.base_layer.") for key in keys.missing_keys)
    torch.testing.assert_close(ours(x), expected, **CLOSE)


@pytest.mark.parametrize("base", BASES)
def test_merging(base: str) -> None:
    layer = make_layer(base).eval()
    x = torch.randn(3, 64)
    before, exact = layer(x), adapted_weight(layer).detach()
    dense = layer.merge_to_dense()
    torch.testing.assert_close(dense.weight.detach(), exact, **CLOSE)
    torch.testing.assert_close(dense(x), before, **CLOSE)
    layer.merge()
    merged = layer(x)
    if base == "dense":
        torch.testing.assert_close(merged, before, **CLOSE)
    else:  # quantised again
        assert isinstance(layer.base_layer, NF4Linear)
        assert 0 < (merged - before).norm() < 0.2 * before.norm()
    assert torch.equal(layer.merge_to_dense().weight, dense.weight), "the update was added twice"
    layer.unmerge()
    assert torch.equal(layer(x), before)


def test_a_broken_magnitude_is_not_merged() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.magnitude[3] = math.nan
    with pytest.raises(ValueError, match="merged weight must be finite"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("base", BASES)
def test_copies_and_moves(base: str) -> None:
    layer = make_layer(base).eval()
    x = torch.randn(3, 64)
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), expected)
        nn.init.zeros_(copied.magnitude)
        assert torch.equal(layer(x), expected)
    layer.to("meta")
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}


@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph_and_follow_changes(training: bool, fresh_compiler: None) -> None:
    layer = make_layer("nf4_double", lora_dropout=0.2).train(training)
    x = torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(1)
        y = compiled(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, layer(x), **CLOSE)
        write_b(layer)


def test_repr_and_a_cache_that_is_no_state() -> None:
    layer = make_layer().eval()
    layer(torch.randn(3, 64))
    assert "r=4, scaling=1.5" in repr(layer)
    assert not any("norm" in key for key in layer.state_dict())
    assert scale_cache.scale_cache(layer) is layer.__dict__["_scale_cache"]
