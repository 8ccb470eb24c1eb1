"""`NF4Weight`: the NF4 storage format, documented where it is defined, and its conversions."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from peft_kernels.core.backend import resolve
from peft_kernels.core.checks import check_sizes, check_tensor
from peft_kernels.ops.nf4.quant_state import DTYPES, STATE_KEY, read_meta, require_nf4
from peft_kernels.ops.nf4.reference import nf4_code
from peft_kernels.ops.nf4.schema import (
    WEIGHT_DTYPES,
    BaseWeight,
    check_nf4_dequantize,
    check_nf4_format,
    check_nf4_types,
)

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

_STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_QUANT_STATE = (
    "absmax",
    "shape",
    "code",
    "blocksize",
    "quant_type",
    "dtype",
    "offset",
)  # what is read of one


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """Second level of double quantisation: absmax_i = code[absmax_u8[i]] * absmax[i // blocksize] + offset.

    The product is rounded to fp32, then the sum.

    Attributes:
        absmax: fp32 [ceil(blocks/blocksize)].
        code: fp32 [256], ascending, in [-1, 1].
        offset: fp32 0-dim, the mean of the first level.
        blocksize: how many absmax share one second-level absmax; 256 in everything bitsandbytes writes.
    """

    absmax: torch.Tensor
    code: torch.Tensor
    offset: torch.Tensor
    blocksize: int


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A weight in 4-bit NormalFloat, in the bytes of bitsandbytes.

    Element e of the n = N*K elements, in row-major order, is

        w[e] = fp32(code16[nibble(e)] * absmax[e // blocksize])

    with code16 the sixteen NF4 values from -1 to 1. A block may cross the end of a row.

    Attributes:
        packed: uint8 [(n+1)//2], contiguous. Byte i holds element 2i in its HIGH nibble and 2i+1 in its low
            one; for odd n the last low nibble is padding.
        absmax: largest magnitude of each block of `blocksize` elements, in units of the weight. fp32
            [ceil(n/blocksize)], or uint8 when `nested` is given (double quantisation).
        nested: what turns a uint8 absmax into fp32; None for plain NF4.
        shape: shape of the weight, (N, K) = (out_features, in_features) for a linear layer.
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        dtype: dtype of the weight that was quantised, and the default of `dequantize`.
        quant_storage: dtype as which bitsandbytes stores the packed bytes (uint8, or bfloat16, float16,
            float32 for FSDP); the bytes are the same.

    Memory: 4 + 32/blocksize bits an element plain, 4 + 8/blocksize + 32/(256*blocksize) double-quantised:
    4.5 and 4.127 at blocksize 64.

    Raises:
        ValueError: the parts do not fit together; the message names the part.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested: NestedAbsmax | None
    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype
    quant_storage: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        for name, dtype, allowed in (
            ("dtype", self.dtype, WEIGHT_DTYPES),
            ("quant_storage", self.quant_storage, _STORAGE_DTYPES),
        ):
            if not isinstance(dtype, torch.dtype) or dtype not in allowed:
                wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
                raise ValueError(f"{name} must be one of {wanted}, got {dtype}")
        check_sizes("shape", self.shape)
        if self.nested is not None and not isinstance(self.nested, NestedAbsmax):
            raise TypeError(f"nested must be a NestedAbsmax or None, got a {type(self.nested).__name__}")
        check_nf4_types(self.base_weight())
        check_nf4_format(self.base_weight(), self.shape)
        if not self.packed.is_contiguous():
            raise ValueError(f"packed must be contiguous, got strides {self.packed.stride()}")
        if self.packed.numel() % self.quant_storage.itemsize:
            raise ValueError(
                f"packed must hold whole elements of quant_storage {self.quant_storage}, "
                f"got {self.packed.numel()} bytes; use quant_storage=torch.uint8"
            )

    def base_weight(self) -> BaseWeight:
        """The parts in the order in which the ops take them."""
        nested = self.nested
        if nested is None:
            return BaseWeight(self.packed, self.absmax, None, None, None, 0, self.blocksize)
        scale = (self.absmax, nested.absmax, nested.code, nested.offset, nested.blocksize)
        return BaseWeight(self.packed, *scale, self.blocksize)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as a dense tensor of `shape`: fp32 code times fp32 absmax, rounded once to `dtype`.

        Args:
            dtype: float32, bfloat16 or float16; the weight's own `dtype` by default.

        Returns:
            Tensor of `shape`, contiguous.

        Raises:
            ValueError: `dtype` is another one.
        """
        base, dtype = self.base_weight(), self.dtype if dtype is None else dtype
        check_nf4_dequantize(base, self.shape, dtype)
        weight: torch.Tensor = resolve("nf4_dequantize", self.packed)(*base, self.shape, dtype)
        return weight

    def to(self, device: torch.device | str | int) -> "NF4Weight":
        """The same weight on another device.

        Args:
            device: as torch.Tensor.to takes it.

        Returns:
            The weight with its tensors there; those that were there already are shared, not copied.
        """
        nested = self.nested
        if nested is not None:
            code, offset = nested.code.to(device), nested.offset.to(device)
            nested = replace(nested, absmax=nested.absmax.to(device), code=code, offset=offset)
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device), nested=nested)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(part.nbytes for part in self.base_weight() if isinstance(part, torch.Tensor))

    def __repr__(self) -> str:
        nested = ", double-quantised" if self.nested is not None else ""
        bits = 8 * self.nbytes / max(math.prod(self.shape), 1)
        return (
            f"NF4Weight(shape={tuple(self.shape)}, blocksize={self.blocksize}{nested}, dtype={self.dtype}, "
            f"quant_storage={self.quant_storage}, device={self.device}, {bits:.3f} bits/element)"
        )

    @classmethod
    def from_bitsandbytes(cls, packed: torch.Tensor, quant_state: "QuantState | None" = None) -> "NF4Weight":
        """Wrap a bitsandbytes weight without copying it.

        bitsandbytes' CPU inference rearranges the bytes of a layer in place (AVX512-BF16 machines, eval
        mode). That form is recognised and undone on a copy: `packed` and `quant_state` stay as they are.
        It keeps only bf16 absmax, so the absmax here are those, plain fp32, with whatever was lost lost.

        Args:
            packed: a `Params4bit`, or the packed tensor [(n+1)//2, 1] of any quant_storage.
            quant_state: its `QuantState`; taken from a `Params4bit` when not given.

        Raises:
            TypeError: `packed` is not a tensor, but a layer for example.
            ValueError: not quantised yet, not NF4 (FP4 is not supported), or transposed.
        """
        check_tensor("packed", packed, "pass layer.weight")
        state: Any = quant_state if quant_state is not None else getattr(packed, "quant_state", None)
        missing = [name for name in _QUANT_STATE if state is not None and not hasattr(state, name)]
        if missing:
            raise TypeError(
                f"quant_state must be a bitsandbytes QuantState, got a {type(state).__name__} without "
                f"{', '.join(missing)}; pass layer.weight.quant_state"
            )
        if state is None:
            raise ValueError(
                "packed must be quantised, got a tensor without a quant_state; move the bitsandbytes layer "
                "to its device first (layer.to('cpu') quantises it), or pass quant_state"
            )
        require_nf4(state.quant_type, state.code)
        if state.shape is None:
            raise ValueError("quant_state.shape must be that of the weight, (N, K), got None; set it")
        check_sizes("quant_state.shape", state.shape)
        check_tensor("absmax", state.absmax)
        data = packed.data if isinstance(packed, torch.nn.Parameter) else packed
        if getattr(state, "packing_format_for_cpu", False):
            return cls._from_cpu_layout(data, state)
        if data.dim() > 1 and data.shape[0] == 1 and data.numel() > 1:
            raise ValueError(
                f"packed must be [(n+1)//2, 1], got {list(data.shape)}, which bitsandbytes reads as the "
                "transposed weight; pass layer.weight, not layer.weight.t()"
            )
        nested = None
        if getattr(state, "state2", None) is not None:
            second = state.state2
            if not all(hasattr(second, name) for name in ("absmax", "code", "blocksize")):
                raise TypeError(
                    f"quant_state.state2 must be a bitsandbytes QuantState, got a {type(second).__name__}"
                )
            nested = NestedAbsmax(second.absmax, second.code, state.offset, second.blocksize)
        return cls(
            packed=data.reshape(-1).view(torch.uint8),
            absmax=state.absmax if nested is not None else state.absmax.float(),
            nested=nested,
            shape=tuple(state.shape),
            blocksize=state.blocksize,
            dtype=state.dtype,
            quant_storage=data.dtype,
        )

    @classmethod
    def _from_cpu_layout(cls, data: torch.Tensor, state: Any) -> "NF4Weight":
        """Undo bitsandbytes' rearrangement for its CPU inference kernel, on a copy."""
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        scratch = copy.copy(state)  # the inverse writes into the state that it is given
        scratch.original_nested = False  # do not double-quantise the bf16 absmax once more
        try:
            packed, _ = _convert_weight_packed_for_cpu_inverse(data, scratch)
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                "quant_state must be of a weight that bitsandbytes rearranged for its CPU inference "
                f"(packing_format_for_cpu), got one that it cannot read: {error}"
            ) from error
        return cls(
            packed=packed.reshape(-1).view(torch.uint8),
            absmax=state.absmax.t().reshape(-1).float(),  # bf16 [K/blocksize, N]
            nested=None,
            shape=tuple(state.shape),
            blocksize=state.blocksize,
            dtype=state.original_dtype,
            quant_storage=packed.dtype,
        )

    def to_bitsandbytes(self) -> "tuple[torch.Tensor, QuantState]":
        """(packed, quant_state) for bitsandbytes, sharing memory with this weight. Needs bitsandbytes.

        `Params4bit(packed, quant_state=quant_state, bnb_quantized=True, ...)` makes a parameter of it.
        """
        from bitsandbytes.functional import QuantState

        make_state: Any = QuantState  # its __init__ has no annotations
        nested, offset, second = self.nested, None, None
        if nested is not None:
            offset = nested.offset
            second = make_state(
                nested.absmax, code=nested.code, blocksize=nested.blocksize, dtype=torch.float32
            )
        state: QuantState = make_state(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=nf4_code(self.device),
            blocksize=self.blocksize,
            quant_type="nf4",
            dtype=self.dtype,
            offset=offset,
            state2=second,
        )
        return self._stored(), state

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The weight under the keys, and in the bytes, of a bitsandbytes `Linear4bit`'s state_dict.

        Keys: weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 (UTF-8 JSON),
        and when double-quantised weight.nested_absmax and weight.nested_quant_map.

        Args:
            prefix: of every key; the module's name and a dot.

        Returns:
            Tensors by key; those of the weight are shared, not copied.
        """
        meta: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {
            "weight": self._stored(),
            "weight.absmax": self.absmax,
            "weight.quant_map": nf4_code(self.device),
        }
        if self.nested is not None:
            state["weight.nested_absmax"] = self.nested.absmax
            state["weight.nested_quant_map"] = self.nested.code.clone()  # safetensors refuses shared memory
            meta["nested_blocksize"] = self.nested.blocksize
            meta["nested_dtype"] = "float32"
            meta["nested_offset"] = self.nested.offset.item()
        state[STATE_KEY] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
        return {prefix + key: tensor for key, tensor in state.items()}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> "NF4Weight":
        """Read what `state_dict`, or a bitsandbytes `Linear4bit`, wrote under `prefix`; tensors are shared.

        Args:
            state_dict: tensors by key, other keys too.
            prefix: of the weight's keys; the module's name and a dot.

        Returns:
            The weight, in which nothing is copied but the offset of nested absmax.

        Raises:
            KeyError: a key is missing.
            TypeError: an entry is not a tensor.
            ValueError: the weight is not NF4, or an entry is damaged; the message says which.
        """
        if prefix + STATE_KEY.replace("nf4", "fp4") in state_dict:
            require_nf4("fp4", None)

        def entry(key: str) -> torch.Tensor:
            if prefix + key not in state_dict:
                raise KeyError(f"state_dict must have {prefix + key!r} for an NF4 weight, got no such key")
            tensor = state_dict[prefix + key]
            check_tensor(prefix + key, tensor)
            return tensor

        meta = read_meta(prefix + STATE_KEY, entry(STATE_KEY))
        require_nf4(meta["quant_type"], entry("weight.quant_map"))
        weight, absmax = entry("weight"), entry("weight.absmax")
        nested = None
        if "nested_offset" in meta:
            nested = NestedAbsmax(
                absmax=entry("weight.nested_absmax"),
                code=entry("weight.nested_quant_map"),
                offset=torch.tensor(meta["nested_offset"], dtype=torch.float32, device=weight.device),
                blocksize=meta["nested_blocksize"],
            )
        return cls(
            packed=weight.reshape(-1).view(torch.uint8),
            absmax=absmax,
            nested=nested,
            shape=tuple(meta["shape"]),
            blocksize=meta["blocksize"],
            dtype=DTYPES[meta["dtype"]],
            quant_storage=weight.dtype,
        )

    def _stored(self) -> torch.Tensor:
        """The packed bytes as bitsandbytes keeps them: [(n+1)//2 / itemsize, 1] of quant_storage."""
        return self.packed.view(self.quant_storage).unsqueeze(1)
