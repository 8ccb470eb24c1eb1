"""deepcopy, pickle, torch.save and state_dicts: between fused and stock, strict, assigned, weights_only."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import SUBJECTS, inputs, make, models, outcome, results, run, stock_and_fused
from torch import nn

import peft_kernels as pk
from peft_kernels.core.library import native_library
from surgery.peft_models import assert_close, philox

MODULES_AND_MODELS = [(level, name) for level, name in SUBJECTS if level != "functions"]
EACH = pytest.mark.parametrize(
    ("level", "name"), MODULES_AND_MODELS, ids=[": ".join(subject) for subject in MODULES_AND_MODELS]
)


def saved(value: Any, **kwargs: Any) -> Any:
    """Through torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **kwargs)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: saved(module, weights_only=False),
}


@pytest.mark.parametrize("method", COPIES)
@EACH
def test_copies(level: str, name: str, method: str) -> None:
    """Same class, same bits in forward and backward, no memory in common."""
    module = make(level, name)
    expected = results(module, module, inputs())  # what it cached is not copied
    copied = COPIES[method](module)
    assert type(copied) is type(module)
    assert pk.explain(copied) == pk.explain(module)
    got = results(copied, copied, inputs())
    for key in expected:
        assert torch.equal(got[key], expected[key]), key
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.zero_()
    again = results(module, module, inputs())
    for key in expected:
        assert torch.equal(again[key], expected[key]), key


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@EACH
def test_state_dict(level: str, name: str, assign: bool) -> None:
    """Written and read with weights_only=True, strictly, into another of the kind; `assign` shares memory."""
    source, target = make(level, name), disturbed(make(level, name))
    state = saved(source.state_dict(), weights_only=True)
    if any(type(parameter).__name__ == "Params4bit" for parameter in source.parameters()):
        # bitsandbytes refuses its own quant state (transformers loads it by other means): the same from both.
        stock, _ = stock_and_fused(name)
        for model in (stock, target):
            with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*quant_map"):
                model.load_state_dict(state, assign=assign)
        adapter = {key: value for key, value in state.items() if key in dict(source.named_parameters())}
        assert not target.load_state_dict(adapter, strict=False, assign=assign).unexpected_keys
        return
    expected = results(source, source, inputs())
    assert not torch.equal(run(target, inputs()), expected["y"]) or not state
    keys = target.load_state_dict(state, assign=assign)
    assert keys.missing_keys == keys.unexpected_keys == []
    if assign:
        assert all(p.data_ptr() == state[key].data_ptr() for key, p in target.named_parameters())
    got = results(target, target, inputs())
    for key in expected:
        assert torch.equal(got[key], expected[key]), key
    assert all(row.fused and not row.reason for row in pk.explain(target))


def disturbed(module: nn.Module) -> nn.Module:
    """With other values in all that is trained."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    return module


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("name", models())
def test_between_fused_and_stock(name: str, assign: bool) -> None:
    """What one saves the other loads, both ways."""
    stock, fused = stock_and_fused(name)
    for source, target in ((stock, fused), (fused, stock)):
        state = saved(disturbed(source).state_dict(), weights_only=True)
        if "NF4" in name or name == "Linear4bit":  # the frozen 4-bit weights are the same
            state = {
                key: value for key, value in state.items() if "lora" in key or "ia3" in key or "bias" in key
            }
        assert not target.load_state_dict(state, strict=False, assign=assign).unexpected_keys
        x = inputs().requires_grad_()  # for which bitsandbytes computes in fp32
        assert_close(run(target, x), run(source, x))


@pytest.mark.parametrize(
    "name", ["LoRALinear over NF4", "DoRALinear over NF4", "IA3Linear over NF4", "NF4Linear"]
)
def test_safetensors(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source, target = make("modules", name), disturbed(make("modules", name))
    save_file(source.state_dict(), tmp_path / "module.safetensors")
    target.load_state_dict(load_file(tmp_path / "module.safetensors"))
    assert torch.equal(run(target, inputs()), run(source, inputs()))


def test_a_pickle_under_another_backend() -> None:
    """A copy has no trace of the backend that was in use."""
    module = make("models", "LoRA over NF4")
    philox(module)
    with pk.use_backend("reference"):
        expected = run(module, inputs())
        copied = pickle.loads(pickle.dumps(module))
    assert_close(run(copied, inputs()), expected)
    if native_library().loaded:
        with pk.use_backend("cpu"):
            assert isinstance(outcome(copied, inputs()), torch.Tensor)
