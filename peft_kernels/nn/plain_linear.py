"""Which linear layers may be taken apart: those that compute x W^T + bias and nothing else."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.core.checks import check_flag, check_size
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES

_REMEDY = "merge or unload an adapter first, restore_layers(model) a fused layer"


def is_plain_tensor(tensor: object) -> bool:
    """Whether a tensor is its data and no more: not of a subclass with operations of its own (DTensor, ...).

    Non-strict torch.export traces with a FakeTensor in the place of each plain one.
    """
    if type(tensor) is torch.Tensor or type(tensor) is nn.Parameter:
        return True
    return torch.compiler.is_exporting() and type(tensor).__name__ == "FakeTensor"


def sharded_reason(weight: object) -> str:
    """That a weight cannot be read now because FSDP2 has sharded it, or ""."""
    if type(weight).__name__ != "DTensor":
        return ""
    return "its weight is sharded: each call decides, once FSDP has gathered it"


def bypass_reason(module: nn.Module) -> str:
    """Why a module must be called, and its parameters not just read, or ""."""
    reason = _own_reason(module)
    if not reason and _has_any_global_hook():  # type: ignore[no-untyped-call]
        reason = "every module has hooks (torch.nn.modules.module.register_module_...)"
    return reason


def _own_reason(module: nn.Module) -> str:
    """Why this module is not what its class is, or ""."""
    if "parametrizations" in module._modules:
        return "its parameters are computed, by torch.nn.utils.parametrize"
    if "forward" in module.__dict__:
        return "it has a forward of its own, set on the instance"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "it has hooks"
    return ""


def is_exactly(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether a module is of one of the classes itself, not of a subclass.

    By name: non-strict torch.export traces some modules as proxies, of a subclass that has the name.
    """
    if type(module) in classes:
        return True
    name = (type(module).__module__, type(module).__qualname__)
    return any((known.__module__, known.__qualname__) == name for known in classes)


def has_forward_of(module: object, module_class: type[nn.Module]) -> bool:
    """Whether a module is an instance of the class and its own class does not override `forward`."""
    return isinstance(module, module_class) and type(module).forward is module_class.forward


def is_linear4bit(module: object) -> bool:
    """Whether a module is a bitsandbytes `Linear4bit`, with the forward of one. Imports nothing."""
    return any(
        f"{base.__module__}.{base.__qualname__}" == "bitsandbytes.nn.modules.Linear4bit"
        and has_forward_of(module, base)
        for base in type(module).__mro__
    )


def new_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
) -> nn.Linear:
    """`nn.Linear` of checked options.

    Raises:
        TypeError: a size is no int, or `bias` no bool.
        ValueError: a size is not positive, `dtype` none of `dtypes`, or `device` unknown.
    """
    check_size("in_features", in_features)
    check_size("out_features", out_features)
    check_flag("bias", bias)
    check_place(device, dtype, dtypes)
    return nn.Linear(in_features, out_features, bias, device, dtype)


def check_place(device: object, dtype: object, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Require what parameters can be made with: a device that there is, one of `dtypes`; or None."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in dtypes):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"dtype must be one of {names}, or None, got {dtype!r}")
    if device is not None:
        if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"device must be a torch.device or its name, got a {type(device).__name__}")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ValueError) as error:
            first = str(error).partition("\n")[0]
            raise ValueError(f"device must be one that torch has here, got {device!r}: {first}") from error


def require_plain(linear: object, accepted: bool, wanted: str, remedy: str = "") -> None:
    """Refuse a layer that does more than its weight and bias say, because the rest would be lost.

    Args:
        linear: what the caller was given.
        accepted: whether it is of a kind that the caller takes.
        wanted: those kinds, in words.
        remedy: what to do about another kind.

    Raises:
        TypeError: it is of another kind, or has hooks or a forward of its own.
    """
    got = f"linear must be {wanted}, got a {type(linear).__module__}.{type(linear).__qualname__}"
    if isinstance(linear, torch.Tensor):
        raise TypeError(f"{got}; pass the layer, not its weight")
    if not accepted or not isinstance(linear, nn.Module):
        raise TypeError(f"{got}; {remedy or _REMEDY}")
    reason = _own_reason(linear)
    if reason:
        raise TypeError(f"{got}, and {reason}, which would be lost; remove that first")
