"""AdapterHub checkpoints of bottleneck adapters: the folders that `adapters` saves and loads.

A folder holds `adapter_config.json`, whose "config" has the options of the adapter, and the weights in
`pytorch_adapter.bin` or `adapter.safetensors`, by keys `<location>.adapters.<name>.<parameter>` such as
`encoder.layer.0.output.adapters.sst.adapter_down.0.weight`.
"""

import json
import pickle
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_kernels.nn.bottleneck_adapter import BottleneckAdapter
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES

CONFIG_FILE, WEIGHTS_FILE, SAFE_WEIGHTS_FILE = (
    "adapter_config.json",
    "pytorch_adapter.bin",
    "adapter.safetensors",
)
# Files of adapter-transformers before 2.0 say layer_text_task_adapters and the like.
_KEY = re.compile(
    r"(?P<location>.+)\.(?:adapters|(?:attention|layer)_text_(?:task|lang)_adapters)\."
    r"(?P<name>[^.]+)\.(?P<parameter>.+)"
)
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_OPTIONS = ("ln_before", "ln_after", "use_gating", "is_parallel", "adapter_residual_before_ln")
_DEFAULTS = {"scaling": 1.0, "dropout": 0.0}
_OPTION_TYPES: dict[str, tuple[type, ...]] = {
    "non_linearity": (str,),
    "scaling": (str, int, float),
    "dropout": (int, float),
}
# What torch.load raises on files that are cut short or changed.
_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RuntimeError, TypeError),
    *(ValueError, pickle.UnpicklingError),
)


@dataclass(frozen=True)
class AdapterHubCheckpoint:
    """One adapter of a model: a module for each place that it is put at.

    Attributes:
        name: of the adapter.
        modules: by the place of the adapter in the model: "encoder.layer.0.output".
        config: what is in `adapter_config.json`: "config" (the adapter's options, see
            `nn.bottleneck_adapter.BOTTLENECK_PRESETS`), and "model_type", "hidden_size" and others that say
            what model it is for.
    """

    name: str
    modules: Mapping[str, BottleneckAdapter]
    config: Mapping[str, Any]


