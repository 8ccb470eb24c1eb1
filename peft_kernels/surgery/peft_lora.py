"""PEFT's LoRA layers over `nn.Linear` and over bitsandbytes' `Linear4bit`: base and adapter in one kernel.

Every call decides anew whether the kernel computes what PEFT's own forward would, because PEFT changes its
layers at any time: adapters are added, switched, merged and disabled. Where it does not, PEFT's forward runs.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from peft_kernels.functional import lora_linear, nf4_lora_linear
from peft_kernels.nn.dropout import PhiloxDropout
from peft_kernels.nn.plain_linear import bypass_reason
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


@handles("peft.tuners.lora.layer:Linear")
class FusedLoraLinear(FusedLayer):
    """LoRA over a dense layer: y = x W^T + bias + scaling * (D(x) A^T) B^T, in the dtype of x.

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
        lora_a, lora_b, scaling, dropout_p = adapter
        y = lora_linear(x, base.weight, lora_a, lora_b, scaling, base.bias, dropout_p)
        self.ran_fused()
        return y


@handles("peft.tuners.lora.bnb:Linear4bit")
class FusedLoraLinear4bit(FusedOver4bit):
    """LoRA over a bitsandbytes `Linear4bit` in NF4: QLoRA, y = x W^T + bias + scaling * (D(x) A^T) B^T.

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
        lora_a, lora_b, scaling, dropout_p = adapter
        with autocast_off(x):
            y = nf4_lora_linear(
                operands.x, operands.weight, lora_a, lora_b, scaling, operands.bias, dropout_p
            )
        self.ran_fused()
        return y.to(x.dtype)

    def _operands(self, adapter: Adapter, x: torch.Tensor) -> Operands | str:
        """What the base layer gives the kernel, or why PEFT's forward must run."""
        operands = self.base_operands(x)
        if isinstance(operands, str):
            return operands
        return _dtype_reason(self, adapter, x.dtype, operands.x.dtype) or operands


def find_adapter(layer: Any) -> Adapter | Unfit:
    """The active adapter of a PEFT LoRA layer, if there is exactly one and it is LoRA with nothing added."""
    if unfit := switched_off(layer):
        return unfit
    adapters_a, adapters_b = layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules
    active = [name for name in layer.active_adapters if name in adapters_a]
    if len(active) != 1:
        if not active:
            return Unfit("no active adapter on this layer: base layer only", base_only=True)
        return Unfit(f"several active adapters: {', '.join(active)}")
    name = active[0]
    if name in layer.lora_variant:
        return Unfit(f"adapter variant {type(layer.lora_variant[name]).__name__}")
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
    p = dropout.p if dropout.training and type(dropout) is not nn.Identity else 0.0
    return Adapter(linear_a._parameters["weight"], linear_b._parameters["weight"], scaling, p)


def _dropout_reason(dropout: Any) -> str:
    """Why the kernel cannot do what a dropout module does, or ""."""
    reason = bypass_reason(dropout)
    if type(dropout) not in (nn.Identity, nn.Dropout, PhiloxDropout):
        reason = f"a {type(dropout).__name__}, not an nn.Dropout"
    elif type(dropout) is not nn.Identity and dropout.training and (dropout.p >= 1 or dropout.inplace):
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
    if not reason and dtype != x_dtype and not layer.cast_input_dtype_enabled:
        reason = f"casting the input is disabled, and it is {x_dtype}, the adapter {dtype}"
    return reason
