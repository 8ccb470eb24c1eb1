"""bitsandbytes' `Linear4bit`: its product on the NF4 kernels."""

import contextlib
import operator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from peft_kernels.core.plan import Product
from peft_kernels.core.transforms import transform_reason
from peft_kernels.functional import nf4_linear
from peft_kernels.nn.plain_linear import is_plain_tensor, sharded_reason
from peft_kernels.ops.nf4.reference import NESTED_BLOCKSIZE, quantize_absmax
from peft_kernels.ops.nf4.weight import NestedAbsmax, NF4Weight
from peft_kernels.surgery.registry import FusedLayer, Status, handles, leaves_alone

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

leaves_alone("bitsandbytes.nn.modules:Linear8bitLt", "its weight is in 8 bits; fused are NF4 and dense ones")


class Operands(NamedTuple):
    """What the kernels take from a call of a `Linear4bit`."""

    x: torch.Tensor  # in the layer's compute dtype
    weight: NF4Weight
    bias: torch.Tensor | None


@handles("bitsandbytes.nn.modules:Linear4bit")
class FusedLinear4bit(FusedLayer):
    """`Linear4bit` in NF4: y = x W^T + bias, computed in `compute_dtype`, returned in the dtype of x.

    As in bitsandbytes, `compute_dtype` is fixed by the first input if it was not given. Unlike there, it
    holds under autocast too, the bytes are never rearranged in eval mode, which computes what training does,
    and the bias parameter keeps its dtype.
    """

    @staticmethod
    def status(layer: nn.Module) -> Status:
        """Fused: the weight is NF4, quantised, and not sharded."""
        parameter, state, reason = _find_weight(layer)
        if not reason:
            try:
                NF4Weight.from_bitsandbytes(parameter, state)
            except (TypeError, ValueError) as error:
                reason = str(error)
        return Status(not reason, reason)

    @staticmethod
    def product(layer: nn.Module) -> Product | None:
        """By the weight's quant state; in float32 as long as no compute dtype is set."""
        parameter, state, reason = _find_weight(layer)
        if reason:
            return None
        dtype: Any = layer.compute_dtype
        return Product(state.shape[-1], state.blocksize, dtype or torch.float32, parameter.device)

    def on_fused(self) -> None:
        """Put rearranged bytes back into order now: a trace by torch.compile could not."""
        nf4_weight(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Linear4bit's forward, fused where it can be."""
        operands = nf4_operands(self, x)
        if isinstance(operands, str):
            stock: torch.Tensor = self.run_stock(operands, x)
            return stock
        with autocast_off(x):
            y = nf4_linear(*operands)
        self.ran_fused()
        return y.to(x.dtype)


def nf4_operands(layer: Any, x: torch.Tensor) -> Operands | str:
    """The operands of the product of `layer` with x, or why it must be left to bitsandbytes."""
    reason = transform_reason()
    if reason:
        return reason
    weight = nf4_weight(layer)
    if isinstance(weight, str):
        return weight
    if not is_plain_tensor(x):
        return f"the input is a {type(x).__name__}"
    if x.device.type == "meta":
        return "the input is on the meta device"
    if x.shape[-1] != weight.shape[1]:
        return f"the input has {x.shape[-1]} features, the weight is {list(weight.shape)}"
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    dtype = layer.compute_dtype or x.dtype
    if dtype not in COMPUTE_DTYPES:
        return f"the compute dtype is {dtype}"
    bias = layer.bias
    if bias is not None and bias.dtype not in (dtype, torch.float32):
        bias = bias.to(dtype)
    return Operands(x.to(dtype), weight, bias)


def nf4_weight(layer: Any) -> NF4Weight | str:
    """The weight of a `Linear4bit`, sharing its memory, or why it cannot be read."""
    parameter, state, reason = _find_weight(layer)
    if reason:
        return reason
    if torch.compiler.is_compiling():
        # Read the tensors in the trace: what was cached before it would be a constant to it.
        return _wrap(parameter, state)
    cached: _Cached | None = layer.__dict__.get("_nf4_cache")
    if cached is None or not cached.is_of(parameter, state):
        try:
            weight = _wrap_checked(layer, parameter, state)
        except (TypeError, ValueError) as error:
            return str(error)
        cached = _Cached(weight, _sources(_find_weight(layer)[1]))
        layer.__dict__["_nf4_cache"] = cached
    return cached.weight


def _find_weight(layer: Any) -> tuple[Any, Any, str]:
    """The parameter of a `Linear4bit`, its quant state, and why it is not an NF4 weight, or ""."""
    parameter = layer._parameters.get("weight")
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return parameter, state, _unreadable(parameter, state)
    # FSDP2 gathers the shards into a plain parameter: bitsandbytes, too, then asks the layer.
    state = getattr(layer, "quant_state", None)
    return parameter, state, _unreadable(parameter, state) or _miscast(layer, parameter, state)


def _unreadable(parameter: Any, state: Any) -> str:
    """Why the kernels cannot read a parameter with this quant state, or ""."""
    # Pickling a Params4bit leaves a Parameter that has its attributes.
    if not is_plain_tensor(parameter) and type(parameter).__name__ != "Params4bit":
        return sharded_reason(parameter) or f"its weight is a {type(parameter).__name__}, not a Params4bit"
    if state is None:
        return "its weight is not quantised yet"
    quant_type = getattr(state, "quant_type", None)
    if quant_type != "nf4":
        return f"it is quantised to {quant_type}, not nf4"
    scales = state if getattr(state, "state2", None) is None else state.state2
    for part in (state, scales):
        if not isinstance(getattr(part, "absmax", None), torch.Tensor):
            return f"its quant_state is a {type(part).__name__} without absmax"
    if "meta" in (parameter.device.type, state.absmax.device.type):
        return "its weight is on the meta device"
    if scales.absmax.dtype != torch.float32 and not getattr(state, "packing_format_for_cpu", False):
        return f"its absmax is {scales.absmax.dtype}, not torch.float32"
    return ""


def _miscast(layer: Any, parameter: Any, state: Any) -> str:
    """Why the bytes of a gathered weight are not those that `state` describes, or ""."""
    if parameter.dtype != layer.quant_storage:  # FSDP's mixed precision casts what is a float to it
        return f"its bytes were cast from {layer.quant_storage} to {parameter.dtype}"
    if getattr(state, "packing_format_for_cpu", False):  # the shards would stay as they are if put back
        return "bitsandbytes has rearranged its bytes for the CPU"
    return ""


class _Cached(NamedTuple):
    """A wrapped weight, and what it was made from."""

    weight: NF4Weight  # keeps its bytes alive, so no other tensor can come to lie there
    sources: tuple[Any, ...]

    def is_of(self, parameter: torch.Tensor, state: Any) -> bool:
        # A merge makes a new parameter and state, `.data =` new bytes, moving the layer new statistics.
        # FSDP frees the bytes of a gathered weight: then the pointer of `packed` is null.
        return self.weight.packed.data_ptr() == parameter.data_ptr() and all(
            map(operator.is_, self.sources, _sources(state))
        )


def _sources(state: Any) -> tuple[Any, ...]:
    """All of a quant state that wrapping it reads, to be compared by identity."""
    second = getattr(state, "state2", None)  # bitsandbytes deletes it when it rearranges the bytes
    return (
        state,
        state.absmax,
        state.code,
        state.offset,
        state.blocksize,
        state.shape,
        state.dtype,
        second,
        getattr(second, "absmax", None),
        getattr(second, "code", None),
        getattr(second, "blocksize", None),
    )


@torch.inference_mode(False)  # what it makes outlives the call, and is trained with later
def _wrap_checked(layer: Any, parameter: Any, state: Any) -> NF4Weight:
    """Wrap the weight, putting it back into the standard layout first if bitsandbytes rearranged it.

    bitsandbytes' eval forward on AVX512-BF16 CPUs rearranges the bytes and keeps only bf16 absmax. Its own
    inverse leaves plain absmax transposed, so ours is written back; double quantisation is restored, for the
    state_dict to keep its keys.

    Raises:
        ValueError: the weight is not in the NF4 format.
    """
    weight = NF4Weight.from_bitsandbytes(parameter, state)
    if not getattr(state, "packing_format_for_cpu", False):
        return weight
    if state.original_nested:
        absmax, nested_absmax, code, offset = quantize_absmax(weight.absmax)
        nested = NestedAbsmax(nested_absmax, code, offset, NESTED_BLOCKSIZE)
        weight = replace(weight, absmax=absmax, nested=nested)
    parameter.data, parameter.quant_state = weight.to_bitsandbytes()
    layer.quant_state = parameter.quant_state
    return weight


def _wrap(parameter: torch.Tensor, state: Any) -> NF4Weight | str:
    """Wrap the weight without reading it, as a trace needs."""
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has rearranged its bytes for the CPU"
    nested = None
    if state.nested:
        nested = NestedAbsmax(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    packed = parameter.view(-1).view(torch.uint8)
    return NF4Weight(packed, state.absmax, nested, tuple(state.shape), state.blocksize, state.dtype)


def autocast_off(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """A context without autocast: a 4-bit layer computes in its own `compute_dtype`."""
    device = x.device.type
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else contextlib.nullcontext()
    )
