"""Types of `replace_layers`, `explain` and their report, and of AdapterHub folders."""

import tempfile
from collections.abc import Mapping
from typing import Any, assert_type

import peft
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.surgery import Report


def q_and_v(name: str, layer: nn.Module) -> bool:
    """A choice of layers by a function."""
    return name.endswith(("q_proj", "v_proj")) and isinstance(layer, nn.Linear)


layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
model: nn.Module = peft.get_peft_model(layers, peft.LoraConfig(target_modules=["0", "2"]))

report = pk.replace_layers(model, only=["0", "base_model.model.2"], strict=True)
assert_type(report, Report)
assert_type(pk.explain(model), Report)
assert_type(len(report.fused), int)
for row in report:
    assert_type(row.name, str)
    assert_type(row.fused, bool)
    assert_type(row.reason, str)
reasons = {row.name: row.reason for row in report.skipped}
assert_type(reasons, dict[str, str])
pk.restore_layers(model)
pk.replace_layers(model, only=q_and_v)
pk.replace_layers(model, only="*.2")

checkpoint = pk.io.AdapterHubCheckpoint(
    "sst",
    {"encoder.layer.0.output": pk.nn.BottleneckAdapter.houlsby(64)},
    {"config": dict(pk.nn.bottleneck_adapter.BOTTLENECK_PRESETS["houlsby"])},
)
with tempfile.TemporaryDirectory() as folder:
    pk.io.save_adapterhub(checkpoint, folder, use_safetensors=True)
    loaded = pk.io.load_adapterhub(folder)
assert_type(loaded.modules, Mapping[str, pk.nn.BottleneckAdapter])
assert_type(loaded.config, Mapping[str, Any])
assert_type(loaded.modules["encoder.layer.0.output"](torch.randn(2, 64)), Any)
