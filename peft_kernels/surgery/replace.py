"""Give a model's layers their fused forward, take it back, and say how things stand."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

from torch import nn

from peft_kernels.core.checks import check_module, shown
from peft_kernels.core.plan import Product
from peft_kernels.ops.linear.regimes import plans
from peft_kernels.surgery.registry import FusedLayer, Status, find_handler, fused_class, restored_class
from peft_kernels.surgery.report import Report, Row, Work

NamedLayers = list[tuple[str, nn.Module]]
Only = str | Iterable[str] | Callable[[str, nn.Module], bool]


def replace_layers(model: nn.Module, *, only: Only | None = None, strict: bool = False) -> Report:
    """Make the layers of `model` run on the fused kernels: same numbers, same state_dict keys, faster.

        >>> report = pk.replace_layers(model, only=["0"])
        >>> [(row.name, row.fused, row.reason) for row in report]
        [('base_model.model.0', True, ''),
         ('base_model.model.2', False, 'a stock layer; replace_layers fuses it')]

    Handled are PEFT's LoRA, DoRA and IA3 layers over `nn.Linear` and over bitsandbytes' NF4 `Linear4bit`,
    `Linear4bit` alone, and the bottleneck adapters of the `adapters` library. The model is changed in place:
    each layer keeps its parameters and becomes an instance of a subclass of its class. Saving, loading,
    deepcopy and pickle work as before, and so do adding, switching, disabling and merging adapters. Calling
    it again is harmless, and fuses the layers that came in since. `restore_layers` undoes it. If it raises,
    the model is as it was.

    A layer in a state that the kernels do not cover (two active LoRA adapters, a merged one, ...) runs its
    stock forward for as long as that lasts. The report, and `explain` at any later time, give the reason.

    In eval mode the norms of a DoRA layer are kept until its weights change; after writing weights through
    `.data` in eval mode call `invalidate_norms`.

    With dropout active, the input itself is kept for the backward pass, so it must not be changed in place
    before that. A pickled fused model needs peft_kernels to be
    loaded; call `restore_layers` before pickling if it should not.

    Args:
        model: any module.
        only: which layers; all by default. One or several glob patterns (not regular expressions), matched
            against the dotted name or the tail of it from a dot on ("q_proj", "layers.0.*"), or a function of
            the name and the module that says whether to take it.
        strict: raise if a selected layer would not run fused, or if there is none to select.

    Returns:
        A row for each PEFT, adapters or bitsandbytes layer, selected or not. `print` it.

    Raises:
        TypeError: `model` is not a module, or `only` is none of the above.
        ValueError: `only` has no pattern, or one that matches no layer; or `strict` is set and a layer cannot
            be fused, or there is none.
    """
    check_module("model", model, "pass the loaded model itself")
    layers = _select(list(_layers(model)), only)
    with contextlib.ExitStack() as undo:
        for _, layer in layers:
            handler = find_handler(layer)
            if not isinstance(handler, str):
                for part in (*handler.parts(layer), layer):
                    _fuse(part, undo)
        if strict:
            _require_fused(layers)
        report = explain(model)
        undo.pop_all()  # all went well: nothing to undo
    return report


def restore_layers(model: nn.Module) -> None:
    """Give every fused layer of `model` its stock class back, in place; trained weights are kept.

    Args:
        model: any module; one without fused layers is left as it is.

    Raises:
        TypeError: `model` is not a module.
    """
    check_module("model", model, "pass the loaded model itself")
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            _restore(layer)


def explain(model: nn.Module) -> Report:
    """Which PEFT, adapters and bitsandbytes layers would run fused if called now, and why the others not.

    What depends on the input of a call cannot be known beforehand. If a layer's last call fell back to the
    stock forward because of its input, the row says so. Below the layers: which methods compute the products
    with their NF4 weights on this machine, by number of tokens.

    Args:
        model: any module, before or after `replace_layers`.

    Returns:
        A row for each PEFT, adapters or bitsandbytes layer. `print` it.

    Raises:
        TypeError: `model` is not a module.
    """
    check_module("model", model, "pass the loaded model itself")
    rows, products = [], Counter[Product]()
    for name, layer in _layers(model):
        row = _row(name, layer)
        rows.append(row)
        handler: Any = find_handler(layer)
        if row.fused and (product := handler.product(layer)):
            products[product] += 1
    works = (Work(count, product, plans(product)) for product, count in products.items())
    return Report(tuple(rows), tuple(work for work in works if work.plans))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer with a row of its own: handled, adapted or quantised, and not a part of another."""
    parts: set[nn.Module] = set()
    for name, layer in model.named_modules():
        if layer in parts:
            continue
        handler = find_handler(layer)
        if not isinstance(handler, str):
            parts.update(handler.parts(layer))
            yield name, layer
        elif _is_adapted_or_quantised(layer):
            yield name, layer


