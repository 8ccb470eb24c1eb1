"""PEFT's LoRA and DoRA layers over `nn.Linear` and `Linear4bit`: base and adapter in one kernel.

Every call decides anew whether the kernel computes what PEFT's own forward would, because PEFT changes its
layers at any time: adapters are added, switched, merged and disabled. Where it does not, PEFT's forward runs.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from peft_kernels.functional import adapted_linear
from peft_kernels.nn.dropout import PhiloxDropout
from peft_kernels.nn.plain_linear import bypass_reason, is_exactly
from peft_kernels.nn.scale_cache import run_dora, scale_cache
from peft_kernels.ops.nf4.weight import NF4Weight
from peft_kernels.surgery.bitsandbytes_linear import Operands, autocast_off
from peft_kernels.surgery.peft_common import (
    FusedOver4bit,
    Unfit,
    adapter_dtype_reason,
    arguments_reason,
    compute_dtype_over,
    dense_reason,
    linear_reason,
    switched_off,
)
from peft_kernels.surgery.registry import FusedLayer, Status, handles


class Adapter(NamedTuple):
    """The one active adapter of a layer, as the kernels take it."""

    lora_a: torch.Tensor  # [r, K]
    lora_b: torch.Tensor  # [N, r]
    scaling: float | torch.Tensor
    dropout_p: float
    magnitude: torch.Tensor | None  # [N], where the adapter is a DoRA


class ForgetsNorms(FusedLayer):
    """Kept norms of a DoRA adapter go when PEFT writes the base weight, which it does past torch's notice."""

    def update_layer(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's; some initialisations take the adapter's start out of the base weight."""
        return self._forget_and("update_layer", args, kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's."""
        return self._forget_and("merge", args, kwargs)

    def unmerge(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's; in 16 bits it does not give back quite the weight that was."""
        return self._forget_and("unmerge", args, kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return self._forget_and("_apply", args, kwargs)

    def _forget_and(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return getattr(super(), method)(*args, **kwargs)
        finally:
            scale_cache(self).clear()


@handles("peft.tuners.lora.layer:Linear")
class FusedLoraLinear(ForgetsNorms):
    """LoRA over a dense layer: y = x W^T + bias + scaling * (D(x) A^T) B^T, in the dtype of x; or DoRA.

    PEFT rounds after every step, this once. Adapters in fp32 over a bf16 or fp16 base, which is PEFT's
    default, do not cast x up.
    """

    @staticmethod
    def status(layer: nn.Module) -> Status:
        """Fused: one plain adapter (`find_adapter`) over an `nn.Linear` with a frozen weight."""
        adapter = find_adapter(layer)
        if isinstance(adapter, Unfit):
            return Status(False, adapter.reason)
        base: Any = layer.base_layer
        reason = dense_reason(base) or _dtype_reason(layer, adapter, base.weight.dtype, base.weight.dtype)
        return Status(not reason, reason)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward, fused where it can be."""
        if args or kwargs:
            return self.run_stock(arguments_reason(args, kwargs), x, *args, **kwargs)
        adapter = find_adapter(self)
        if isinstance(adapter, Unfit):
            return super().forward(x)
        base: Any = self._modules["base_layer"]
        reason = dense_reason(base) or _input_reason(self, adapter, base, x)
        if reason:
            return self.run_stock(reason, x)
        y = _run(self, adapter, x, base.weight, base.bias)
        self.ran_fused()
        return y


@handles("peft.tuners.lora.bnb:Linear4bit")
class FusedLoraLinear4bit(ForgetsNorms, FusedOver4bit):
    """LoRA or DoRA over a bitsandbytes `Linear4bit` in NF4: QLoRA and QDoRA.

    All of it is computed on x in the base's `compute_dtype`, and y returned in the dtype of x. PEFT rounds x
    to `compute_dtype` for the base product only; the two agree to the rounding error of `compute_dtype`.
    """

    @staticmethod
    def status(layer: nn.Module) -> Status:
        """Fused: at most one plain adapter (`find_adapter`) over a base that `FusedLinear4bit` can take."""
        reason = FusedOver4bit.base_reason(layer)
        if reason:
            return Status(False, reason)
        adapter = find_adapter(layer)
        if isinstance(adapter, Unfit):
            return Status(adapter.base_only, adapter.reason)
        base: Any = layer.base_layer
        dtype = adapter.lora_a.dtype
        reason = _dtype_reason(layer, adapter, dtype, base.compute_dtype or dtype)
        return Status(not reason, reason)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward, fused where it can be."""
        if args or kwargs:
            return self.run_stock(arguments_reason(args, kwargs), x, *args, **kwargs)
        adapter = find_adapter(self)
        if isinstance(adapter, Unfit):
            return super().forward(x)
        operands = self._operands(adapter, x)
        if isinstance(operands, str):
            return self.run_stock(operands, x)
        with autocast_off(x):
            y = _run(self, adapter, *operands)
        self.ran_fused()
        return y.to(x.dtype)

    def _operands(self, adapter: Adapter, x: torch.Tensor) -> Operands | str:
        """What the base layer gives the kernel, or why PEFT's forward must run."""
        operands = self.base_operands(x)
        if isinstance(operands, str):
            return operands
        return _dtype_reason(self, adapter, x.dtype, operands.x.dtype) or operands


def find_adapter(layer: Any) -> Adapter | Unfit:
    """The active adapter of a PEFT LoRA layer, if there is exactly one, LoRA or DoRA with nothing added."""
    if unfit := switched_off(layer):
        return unfit
    adapters_a, adapters_b = layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules
    active = [name for name in layer.active_adapters if name in adapters_a]
    if len(active) != 1:
        if not active:
            return Unfit("no active adapter on this layer: base layer only", base_only=True)
        return Unfit(f"several active adapters: {', '.join(active)}")
    name = active[0]
    magnitude = _magnitude(layer, name)
    if isinstance(magnitude, Unfit):
        return magnitude
    if layer.fan_in_fan_out:
        return Unfit("fan_in_fan_out: the base weight is transposed")
    linear_a, linear_b = adapters_a[name], adapters_b[name]
    dropout = layer._modules["lora_dropout"]._modules[name]
    reason = (
        linear_reason("lora_A", linear_a) or linear_reason("lora_B", linear_b) or _dropout_reason(dropout)
    )
    if reason:
        return Unfit(reason)
    if linear_a.bias is not None or linear_b.bias is not None:
        return Unfit("lora_bias: the adapter has a bias")
    scaling = layer.scaling[name]
    if isinstance(scaling, torch.Tensor) and scaling.dim() > 0:
        return Unfit(f"its scaling is a tensor of shape {list(scaling.shape)}")
    # The DoRA variant calls the dropout only if the layer itself is in training mode.
    drops = (
        dropout.training and not is_exactly(dropout, nn.Identity) and (magnitude is None or layer.training)
    )
    lora_a, lora_b = linear_a._parameters["weight"], linear_b._parameters["weight"]
    return Adapter(lora_a, lora_b, scaling, dropout.p if drops else 0.0, magnitude)


def _magnitude(layer: Any, name: str) -> torch.Tensor | Unfit | None:
    """The magnitude of an adapter that is a DoRA, None if it is a plain LoRA, or what else it is."""
    variant = layer.lora_variant.get(name)
    if variant is None:
        return None
    if _class_path(variant) != "peft.tuners.lora.variants:DoraLinearVariant":
        return Unfit(f"adapter variant {type(variant).__name__}")
    vector = layer._modules["lora_magnitude_vector"]._modules[name]
    if _class_path(vector) != "peft.tuners.lora.dora:DoraLinearLayer":
        return Unfit(f"lora_magnitude_vector: a {type(vector).__name__}, not a DoraLinearLayer")
    if reason := bypass_reason(vector):
        return Unfit(f"lora_magnitude_vector: {reason}")
    magnitude: torch.Tensor = vector._parameters["weight"]
    return magnitude


def _class_path(instance: object) -> str:
    return f"{type(instance).__module__}:{type(instance).__qualname__}"


def _run(
    layer: nn.Module,
    adapter: Adapter,
    x: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The layer's output for x in its compute dtype."""
    a, b, scaling, p, magnitude = adapter
    if magnitude is not None:
        return run_dora(layer, x, weight, a, b, magnitude, scaling, bias, p)
    return adapted_linear(x, weight, lora_a=a, lora_b=b, scaling=scaling, bias=bias, dropout_p=p)


def _dropout_reason(dropout: Any) -> str:
    """Why the kernel cannot do what a dropout module does, or ""."""
    reason = bypass_reason(dropout)
    identity = is_exactly(dropout, nn.Identity)
    if not identity and not is_exactly(dropout, nn.Dropout, PhiloxDropout):
        reason = f"a {type(dropout).__name__}, not an nn.Dropout"
    elif not identity and dropout.training and (dropout.p >= 1 or dropout.inplace):
        reason = "p must be below 1 and inplace False"
    return reason and f"lora_dropout: {reason}"


def _input_reason(layer: Any, adapter: Adapter, base: Any, x: torch.Tensor) -> str:
    """Why the kernel cannot take x with these weights, or ""."""
    dtype = compute_dtype_over(base, x)
    return dtype if isinstance(dtype, str) else _dtype_reason(layer, adapter, x.dtype, dtype)


def _dtype_reason(layer: Any, adapter: Adapter, x_dtype: torch.dtype, compute_dtype: torch.dtype) -> str:
    """Why the kernel cannot take these dtypes, or ""."""
    dtype = adapter.lora_a.dtype
    if adapter.lora_b.dtype != dtype:
        return f"lora_A is {dtype}, lora_B {adapter.lora_b.dtype}"
    reason = adapter_dtype_reason(dtype, compute_dtype)
    if not reason and adapter.magnitude is not None:
        reason = adapter_dtype_reason(adapter.magnitude.dtype, compute_dtype)
    if not reason and dtype != x_dtype and not layer.cast_input_dtype_enabled:
        reason = f"casting the input is disabled, and it is {x_dtype}, the adapter {dtype}"
    return reason
