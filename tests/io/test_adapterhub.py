"""AdapterHub folders: what `adapters` saves is loaded here, what is saved here `adapters` loads."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import peft_kernels as pk
from peft_kernels.io import AdapterHubCheckpoint, load_adapterhub, save_adapterhub
from peft_kernels.nn.bottleneck_adapter import BOTTLENECK_PRESETS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import adapters


def make_model(config: Any) -> Any:
    torch.manual_seed(0)
    model: Any = BertModel(
        BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
    )
    adapters.init(model)
    model.add_adapter("sst", config=config, set_active=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter += torch.randn_like(parameter)
    return model.eval()


CONFIGS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor={"0": 2, "default": 8}),
    "parallel": adapters.ParBnConfig(),
    "all options": adapters.SeqBnConfig(
        ln_before=True, ln_after=True, use_gating=True, scaling="channel", dropout=0.1, non_linearity="gelu"
    ),
    "learned": adapters.SeqBnConfig(scaling="learned"),
}


# adapters cannot save its two names of a layer norm before the adapter as safetensors.
@pytest.mark.parametrize(
    ("name", "safe"),
    [(name, safe) for name in CONFIGS for safe in (False, True) if not (safe and CONFIGS[name].ln_before)],
)
def test_round_trip(name: str, safe: bool, tmp_path: Path) -> None:
    model = make_model(CONFIGS[name])
    model.save_adapter(str(tmp_path / "theirs"), "sst", use_safetensors=safe)
    checkpoint = load_adapterhub(tmp_path / "theirs")
    assert checkpoint.name == "sst"
    assert checkpoint.config["hidden_size"] == 32
    layers = {key.rpartition(".adapters.")[0]: m for key, m in model.named_modules() if key.endswith(".sst")}
    assert checkpoint.modules.keys() == layers.keys()
    x = torch.randn(2, 5, 32)
    for location, module in checkpoint.modules.items():
        assert not module.training
        residual = None if module.is_parallel else x
        torch.testing.assert_close(module(x, residual), layers[location](x, x)[0])
        for parameter, tensor in layers[location].state_dict().items():
            assert torch.equal(module.state_dict()[parameter], tensor)

    save_adapterhub(checkpoint, tmp_path / "ours", use_safetensors=safe)
    ids = torch.arange(6)[None]
    expected = model(input_ids=ids)[0]
    model.delete_adapter("sst")
    model.load_adapter(str(tmp_path / "ours"), use_safetensors=safe, set_active=True)
    assert torch.equal(model.eval()(input_ids=ids)[0], expected)
    again = load_adapterhub(tmp_path / "ours")
    assert again.config == checkpoint.config


def test_new_modules_are_saved_for_adapters(tmp_path: Path) -> None:
    options = {**BOTTLENECK_PRESETS["houlsby"], "reduction_factor": 4}
    places = [f"encoder.layer.{i}.{place}" for i in (0, 1) for place in ("attention.output", "output")]
    modules = {place: pk.nn.BottleneckAdapter.from_config(32, options) for place in places}
    config = {"config": options, "model_type": "bert", "hidden_size": 32, "model_name": ""}
    save_adapterhub(AdapterHubCheckpoint("new", modules, config), tmp_path)
    model = make_model(adapters.SeqBnConfig())
    name = model.load_adapter(str(tmp_path))
    loaded = model.encoder.layer[1].attention.output.adapters[name].state_dict()
    for key, tensor in modules["encoder.layer.1.attention.output"].state_dict().items():
        assert torch.equal(loaded[key], tensor)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(CONFIGS["houlsby"]).save_adapter(str(tmp_path / "a"), "sst")
    return tmp_path / "a"


@pytest.mark.parametrize("old", ["layer_text_task_adapters", "attention_text_lang_adapters"])
def test_old_names_of_weights(folder: Path, old: str) -> None:
    def rename(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            state[key.replace(".adapters.", f".{old}.")] = state.pop(key)

    expected = load_adapterhub(folder)
    rewrite(folder, rename)
    checkpoint = load_adapterhub(folder)
    assert checkpoint.modules.keys() == expected.modules.keys()
    for location, module in checkpoint.modules.items():
        assert torch.equal(module.adapter_up.weight, expected.modules[location].adapter_up.weight)


def test_loaded_modules_train(folder: Path) -> None:
    for module in load_adapterhub(folder).modules.values():
        module(torch.randn(3, 32)).sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(("old", "new"), [("gelu", "gelu_new"), ("gelu_orig", "gelu"), ("relu", "relu")])
def test_files_without_a_version_have_other_names_of_activations(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["version"]
    config["config"]["non_linearity"] = old
    file.write_text(json.dumps(config))
    checkpoint = load_adapterhub(folder)
    assert {module.non_linearity for module in checkpoint.modules.values()} == {new}
    save_adapterhub(checkpoint, folder)  # with a version, and the new name
    assert load_adapterhub(folder).config["config"]["non_linearity"] == new


def rewrite(folder: Path, change: Any) -> None:
    state = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_adapter.bin")


KEY = "encoder.layer.0.output.adapters.sst."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop(KEY + "adapter_up.bias"),
            "the adapter at encoder.layer.0.output must fit its config",
        ),
        (lambda s: s.pop(KEY + "adapter_up.weight"), "must have a matrix adapter_up.weight"),
        (lambda s: s.update({KEY + "adapter_down.0.bias": torch.zeros(3)}), "must fit its config"),
        (lambda s: s.update({KEY + "gate.weight": torch.zeros(1, 32)}), "must fit its config"),
        (
            lambda s: s.update({"heads.sst.0.weight": torch.zeros(1)}),
            "got 'heads.sst.0.weight'; load other parts",
        ),
        (lambda s: s.clear(), "must have an adapter, got an empty file"),
        (lambda s: s.update({"x": 3}), "must be a dict of names and plain float tensors"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, change: Any, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_adapterhub(folder)


@pytest.mark.parametrize("keep", [0, 10, 400, 2000])
@pytest.mark.parametrize("safe", [False, True])
def test_truncated_files(folder: Path, keep: int, safe: bool) -> None:
    file = folder / "pytorch_adapter.bin"
    if safe:
        save_adapterhub(load_adapterhub(folder), folder, use_safetensors=True)
        file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{file.name} must be a whole .* download it again"):
        load_adapterhub(folder)


def test_files_with_code_are_refused(folder: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return print, ("harm",)

    torch.save({KEY + "adapter_up.weight": Harm()}, folder / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match="must be a whole file of tensors"):
        load_adapterhub(folder)


def test_missing_and_foreign_files(folder: Path) -> None:
    config = folder / "adapter_config.json"
    text = config.read_text()
    for wrong, message in (
        ("{", "must be JSON"),
        ("[]", "must have entries 'name' and 'config'"),
        (
            json.dumps({"name": "x", "config": {"architecture": "lora"}}),
            "must be of a bottleneck adapter, got",
        ),
    ):
        config.write_text(wrong)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_adapterhub(folder)
    config.write_text(text)
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter.safetensors or pytorch_adapter.bin, got neither"):
        load_adapterhub(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        load_adapterhub(folder)


def test_saving_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    good = load_adapterhub(folder)
    target = tmp_path / "new"
    wrong = {**good.config, "config": {**good.config["config"], "non_linearity": "relu"}}
    for checkpoint, message in (
        (AdapterHubCheckpoint("a.b", good.modules, good.config), "name must be a word without dots"),
        (AdapterHubCheckpoint("a", {}, good.config), "checkpoint must have modules"),
        (AdapterHubCheckpoint("a", good.modules, {}), "checkpoint must have modules and a config"),
        (AdapterHubCheckpoint("a", good.modules, wrong), "config non_linearity must be that of the modules"),
    ):
        with pytest.raises(ValueError, match=message):
            save_adapterhub(checkpoint, target)
        assert not target.exists()


def test_io_does_not_import_adapters() -> None:
    import subprocess

    code = "import sys, peft_kernels; assert not {'adapters', 'peft', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size", [96, 384, 768])
def test_every_rank_is_found_again(size: int, tmp_path: Path) -> None:
    for rank in (*range(1, size + 1, 7), size - 1, 2 * size):
        module = pk.nn.BottleneckAdapter(size, reduction_factor=size / (rank + 0.5))
        options = {**BOTTLENECK_PRESETS["pfeiffer"], "reduction_factor": size / (rank + 0.5)}
        save_adapterhub(AdapterHubCheckpoint("a", {"layer": module}, {"config": options}), tmp_path)
        assert load_adapterhub(tmp_path).modules["layer"].down_sample == rank


def test_the_last_one_saved_is_loaded(folder: Path) -> None:
    checkpoint = load_adapterhub(folder)
    save_adapterhub(checkpoint, folder, use_safetensors=True)
    for module in checkpoint.modules.values():
        torch.nn.init.ones_(module.adapter_up.weight)
    save_adapterhub(checkpoint, folder)
    for module in load_adapterhub(folder).modules.values():
        assert (module.adapter_up.weight == 1).all()


def test_a_reduction_factor_of_another_rank_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_adapterhub(folder)
    checkpoint.config["config"]["reduction_factor"] = 2
    with pytest.raises(ValueError, match="config reduction_factor must make a rank of 8 from 32 features"):
        save_adapterhub(checkpoint, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_whole_number_for_scaling_is_loaded_by_adapters(folder: Path) -> None:
    checkpoint = load_adapterhub(folder)
    checkpoint.config["config"]["scaling"] = 1
    save_adapterhub(checkpoint, folder)
    make_model(CONFIGS["houlsby"]).load_adapter(str(folder), load_as="again")


@pytest.mark.parametrize(
    ("option", "value"), [("non_linearity", ["x"]), ("scaling", [1]), ("scaling", 10**400), ("dropout", None)]
)
def test_options_of_other_kinds(folder: Path, option: str, value: Any) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["config"][option] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"must have a value of {option}"):
        load_adapterhub(folder)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(32, 0),
        torch.zeros(32, 8).to(torch.int8),
        torch.zeros(32, 8).to_sparse(),
        torch.zeros(8, 8, 8),
    ],
    ids=["empty", "int8", "sparse", "3-dim"],
)
def test_weights_of_other_kinds(folder: Path, tensor: torch.Tensor) -> None:
    rewrite(folder, lambda state: state.update({KEY + "adapter_up.weight": tensor}))
    with pytest.raises(ValueError, match="must "):
        load_adapterhub(folder)
