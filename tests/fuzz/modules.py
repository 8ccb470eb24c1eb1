"""Modules, models, optimiser groups and files: what builds or changes objects."""

import copy
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from hypothesis import strategies as st
from torch import nn

import peft_kernels as pk

from . import properties
from .odd import FLOATS, INTS, NO_TENSORS, Draw, choose, odd, odd_tensor
from .properties import Refusal
from .weights import JSON_VALUES

SIZE_NAMES = ("in_features", "out_features", "input_size")
MODULES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "NF4Linear": (
        pk.nn.NF4Linear,
        {"in_features": 64, "out_features": 8, "bias": True, "blocksize": 64, "double_quant": False}
        | {"device": None, "dtype": torch.float32, "activation": None},
    ),
    "LoRALinear": (
        pk.nn.LoRALinear,
        {"in_features": 64, "out_features": 8, "bias": True, "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1}
        | {"use_rslora": False, "device": None, "dtype": torch.float32},
    ),
    "DoRALinear": (
        pk.nn.DoRALinear,
        {"in_features": 64, "out_features": 8, "bias": True, "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}
        | {"use_rslora": False, "device": None, "dtype": torch.float32},
    ),
    "IA3Linear": (
        pk.nn.IA3Linear,
        {"in_features": 64, "out_features": 8, "bias": True, "feedforward": False}
        | {"device": None, "dtype": torch.float32},
    ),
    "BottleneckAdapter": (
        pk.nn.BottleneckAdapter,
        {
            "input_size": 64,
            "reduction_factor": 16.0,
            "non_linearity": "relu",
            "scaling": 1.0,
            "is_parallel": False,
        }
        | {"ln_before": False, "ln_after": False, "adapter_residual_before_ln": False, "use_gating": False}
        | {"dropout": 0.0, "init_weights": "bert", "device": None, "dtype": torch.float32},
    ),
    "PhiloxDropout": (pk.nn.PhiloxDropout, {"p": 0.5}),
}
# Not sizes that there might be memory for.
SIZES = tuple(i for i in INTS if not isinstance(i, int) or abs(i) <= 4096 or abs(i) >= 2**50)


def construct(draw: Draw, name: str) -> None:
    """Build a module of odd options: refused by name, or it computes."""
    build, options = MODULES[name]
    options, changed = dict(options), False
    for _ in range(choose(draw, (0, 1, 1, 2))):
        option, changed = choose(draw, [*options]), True
        options[option] = (
            choose(draw, SIZES) if option in (*SIZE_NAMES, "r") else odd(draw, options[option])[0]
        )
    module = properties.outcome(build, **options)
    if isinstance(module, Refusal):
        assert changed, f"valid options were refused: {module.error}"
        properties.refuse(module, (*options, "weight"))
        return
    size = getattr(module, "in_features", getattr(module, "input_size", 64))
    parameter = next(module.parameters(), torch.ones(()))
    dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
    x = torch.ones(1, 2, size, dtype=dtype, device=parameter.device)
    y = properties.outcome(module, x)
    if isinstance(y, Refusal):
        properties.refuse(
            y,
            (
                *options,
                "x",
                "hidden",
                "weight",
                "bias",
                "lora_a",
                "lora_b",
                "ia3_l",
                "down_weight",
                "scaling",
            ),
        )
    str(module)


def model_of(draw: Draw) -> nn.Module:
    """A small model with a quantised layer and odd things in it."""
    linear = bnb.nn.Linear4bit(
        64, 8, quant_type=choose(draw, ("nf4", "nf4", "fp4")), compute_dtype=torch.float32
    )
    if draw(st.booleans()):
        linear = linear.to("cpu")  # quantises it
    model = nn.Sequential(nn.Linear(64, 64), linear, nn.ReLU(), pk.nn.LoRALinear(8, 8), pk.nn.NF4Linear(8, 8))
    for _ in range(choose(draw, (0, 1, 1, 2, 3))):
        change: Any = choose(draw, CHANGES)
        change(draw, model)
    return model


def _odd_parameter(draw: Draw, model: nn.Module) -> None:
    owner: Any = model[choose(draw, (0, 1, 4))]
    name = choose(draw, [*owner._parameters, "none"])
    parameter = owner._parameters.get(name)
    if parameter is not None and type(parameter.data) is torch.Tensor and not parameter.is_inference():
        plain = parameter.layout == torch.strided and not parameter.is_meta and parameter.numel() < 10_000
        if not plain or not parameter.untyped_storage().nbytes():
            return  # it was changed already
        value = odd_tensor(draw, owner._parameters[name].data)[0]
        if isinstance(value, torch.Tensor):
            floating = value.dtype.is_floating_point
            trained = floating and not value.is_inference() and draw(st.booleans())
            owner._parameters[name] = nn.Parameter(value.detach(), requires_grad=trained)
        else:
            owner._parameters[name] = None


def _odd_state(draw: Draw, model: nn.Module) -> None:
    state = getattr(model[1]._parameters.get("weight"), "quant_state", None)  # type: ignore[index]
    if state is not None:
        name = choose(
            draw, ("absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset", "state2")
        )
        value = getattr(state, name, None)
        if isinstance(value, torch.Tensor) and (
            type(value) is not torch.Tensor or value.layout != torch.strided
        ):
            return  # it was changed already
        setattr(state, name, odd(draw, tuple(value) if isinstance(value, torch.Size) else value)[0])


def _hook(draw: Draw, model: nn.Module) -> None:
    layer: Any = choose(draw, [*model.modules()])
    layer.register_forward_hook(lambda *args: None)


def _shared(draw: Draw, model: Any) -> None:
    model.append(choose(draw, [*model.children()]))


def _own_forward(draw: Draw, model: Any) -> None:
    model[choose(draw, (0, 1, 4))].forward = choose(draw, (lambda x: x, None, 3))


def _hidden_class(draw: Draw, model: Any) -> None:
    model[1].__class__ = type("Linear4bit", (type(model[1]),), {"forward": lambda self, x: x})


def _attribute(draw: Draw, model: Any) -> None:
    layer = model[1]
    name = choose(draw, [*(key for key in vars(layer) if not key.startswith("_")), *layer._parameters])
    if name in vars(layer):
        vars(layer)[name] = choose(draw, (*NO_TENSORS[:5], *INTS[:6]))
    else:
        del layer._parameters[name]


CHANGES = (
    _odd_parameter,
    _odd_parameter,
    _odd_state,
    _odd_state,
    _hook,
    _shared,
    _own_forward,
    _hidden_class,
    _attribute,
)
ONLY: tuple[Any, ...] = (
    "*",
    "1",
    "nope",
    "[",
    "",
    None,
    None,
    None,
    1,
    [],
    ["1"],
    ["1", 2],
    (),
    lambda *a: True,
    lambda *a: 1 / 0,
    nn.Linear,
    b"1",
)


def classes(model: nn.Module) -> list[type]:
    """Of every module: what replace_layers changes."""
    return [type(module) for module in model.modules()]


def surgery(draw: Draw) -> None:
    """Replace the layers of an odd model: all or nothing, and undone by restore_layers."""
    model: Any = model_of(draw) if draw(st.integers(0, 9)) else choose(draw, NO_TENSORS)
    only = choose(draw, ONLY)
    is_model = isinstance(model, nn.Module)
    before = classes(model) if is_model else []
    parameters = list(model.parameters()) if is_model else []
    with properties.unchanged(parameters):
        try:
            report = pk.replace_layers(model, only=only, strict=draw(st.booleans()))
        except ZeroDivisionError:
            report = None  # the caller's own function
        except properties.DOCUMENTED as error:
            properties.refuse(Refusal(error), ("model", "only", "strict"))
            report = None
        if not is_model:
            return
        if report is None:
            assert classes(model) == before, "a refused call changed the model"
            return
        str(report), str(pk.explain(model)), pk.restore_layers(model)
    assert classes(model) == before


def count(draw: Draw) -> None:
    """Count the parameters of an odd model."""
    model: Any = model_of(draw) if draw(st.integers(0, 9)) else choose(draw, NO_TENSORS)
    counted = properties.outcome(pk.trainable_parameters, model)
    if isinstance(counted, Refusal):
        properties.refuse(counted, ("model", "quant_state.shape"))
    else:
        assert 0 <= counted.trainable <= counted.total or counted.total < 0
        str(counted)


def optim(draw: Draw) -> None:
    """Parameter groups of an odd model, at odd rates."""
    model: Any = pk.nn.LoRALinear(8, 8) if draw(st.booleans()) else model_of(draw)
    options: dict[str, Any] = {
        "model": model,
        "lr": 1e-3,
        "ratio": 16.0,
        "weight_decay": 0.0,
        "embedding_lr": 1e-6,
    }
    for _ in range(choose(draw, (0, 1, 1, 2))):
        name = choose(draw, [*options])
        options[name] = choose(draw, (*FLOATS, *NO_TENSORS))
    groups = properties.outcome(pk.optim.loraplus_param_groups, **options)
    if isinstance(groups, Refusal):
        properties.refuse(groups, [*options])
        return
    assert len(groups) == 4
    numbers = [float(group[name]) for group in groups for name in ("lr", "weight_decay")]
    assert all(map(math.isfinite, numbers)), f"groups with {numbers}"
    wanted = {id(p) for p in options["model"].parameters() if p.requires_grad}
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(wanted), "parameters are missing, or twice"


def _template(use_safetensors: bool) -> dict[str, bytes]:
    module = pk.nn.BottleneckAdapter.pfeiffer(32)
    options = dict(pk.nn.bottleneck_adapter.BOTTLENECK_PRESETS["pfeiffer"])
    checkpoint = pk.io.AdapterHubCheckpoint(
        "sst", {"encoder.layer.0.output": module}, {"config": options, "hidden_size": 32}
    )
    folder = Path(tempfile.mkdtemp())
    try:
        pk.io.save_adapterhub(checkpoint, folder, use_safetensors=use_safetensors)
        return {file.name: file.read_bytes() for file in folder.iterdir()}
    finally:
        shutil.rmtree(folder)


def damaged(draw: Draw, content: bytes) -> bytes:
    """A file cut short, with other bytes, or with more of them."""
    kind, at = draw(st.integers(0, 3)), draw(st.integers(0, len(content) - 1))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content + content[at:]
    changed = bytearray(content)
    if kind == 2:  # near the start, where safetensors has its header
        at = min(at, draw(st.integers(0, 600)))
    for _ in range(draw(st.integers(1, 3))):
        changed[min(at, len(changed) - 1)] = draw(st.integers(0, 255))
        at = draw(st.integers(0, len(content) - 1))
    return bytes(changed)


def hostile_config(draw: Draw, content: bytes) -> bytes:
    """An adapter_config.json with other values."""
    config: Any = json.loads(content)
    for _ in range(choose(draw, (1, 1, 2))):
        owner = choose(draw, (config, config["config"] if isinstance(config.get("config"), dict) else config))
        key = choose(draw, [*owner, "architecture", "phm_layer", "version"])
        if draw(st.integers(0, 4)) == 0:
            owner.pop(key, None)
        else:
            owner[key] = choose(draw, JSON_VALUES)
    return json.dumps(config).encode()


def adapterhub(draw: Draw) -> None:
    """Load a damaged AdapterHub folder; what loads can be saved."""
    files = _template(draw(st.booleans()))
    for name in list(files):
        kind = draw(st.integers(0, 4))
        if kind == 0:
            files[name] = damaged(draw, files[name])
        elif kind <= 2 and name == pk.io.adapterhub.CONFIG_FILE:
            files[name] = hostile_config(draw, files[name])
        elif kind == 3 and draw(st.integers(0, 9)) == 0:
            del files[name]
    folder = Path(tempfile.mkdtemp())
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            checkpoint = pk.io.load_adapterhub(folder)
        except (ValueError, FileNotFoundError) as error:
            refused = error
        else:
            refused = None
        if refused is not None:
            assert type(refused) in (ValueError, FileNotFoundError), repr(refused)
            named = (
                str(folder),
                "scaling",
                "dropout",
                "reduction_factor",
                "non_linearity",
                "init_weights",
                "config",
                "the adapter at",
            )
            assert any(name in str(refused) for name in named), f"names nothing: {refused}"
            return
        for module in checkpoint.modules.values():
            module(torch.zeros(1, 1, module.input_size, dtype=next(module.parameters()).dtype))
        result = properties.outcome(pk.io.save_adapterhub, copy.deepcopy(checkpoint), folder / "again")
        if isinstance(result, Refusal):
            properties.refuse(result, ("name", "checkpoint", "config"))
    finally:
        shutil.rmtree(folder)


def _constructor(name: str) -> Callable[[Draw], None]:
    return lambda draw: construct(draw, name)


OBJECTS: dict[str, Callable[[Draw], None]] = {
    **{f"nn.{name}": _constructor(name) for name in MODULES},
    "replace_layers": surgery,
    "trainable_parameters": count,
    "optim.loraplus_param_groups": optim,
    "io.load_adapterhub": adapterhub,
}
