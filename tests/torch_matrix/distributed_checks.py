"""What two processes check together: each check compares with one process that has the whole batch.

`run` is what a spawned process executes. All checks share the processes, because starting them takes longer
than all the checks; after the first failure the processes are out of step, and the rest is not run.
"""

import copy
import functools
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from subjects import make, models, modules, without_dropout
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from surgery.peft_models import assert_close, make_mlp

PROCESSES = 2
STEPS = 3
STORAGE = (torch.uint8, torch.float32, torch.bfloat16)
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[..., None], *args: Any) -> None:
    """Register a check under its name and its arguments."""
    name = ", ".join((function.__name__, *(str(getattr(arg, "__name__", arg)) for arg in args)))
    CHECKS[name] = lambda: function(*args)


def run(rank: int, folder: str) -> None:
    """All checks, in process `rank`; writes the failures, by name, to a file in `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timeout)
    outcomes = dict.fromkeys(CHECKS, "not run: a check before it failed")
    for name, call in CHECKS.items():
        torch.manual_seed(0)
        try:
            call()
        except Exception:  # noqa: BLE001 - handed to the test, which fails with it
            outcomes[name] = traceback.format_exc()
            break
        outcomes[name] = ""
    torch.save(outcomes, f"{folder}/{rank}")
    if outcomes[list(CHECKS)[-1]] == "":
        dist.barrier()
        dist.destroy_process_group()
    # Not the interpreter's way out: a thread of gloo's that still holds Python objects can abort it.
    os._exit(0)


def failures(folder: Path) -> dict[str, list[str]]:
    """What the processes wrote, by check."""
    outcomes = [torch.load(folder / str(rank)) for rank in range(PROCESSES)]
    return {name: [outcome[name] for outcome in outcomes] for name in CHECKS}


class Ops(TorchDispatchMode):
    """Counts the ops of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "peft_kernels" and "adapted_linear" in str(func)
        self.count += func.namespace == "peft_kernels" and "bottleneck" in str(func)
        return func(*args, **(kwargs or {}))


def batch() -> torch.Tensor:
    return torch.randn(2 * PROCESSES, 64, generator=torch.Generator().manual_seed(5))


def my_part() -> torch.Tensor:
    return batch().chunk(PROCESSES)[dist.get_rank()]