def load_adapterhub(folder: str | Path) -> AdapterHubCheckpoint:
    """Load an AdapterHub folder without the `adapters` library. No code in the file is run.

    Args:
        folder: with `adapter_config.json` and `adapter.safetensors` or, where that is absent,
            `pytorch_adapter.bin`.

    Returns:
        The adapter, its modules in eval mode, their parameters in the dtype of the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the weights do not fit the config, or they are not those of a
            bottleneck adapter.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    state = _read_weights(folder)
    name, options = config["name"], config["config"]
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        found = _KEY.fullmatch(key)
        if found is None or found["name"] != name:
            raise ValueError(
                f"the weights in {folder} must be those of the bottleneck adapter {name!r}, got {key!r}; "
                "load other parts (heads, invertible adapters, prefixes) with the adapters library"
            )
        parts[found["location"]][found["parameter"]] = tensor
    modules = {location: _make(location, options, part) for location, part in parts.items()}
    if not modules:
        raise ValueError(
            f"the weights in {folder} must have an adapter, got an empty file; download it again"
        )
    return AdapterHubCheckpoint(name, modules, config)


def save_adapterhub(
    checkpoint: AdapterHubCheckpoint, folder: str | Path, *, use_safetensors: bool = False
) -> None:
    """Save an adapter as a folder that `adapters` loads: `model.load_adapter(folder)`.

    Args:
        checkpoint: the adapter. The options in its config must be those of its modules.
        folder: where to; it is made if it is not there. Files of the same names are overwritten, and weights
            in the other format removed.
        use_safetensors: write `adapter.safetensors` instead of `pytorch_adapter.bin`; to load that, pass
            `use_safetensors=True` to `load_adapter` as well.

    Raises:
        ValueError: the options do not fit the modules, or a name has a dot. Nothing is written then.
    """
    name, folder = checkpoint.name, Path(folder)
    if not name or "." in name:
        raise ValueError(f"name must be a word without dots, got {name!r}")
    config = {"version": "adapters.1.3.0", **checkpoint.config, "name": name}
    if not checkpoint.modules or not isinstance(config.get("config"), Mapping):
        raise ValueError(
            "checkpoint must have modules and a config with an entry 'config', got "
            f"{len(checkpoint.modules)} modules and {sorted(checkpoint.config)}; see BOTTLENECK_PRESETS"
        )
    config["config"] = dict(config["config"])
    for location, module in checkpoint.modules.items():
        _require_options(location, module, config["config"])
    if type(config["config"].get("scaling")) is int:  # adapters wants a float
        config["config"]["scaling"] = float(config["config"]["scaling"])
    state = {  # clones: a view would take all of its memory along
        f"{location}.adapters.{name}.{parameter}": tensor.detach().contiguous().clone()
        for location, module in checkpoint.modules.items()
        for parameter, tensor in module.state_dict().items()
    }
    text = json.dumps(config, indent=2, sort_keys=True)  # fails before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    if use_safetensors:
        from safetensors.torch import save_file

        save_file(state, folder / SAFE_WEIGHTS_FILE)
    else:
        torch.save(state, folder / WEIGHTS_FILE)
    (folder / (WEIGHTS_FILE if use_safetensors else SAFE_WEIGHTS_FILE)).unlink(missing_ok=True)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{file} must be JSON, got {error}; download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict) or "name" not in config:
        raise ValueError(f"{file} must have entries 'name' and 'config'; save the adapter with its config")
    architecture = config["config"].get("architecture")
    if architecture is not None:
        raise ValueError(f"{file} must be of a bottleneck adapter, got one of {architecture!r}")
    if "version" not in config:  # files of adapter-transformers before 2.0 have other names
        options = config["config"]
        name = options.get("non_linearity")
        name = _OLD_ACTIVATIONS.get(name, name) if isinstance(name, str) else name
        config["config"] = {**options, "non_linearity": name}
    for option, kinds in _OPTION_TYPES.items():
        value = config["config"].get(option, _DEFAULTS.get(option))
        if not isinstance(value, kinds) or (isinstance(value, (int, float)) and not abs(value) < 1e30):
            raise ValueError(f"{file} must have a value of {option} that adapters knows, got {value!r}")
    return config


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    safe, file = folder / SAFE_WEIGHTS_FILE, folder / WEIGHTS_FILE
    if safe.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(safe)
        except SafetensorError as error:
            raise ValueError(
                f"{safe} must be a whole safetensors file, got {error}; download it again"
            ) from error
    elif file.is_file():
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except _DAMAGE as error:
            raise ValueError(
                f"{file} must be a whole file of tensors that torch.save wrote, got: {error}; download it "
                "again"
            ) from error
    else:
        raise FileNotFoundError(f"{folder} must have {SAFE_WEIGHTS_FILE} or {WEIGHTS_FILE}, got neither")
    if not isinstance(state, dict) or not all(map(_is_entry, state, state.values())):
        raise ValueError(
            f"the weights in {folder} must be a dict of names and plain float tensors; save the adapter again"
        )
    return state


def _is_entry(key: object, tensor: object) -> bool:
    if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
        return False
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in FLOAT_DTYPES


def _make(location: str, options: Mapping[str, Any], state: dict[str, torch.Tensor]) -> BottleneckAdapter:
    """The module at one place. Its sizes are those of the weights, whatever the reduction factor."""
    up = state.get("adapter_up.weight")
    if up is None or up.dim() != 2 or up.numel() == 0 or up.numel() > 2**40:
        raise ValueError(
            f"the adapter at {location} must have a matrix adapter_up.weight, got {_shapes(state)}"
        )
    size, rank = up.shape
    # Half a feature more, so that no rounding makes it one less.
    options = {**options, "reduction_factor": size / (rank + 0.5)}
    try:
        module = BottleneckAdapter.from_config(size, options, dtype=up.dtype, device="meta")
        module.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"the weights of the adapter at {location} must fit its config, got {_shapes(state)}: {error}; "
            "download the folder again"
        ) from error
    return module.eval()


def _require_options(location: str, module: BottleneckAdapter, options: Mapping[str, Any]) -> None:
    scaling: Any = module.scaling
    if isinstance(scaling, torch.Tensor):
        scaling = "learned" if scaling.shape == (1,) and options.get("scaling") != "channel" else "channel"
    has = {
        "non_linearity": module.non_linearity,
        "scaling": scaling,
        "ln_before": hasattr(module, "adapter_norm_before"),
        "ln_after": hasattr(module, "adapter_norm_after"),
        "use_gating": module.use_gating,
        "is_parallel": module.is_parallel,
        "adapter_residual_before_ln": module.adapter_residual_before_ln,
        "dropout": module.dropout.p,
    }
    defaults = {**_DEFAULTS, **dict.fromkeys(_OPTIONS, False)}
    factors = options.get("reduction_factor", 16)
    factors = list(factors.values()) if isinstance(factors, Mapping) else [factors]
    size = module.adapter_up.out_features
    if not all(isinstance(factor, (int, float)) and factor > 0 for factor in factors):
        raise ValueError(f"config reduction_factor must be positive, got {options['reduction_factor']!r}")
    if module.down_sample not in [max(1, int(size // factor)) for factor in factors]:
        raise ValueError(
            f"config reduction_factor must make a rank of {module.down_sample} from {size} features at "
            f"{location}, got {options.get('reduction_factor')!r}"
        )
    for option, value in has.items():
        wanted = options.get(option, defaults.get(option))
        if wanted != value:
            raise ValueError(
                f"config {option} must be that of the modules, got {wanted!r}, and {value!r} at {location}"
            )


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in state.items()}
