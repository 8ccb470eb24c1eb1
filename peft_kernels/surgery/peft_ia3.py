"""PEFT's IA3 layers over `nn.Linear` and over bitsandbytes' `Linear4bit`: base and scale in one kernel.

As for LoRA, every call decides anew whether the kernel computes what PEFT's own forward would.
"""

import functools
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peft_kernels.core.plan import Product
from peft_kernels.functional import ia3_linear
from peft_kernels.nn.plain_linear import is_plain_tensor
from peft_kernels.surgery.bitsandbytes_linear import autocast_off
from peft_kernels.surgery.peft_common import (
    FusedOver4bit,
    Unfit,
    adapter_dtype_reason,
    arguments_reason,
    compute_dtype_over,
    dense_reason,
    switched_off,
)
from peft_kernels.surgery.registry import FusedLayer, Status, handles


@handles("peft.tuners.ia3.layer:Linear")
class FusedIA3Linear(FusedLayer):
    """IA3 over a dense layer: y = (x W^T + bias) * l, or feed-forward y = (x * l) W^T + bias.

    In the dtype of x. With several active adapters, l is the product of their vectors.
    """

    @staticmethod
    def status(layer: nn.Module) -> Status:
        """Fused: plain vectors (`find_vectors`) over an `nn.Linear` with a frozen weight."""
        vectors = find_vectors(layer)
        if isinstance(vectors, Unfit):
            return Status(False, vectors.reason)
        base: Any = layer.base_layer
        reason = dense_reason(base) or adapter_dtype_reason(vectors[0].dtype, base.weight.dtype)
        return Status(not reason, reason)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward, fused where it can be."""
        if args or kwargs:
            return self.run_stock(arguments_reason(args, kwargs), x, *args, **kwargs)
        vectors = find_vectors(self)
        if isinstance(vectors, Unfit):
            return super().forward(x)
        base: Any = self._modules["base_layer"]
        reason = dense_reason(base) or _input_reason(vectors, base, x)
        if reason:
            return self.run_stock(reason, x)
        y = ia3_linear(x, base.weight, _product(vectors), base.bias, bool(self.is_feedforward))
        self.ran_fused()
        return y


@handles("peft.tuners.ia3.bnb:Linear4bit")
class FusedIA3Linear4bit(FusedOver4bit):
    """IA3 over a bitsandbytes `Linear4bit` in NF4, on x in the base's `compute_dtype`.

    y has the dtype of x; PEFT's is float32 for a 16-bit x.
    """

    @staticmethod
    def status(layer: nn.Module) -> Status:
        """Fused: plain vectors (`find_vectors`), or none, over a base that `FusedLinear4bit` can take."""
        reason = FusedOver4bit.base_reason(layer)
        if reason:
            return Status(False, reason)
        vectors = find_vectors(layer)
        if isinstance(vectors, Unfit):
            return Status(vectors.base_only, vectors.reason)
        base: Any = layer.base_layer
        dtype = vectors[0].dtype
        reason = adapter_dtype_reason(dtype, base.compute_dtype or dtype)
        return Status(not reason, reason)

    @staticmethod
    def product(layer: Any) -> Product | None:
        """The base layer's, of a scaled input where the layer is feed-forward."""
        product = FusedOver4bit.product(layer)
        scaled = bool(layer.is_feedforward) and not isinstance(find_vectors(layer), Unfit)
        return product and replace(product, input_scale=scaled)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward, fused where it can be."""
        if args or kwargs:
            return self.run_stock(arguments_reason(args, kwargs), x, *args, **kwargs)
        vectors = find_vectors(self)
        if isinstance(vectors, Unfit):
            return super().forward(x)
        operands = self.base_operands(x)
        if isinstance(operands, str):
            return self.run_stock(operands, x)
        reason = adapter_dtype_reason(vectors[0].dtype, operands.x.dtype)
        if reason:
            return self.run_stock(reason, x)
        with autocast_off(x):
            y = ia3_linear(
                operands.x, operands.weight, _product(vectors), operands.bias, bool(self.is_feedforward)
            )
        self.ran_fused()
        return y.to(x.dtype)


def find_vectors(layer: Any) -> list[torch.Tensor] | Unfit:
    """The vectors of an IA3 layer's active adapters, of one dtype, or why the kernels cannot take them."""
    if unfit := switched_off(layer):
        return unfit
    ia3_l = layer._modules["ia3_l"]
    active = [ia3_l[name] for name in layer.active_adapters if name in ia3_l]
    if not active:
        return Unfit("no active adapter on this layer: base layer only", base_only=True)
    for vector in active:
        if type(vector) is torch.Tensor or not is_plain_tensor(vector):
            return Unfit(f"ia3_l: it is a {type(vector).__name__}, not a Parameter")
    dtypes = dict.fromkeys(vector.dtype for vector in active)
    if len(dtypes) > 1:
        return Unfit(f"the active adapters are {' and '.join(map(str, dtypes))}")
    if getattr(layer, "fan_in_fan_out", False):
        return Unfit("fan_in_fan_out: the base weight is transposed")
    return active


def _product(vectors: list[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(operator.mul, vectors)


def _input_reason(vectors: list[torch.Tensor], base: Any, x: torch.Tensor) -> str:
    """Why the kernel cannot take x with this weight and these vectors, or ""."""
    dtype = compute_dtype_over(base, x)
    return dtype if isinstance(dtype, str) else adapter_dtype_reason(vectors[0].dtype, dtype)
