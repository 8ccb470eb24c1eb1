"""What bitsandbytes says of a weight beside its bytes, from a file: read with suspicion."""

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any

import torch

from peft_kernels.core.checks import check_dtype, check_memory, check_shape, check_tensor, shown
from peft_kernels.ops.nf4.reference import nf4_code
from peft_kernels.ops.nf4.schema import WEIGHT_DTYPES

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}
_LARGEST_JSON = 2**20
_LARGEST = torch.finfo(torch.float32).max
# What the JSON of a quant_state has, and where the weight is double-quantised.
_META: Mapping[str, type | UnionType] = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
_NESTED_META: Mapping[str, type | UnionType] = {"nested_offset": int | float, "nested_blocksize": int}
STATE_KEY = "weight.quant_state.bitsandbytes__nf4"


def read_meta(key: str, entry: torch.Tensor) -> dict[str, Any]:
    """The JSON of a quant_state, every value of the type that it must have."""
    check_dtype(key, entry, (torch.uint8,))
    check_shape(key, entry, "[bytes]", (None,))
    if entry.is_meta:
        raise ValueError(f"{key} must have values, got a tensor on the meta device; load it to another")
    check_memory(key, entry)
    if entry.numel() > _LARGEST_JSON:
        raise ValueError(f"{key} must have at most {_LARGEST_JSON} bytes, got {entry.numel()}; load it again")
    try:
        meta = json.loads(bytes(entry.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} must be JSON in UTF-8, got {error}; load the file again") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{key} must be a JSON object, got a {type(meta).__name__}; load the file again")
    kinds = dict(_META)
    if "nested_offset" in meta:
        kinds |= _NESTED_META
    for name, kind in kinds.items():
        value = meta.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"{name} must be in {key}, a {kind}, got {str(value)[:200]!r}; load the file again"
            )
    if meta["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {meta['dtype'][:200]!r}")
    if isinstance(offset := meta.get("nested_offset"), int) and abs(offset) > _LARGEST:
        raise ValueError("nested_offset must be a float32, got a larger int; load the file again")
    return meta


def require_nf4(quant_type: object, code: torch.Tensor | None) -> None:
    """Refuse FP4 and unknown code tables by name."""
    if not (isinstance(quant_type, str) and quant_type == "nf4"):
        raise ValueError(
            f"quant_type must be 'nf4', got {shown(quant_type)}, which peft_kernels does not support; "
            "quantise with quant_type='nf4' (bnb_4bit_quant_type='nf4')"
        )
    # A file's table may differ in the last bit: some were made with scipy. bitsandbytes does not read it.
    table = nf4_code(torch.device("cpu"))
    if code is None:
        return
    check_tensor("code", code)
    check_shape("code", code, "[16]", tuple(table.shape))
    if code.is_meta:
        raise ValueError("code must have values, got a tensor on the meta device; load it to another")
    check_dtype("code", code, (*WEIGHT_DTYPES, torch.float64))
    check_memory("code", code)
    if not torch.allclose(code.cpu().float(), table, rtol=0, atol=1e-6):
        raise ValueError(
            f"code must be the NF4 table, got {(code + 0).tolist()}; quantise with quant_type='nf4'"
        )