def _is_adapted_or_quantised(layer: nn.Module) -> bool:
    """Whether a user of PEFT, adapters or bitsandbytes would expect to read about this layer."""
    names = {f"{base.__module__}.{base.__qualname__}" for base in type(layer).__mro__}
    if "adapters.methods.adapter_layer_base.AdapterLayerBase" in names:
        # Every place that could have an adapter is one of these. Bottleneck adapters have rows of their own.
        bottleneck = "adapters.methods.bottleneck.BottleneckLayer" in names
        return not bottleneck and len(getattr(layer, getattr(layer, "adapter_modules_name", ""), ())) > 0
    return "peft.tuners.tuners_utils.BaseTunerLayer" in names or any(
        name.startswith("bitsandbytes.") for name in names
    )


def _select(layers: NamedLayers, only: Only | None) -> NamedLayers:
    if only is None:
        return layers
    if callable(only) and not isinstance(only, (type, nn.Module)):
        return [(name, layer) for name, layer in layers if only(name, layer)]
    patterns = _patterns(only)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name, _ in layers):
            raise ValueError(
                f"only must match PEFT, adapters or bitsandbytes layers, got {pattern!r}, which matches "
                f"none of the model's {len(layers)} as a glob (it is not read as a regular expression); "
                "print(explain(model)) lists them"
            )
    return [(name, layer) for name, layer in layers if any(_matches(name, pattern) for pattern in patterns)]


def _patterns(only: object) -> list[str]:
    patterns = list(only) if isinstance(only, Iterable) and not isinstance(only, str) else [only]
    texts = [pattern for pattern in patterns if isinstance(pattern, str)]
    if len(texts) < len(patterns):
        raise TypeError(
            "only must be a glob pattern, several of them, or a function of a layer's name and the layer, "
            f"got {shown(only)}; to select by class pass lambda name, layer: isinstance(layer, ...)"
        )
    if not texts:
        raise ValueError("only must have at least one pattern, got none; leave it out to take every layer")
    return texts


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _require_fused(layers: NamedLayers) -> None:
    if not layers:
        raise ValueError(
            "strict=True requires PEFT, adapters or bitsandbytes layers to fuse, got none; add the adapter "
            "or quantise the model first, and see that only=... selects some of its layers"
        )
    reasons = [f"{name}: {status.reason}" for name, layer in layers if not (status := _status(layer)).fused]
    if reasons:
        raise ValueError(
            f"strict=True requires layers that can be fused, {len(reasons)} of {len(layers)} cannot; leave "
            "them out with only=..., or run them as they are with strict=False:\n" + "\n".join(reasons)
        )


def _fuse(layer: Any, undo: contextlib.ExitStack) -> None:
    stock_class: Any = type(layer)
    handler: Any = find_handler(layer)
    if not issubclass(stock_class, FusedLayer) and not isinstance(handler, str):
        layer.__class__ = fused_class(stock_class, handler)
        undo.callback(_restore, layer)
        layer.on_fused()


def _restore(layer: Any) -> None:
    for key, value in layer.__dict__.items():
        if _is_fused_forward(layer, value):
            layer.__dict__[key] = MethodType(layer.stock_class.forward, layer)
    layer.__class__ = restored_class(type(layer))
    for key in FusedLayer.scratch:
        layer.__dict__.pop(key, None)


def _is_fused_forward(layer: nn.Module, attribute: Any) -> bool:
    """Whether an attribute is the layer's fused forward; accelerate's hooks keep it in `_old_forward`."""
    return (
        isinstance(layer, FusedLayer)
        and isinstance(attribute, MethodType)
        and attribute.__self__ is layer
        and attribute.__func__ is layer.handler.forward
    )


def _has_own_forward(layer: nn.Module) -> bool:
    """Whether a forward set on the instance runs in place of the fused one, and not around it."""
    forward = layer.__dict__.get("forward")
    return forward is not None and not _is_fused_forward(layer, layer.__dict__.get("_old_forward", forward))


def _status(layer: nn.Module) -> Status:
    handler = find_handler(layer)
    if isinstance(handler, str):
        return Status(False, handler)
    if _has_own_forward(layer):
        return Status(False, "it has a forward of its own, set on the instance")
    return handler.status(layer)


def _row(name: str, layer: nn.Module) -> Row:
    status = _status(layer)
    if status.fused and not isinstance(layer, FusedLayer):
        status = Status(False, "a stock layer; replace_layers fuses it")
    elif status.fused and "_stock_reason" in layer.__dict__:
        status = Status(True, f"last call ran the stock forward: {layer.__dict__['_stock_reason']}")
    return Row(name, _class_name(type(layer)), *status)


def _class_name(layer_class: type) -> str:
    """Short and unambiguous: "lora.Linear4bit" is PEFT's, "bitsandbytes.Linear4bit" what it wraps."""
    package, *inner = layer_class.__module__.split(".")
    return f"{inner[1] if package == 'peft' else package}.{layer_class.__name__}"