def train(model: nn.Module, x: torch.Tensor, call: Callable[[torch.Tensor], Any] | None = None) -> int:
    """A few steps of SGD; the mean of the processes' losses is the loss of the whole batch.

    Returns how many layers ran fused in a step.
    """
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        with Ops() as ops:
            loss: torch.Tensor = (call or model)(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ops.count


def trained(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every trained parameter in full, named as without wrappers."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            yield name.removeprefix("module."), full.detach()


def assert_trained_alike(model: nn.Module, alone: nn.Module) -> None:
    """The same parameters as one process has after training on the whole batch; none as at the start."""
    before = copy.deepcopy(alone)
    train(alone, batch())
    expected, start = dict(trained(alone)), dict(trained(before))
    got = dict(trained(model))
    assert list(got) == list(expected)
    for name in expected:
        assert_close(got[name], expected[name])
        assert not torch.equal(got[name], start[name]), name


def stock_and_fused(stock: nn.Module) -> tuple[nn.Module, nn.Module]:
    without_dropout(stock)
    fused = copy.deepcopy(stock)
    pk.replace_layers(fused, strict=True)
    return stock, fused


def shard(model: nn.Module, **kwargs: Any) -> nn.Module:
    """As a model of transformers is sharded: each block, and the rest."""
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for block in model.children():
        fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def ddp_of_a_replaced_model(name: str) -> None:
    stock, fused = stock_and_fused(models()[name]())
    train(DistributedDataParallel(fused), my_part())
    assert all(row.fused for row in pk.explain(fused))
    assert_trained_alike(fused, stock)


def ddp_of_a_module(name: str) -> None:
    module = without_dropout(make("modules", name))
    alone = copy.deepcopy(module)
    train(DistributedDataParallel(module), my_part())
    assert_trained_alike(module, alone)


def fsdp2_of_a_replaced_model(name: str) -> None:
    stock, fused = stock_and_fused(models()[name]())
    shard(fused)
    assert train(fused, my_part()) == len(pk.explain(fused))
    assert_trained_alike(fused, stock)


def fsdp2_of_a_module(name: str) -> None:
    module = nn.Sequential(without_dropout(make("modules", name)))
    alone = copy.deepcopy(module)
    shard(module)
    assert train(module, my_part()) == 1
    assert_trained_alike(module, alone)


def fsdp2_of_sharded_4_bit_storage(storage: torch.dtype, use_dora: bool) -> None:
    """QLoRA with FSDP: the packed bytes, as quant_storage, are sharded and gathered."""
    stock, fused = stock_and_fused(qlora(storage, use_dora))
    shard(fused)
    local = [p.to_local() for name, p in fused.named_parameters() if name.endswith("base_layer.weight")]
    assert [p.nbytes for p in local] == [64 * 128 // 2 // PROCESSES, 128 * 32 // 2 // PROCESSES]
    assert {p.dtype for p in local} == {storage}
    assert pk.trainable_parameters(fused).total == pk.trainable_parameters(stock).total
    assert train(fused, my_part()) == 2
    assert_trained_alike(fused, stock)


def qlora(storage: torch.dtype, use_dora: bool = False) -> nn.Module:
    model: nn.Module = make_mlp(
        "nf4_double", use_dora=use_dora, base_kwargs={"quant_storage": storage}
    ).base_model.model
    return model


def fsdp2_replaced_after_sharding(storage: torch.dtype) -> None:
    """The other order; and restored, it trains on with stock layers."""
    stock = without_dropout(qlora(storage))
    model = shard(copy.deepcopy(stock))
    classes = [type(module) for module in model.modules()]
    pk.replace_layers(model)
    assert train(model, my_part()) == 2
    assert_trained_alike(model, stock)
    pk.restore_layers(model)
    assert [type(module) for module in model.modules()] == classes
    assert train(model, my_part()) == 0
    assert_trained_alike(model, stock)


def fsdp2_restored_after_sharding() -> None:
    """fully_shard made a subclass of the fused class, which must stay one of FSDP's without the handler."""
    stock, fused = stock_and_fused(qlora(torch.float32))
    shard(fused)
    pk.restore_layers(fused)
    assert train(fused, my_part()) == 0
    assert_trained_alike(fused, stock)


def fsdp2_with_checkpointing() -> None:
    stock, fused = stock_and_fused(qlora(torch.bfloat16))
    shard(fused)
    train(fused, my_part(), lambda x: checkpoint(fused, x, use_reentrant=False))
    assert_trained_alike(fused, stock)


def fsdp2_in_mixed_precision() -> None:
    """bf16 storage survives a param_dtype of bf16, which the adapters are cast to: as stock under FSDP2."""
    models_ = stock_and_fused(qlora(torch.bfloat16))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    outputs = []
    for model in models_:
        for layer in model.modules():
            if hasattr(layer, "compute_dtype"):
                layer.compute_dtype = torch.bfloat16
        shard(model, mp_policy=policy)
        with Ops() as ops:
            outputs.append(model(my_part()).detach().double())
    assert ops.count == 2
    stock, fused = outputs
    # x, W and the adapters are the same bf16 numbers; stock rounds three results in each of two layers.
    assert (fused - stock).norm() <= 5 * 6**0.5 * torch.finfo(torch.bfloat16).eps / 2 * stock.norm()


def fsdp2_norms_of_dora_follow_the_weights(name: str) -> None:
    """In eval mode norms are kept: gathered weights have the address and the version that they had before."""
    stock, fused = stock_and_fused(models()[name]())
    fused.eval()
    shard(fused)
    expected = [stock.eval()(batch().requires_grad_()).chunk(PROCESSES)[dist.get_rank()]]
    got = [fused(my_part())]
    for model in (stock, fused):
        for parameter in model.parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.mul_(1.5)
    expected += [stock(batch().requires_grad_()).chunk(PROCESSES)[dist.get_rank()]]
    got += [fused(my_part())]
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


def fsdp2_adapter_checkpoint() -> None:
    """The adapter's full state_dict is the stock model's; it goes into a stock model without FSDP."""
    stock, fused = stock_and_fused(qlora(torch.float32))
    shard(fused)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(fused, options=options)
    if dist.get_rank() == 0:
        expected = {key: value for key, value in stock.state_dict().items() if "lora" in key}
        assert sorted(state) == sorted(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def fsdp2_state_dict_of_nf4_linear(double_quant: bool) -> None:
    """A sharded weight and its statistics, which every process has in full, are saved and loaded."""
    saved, loaded = (
        shard(nn.Sequential(pk.nn.NF4Linear(64, 32, double_quant=double_quant))) for _ in range(2)
    )
    x = my_part()
    with torch.no_grad():
        expected = saved(x)
        assert not torch.equal(loaded(x), expected)
        loaded.load_state_dict(saved.state_dict())
        assert torch.equal(loaded(x), expected)


def fsdp1(use_orig_params: bool) -> None:
    """The first FSDP, with PEFT's policy of wrapping what is trained by itself: stock layers run."""
    stock, fused = stock_and_fused(qlora(torch.float32))
    policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_trained_leaf)
    wrapped = FullyShardedDataParallel(
        fused, use_orig_params=use_orig_params, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )
    train(wrapped, my_part())
    assert not pk.explain(wrapped).fused
    train(stock, batch())
    with FullyShardedDataParallel.summon_full_params(wrapped):
        got = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in wrapped.named_parameters()}
        for name, expected in trained(stock):
            assert_close(got[name], expected)


def is_trained_leaf(module: nn.Module) -> bool:
    return not list(module.children()) and any(p.requires_grad for p in module.parameters())


for _name in models():
    check(ddp_of_a_replaced_model, _name)
for _name in modules():
    if _name != "PhiloxDropout":  # which has nothing to train
        check(ddp_of_a_module, _name)
for _name in models():
    check(fsdp2_of_a_replaced_model, _name)
for _name in modules():
    if _name != "PhiloxDropout":
        check(fsdp2_of_a_module, _name)
for _storage in STORAGE:
    for _dora in (False, True):
        check(fsdp2_of_sharded_4_bit_storage, _storage, _dora)
    check(fsdp2_replaced_after_sharding, _storage)
check(fsdp2_restored_after_sharding)
check(fsdp2_with_checkpointing)
check(fsdp2_in_mixed_precision)
check(fsdp2_norms_of_dora_follow_the_weights, "DoRA")
check(fsdp2_norms_of_dora_follow_the_weights, "DoRA over NF4")
check(fsdp2_adapter_checkpoint)
for _double in (False, True):
    check(fsdp2_state_dict_of_nf4_linear, _double)
for _orig in (True, False):
    check(fsdp1, _orig)
