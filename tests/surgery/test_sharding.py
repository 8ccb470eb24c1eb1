"""Fused layers under DDP and FSDP: gathered weights are used, sharded ones are left to the stock forward."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from peft_models import assert_close, layer, make_mlp, pair
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_kernels.functional import adapted_linear
from peft_kernels.surgery import explain, peft_lora, replace_layers


@pytest.fixture
def process_group() -> Iterator[None]:
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_distributed_data_parallel(process_group: None, base: str) -> None:
    """Its reducer hooks fire for the gradients that the fused backward makes."""
    stock, fused = pair(make_mlp(base))
    replace_layers(fused, strict=True)
    wrapped = DistributedDataParallel(fused)
    x = torch.randn(3, 64)
    for model in (stock, wrapped):
        model(x).square().sum().backward()
    grads = [[p.grad for p in model.parameters() if p.requires_grad] for model in (stock, fused)]
    assert len(grads[0]) == 4
    for expected, grad in zip(*grads, strict=True):
        assert_close(grad, expected)
    assert [row.reason for row in explain(fused)] == ["", ""]


def test_fully_shard(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 gathers a layer's parameters for the length of its forward; that is when the layer decides."""
    stock, fused = pair(make_mlp())
    replace_layers(fused, strict=True)
    for name in ("base_model.model.0", "base_model.model.2"):
        fully_shard(layer(fused, name), mesh=dist.init_device_mesh("cpu", (1,)))
    sharded = "lora_A: its weight is sharded: each call decides, once FSDP has gathered it"
    assert {row.reason for row in explain(fused)} == {sharded}
    calls = []
    monkeypatch.setattr(
        peft_lora,
        "adapted_linear",
        lambda *args, **parts: calls.append(args) or adapted_linear(*args, **parts),
    )
    x = torch.randn(3, 64)
    y, expected = fused(x), stock(x)
    assert len(calls) == 2
    assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    grads = [p.grad.full_tensor() for p in fused.parameters() if p.grad is not None]
    expected_grads = [p.grad for p in stock.parameters() if p.grad is not None]
    assert len(grads) == len(expected_grads) == 4
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad)


def test_sub_layers_sharded_on_their_own(process_group: None) -> None:
    """As PEFT's FSDP policy does it: only calling a sub-layer gathers its weight, reading it does not."""
    stock, fused = pair(make_mlp())
    replace_layers(fused, strict=True)
    lora_a = layer(fused).lora_A["default"]
    fully_shard(lora_a, mesh=dist.init_device_mesh("cpu", (1,)))
    assert explain(fused).rows[0].reason == "lora_A: it has hooks"
    x = torch.randn(3, 64)
    assert torch.equal(layer(fused)(x), layer(stock)(x))


def test_norms_are_not_kept_where_weights_may_be_gathered(process_group: None) -> None:
    """FSDP2 writes what it gathers where it was before, and puts the version counter back."""
    model = make_mlp(use_dora=True).eval()
    replace_layers(model, strict=True)
    x = torch.randn(3, 64)
    lora_b = layer(model).lora_B["default"].weight
    with torch.no_grad():
        before = model(x)
        with torch.autograd._unsafe_preserve_version_counter(lora_b):
            lora_b.mul_(1.5)
        after = model(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, copy.deepcopy(model)(x))  # which has kept nothing
