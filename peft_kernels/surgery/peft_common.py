"""What the handlers of PEFT's layers share: reasons to leave a call to PEFT's forward, and the 4-bit base."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from peft_kernels.core.plan import Product
from peft_kernels.core.transforms import transform_reason
from peft_kernels.nn.plain_linear import bypass_reason, is_plain_tensor, sharded_reason
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES
from peft_kernels.surgery.bitsandbytes_linear import FusedLinear4bit, Operands, nf4_operands
from peft_kernels.surgery.registry import FusedLayer, find_handler, leaves_alone

for method in ("lora", "ia3"):
    leaves_alone(
        f"peft.tuners.{method}.bnb:Linear8bitLt", "its base layer is in 8 bits; fused are NF4 and dense ones"
    )


class Unfit(NamedTuple):
    """Why a layer, in its present state, has no adapter for the kernels."""

    reason: str
    base_only: bool = False  # because PEFT computes the base layer and nothing else


def switched_off(layer: Any) -> Unfit | None:
    """That PEFT computes the base layer alone, because adapters are disabled or merged into it."""
    if layer._disable_adapters:
        return Unfit("adapters are disabled: base layer only", base_only=True)
    if layer.merged_adapters:
        return Unfit(f"merged into the base weight: {', '.join(layer.merged_adapters)}", base_only=True)
    return None


def dense_reason(base: Any) -> str:
    """Why a dense base layer's weight cannot be read by the kernel, or ""."""
    reason = linear_reason("base layer", base)
    if not reason and base._parameters["weight"].requires_grad and torch.is_grad_enabled():
        reason = "the base weight is trainable"
    return reason


def linear_reason(role: str, linear: Any) -> str:
    """Why a sub-layer's weight cannot be read in place of calling it, or ""."""
    if type(linear).forward is not nn.Linear.forward:
        return f"{role}: a {type(linear).__name__}, not an nn.Linear"
    reason = bypass_reason(linear)
    weight = linear._parameters.get("weight")
    if not reason and not is_plain_tensor(weight):
        reason = sharded_reason(weight) or f"its weight is a {type(weight).__name__}, not a Parameter"
    return reason and f"{role}: {reason}"


def adapter_dtype_reason(dtype: torch.dtype, compute_dtype: torch.dtype) -> str:
    """Why the kernel cannot take an adapter of `dtype` in a layer that computes in `compute_dtype`, or ""."""
    if compute_dtype not in FLOAT_DTYPES:
        return f"the layer computes in {compute_dtype}"
    if dtype not in (compute_dtype, torch.promote_types(compute_dtype, torch.float32)):
        return f"the adapter is {dtype}, the layer computes in {compute_dtype}"
    return ""


def compute_dtype_over(base: Any, x: torch.Tensor) -> torch.dtype | str:
    """The dtype in which a layer over the dense `base` computes on x, or why the kernel cannot take x."""
    if not is_plain_tensor(x):
        return f"the input is a {type(x).__name__}"
    device = x.device.type
    if device == "meta":
        return "the input is on the meta device"
    if reason := transform_reason():
        return reason
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = base._parameters["weight"].dtype
    return x.dtype if x.dtype == dtype else f"the input is {x.dtype}, the base weight {dtype}"


def arguments_reason(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a call with more than the input is left to PEFT."""
    return f"called with {', '.join(kwargs) or f'{len(args)} more arguments'}"


class FusedOver4bit(FusedLayer):
    """Base of the handlers of PEFT's layers over a bitsandbytes `Linear4bit`.

    The base layer is fused as well, so that its product stays fused where PEFT's own forward has to run.
    """

    @staticmethod
    def product(layer: nn.Module) -> Product | None:
        """The base layer's."""
        base: Any = layer.base_layer
        return FusedLinear4bit.product(base)

    @staticmethod
    def parts(layer: nn.Module) -> Iterable[nn.Module]:
        """The base layer."""
        base: Any = layer.base_layer
        return () if isinstance(find_handler(base), str) else (base,)

    @staticmethod
    def base_reason(layer: nn.Module) -> str:
        """Why the product with the base layer's weight cannot run fused, or ""."""
        base: Any = layer.base_layer
        handler = find_handler(base)
        if isinstance(handler, str):
            reason = handler
        elif isinstance(layer, FusedLayer) and not isinstance(base, FusedLayer):
            reason = "not fused; call replace_layers(model) again"
        else:
            reason = FusedLinear4bit.status(base).reason or bypass_reason(base)
        return reason and f"base layer: {reason}"

    def base_operands(self, x: torch.Tensor) -> Operands | str:
        """What the base layer gives the kernel, or why PEFT's forward must run."""
        base: Any = self._modules["base_layer"]
        reason = bypass_reason(base) if isinstance(base, FusedLinear4bit) else "not fused"
        operands = reason or nf4_operands(base, x)
        return f"base layer: {operands}" if isinstance(operands, str) else operands
