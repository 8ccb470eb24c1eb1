"""The NF4 ops as torch ops: opcheck, compile, and refusal of bad input."""

import re
from typing import Any

import numpy
import pytest
import torch
from torch._subclasses import FakeTensorMode

import peft_kernels as pk

QUANTIZE = torch.ops.peft_kernels.nf4_quantize
DEQUANTIZE = torch.ops.peft_kernels.nf4_dequantize
OVERLOADS = pytest.mark.parametrize("overload", ["default", "reference"])


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(5, 33),
        torch.randn(64, 48).t(),
        torch.randn(1, 64).expand(4, 64).bfloat16(),
        torch.empty(0, 4).half(),
    ],
    ids=["odd", "transposed", "stride 0", "empty"],
)
@OVERLOADS
def test_opcheck_quantize(weight: torch.Tensor, overload: str) -> None:
    torch.library.opcheck(getattr(QUANTIZE, overload), (weight, 64))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@OVERLOADS
def test_opcheck_dequantize(dtype: torch.dtype, double_quant: bool, overload: str) -> None:
    w = pk.functional.nf4_quantize(torch.randn(9, 35), 32, double_quant)
    torch.library.opcheck(getattr(DEQUANTIZE, overload), (*w.base_weight(), w.shape, dtype))


def test_compile(fresh_compiler: None) -> None:
    def roundtrip(weight: torch.Tensor) -> torch.Tensor:
        return pk.functional.nf4_dequantize(pk.functional.nf4_quantize(weight, 128, double_quant=True)) + 1

    weight = torch.randn(33, 64)
    compiled = torch.compile(roundtrip, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(weight), roundtrip(weight))
    assert torch.equal(compiled(weight[:5]), roundtrip(weight[:5]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, dtype=torch.float64),), "weight must be float32 or bfloat16 or float16, got float64"),
        ((torch.ones(4, dtype=torch.int32),), "weight must be float32 or bfloat16 or float16, got int32"),
        ((torch.ones(4), 48), "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got 48"),
        ((torch.ones(4), 8192), "got 8192"),
    ],
)
def test_quantize_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.functional.nf4_quantize(*arguments)


@pytest.mark.parametrize("weight", [numpy.zeros((4, 64), numpy.float32), torch.nn.Linear(64, 4)])
def test_quantize_refuses_what_is_no_tensor(weight: object) -> None:
    with pytest.raises(TypeError, match=f"^weight must be a torch.Tensor, got .*{type(weight).__name__}; "):
        pk.functional.nf4_quantize(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(95, dtype=torch.uint8)}, "packed must be [(n+1)//2] = [96], got [95]"),
        ({0: torch.zeros(96, 1, dtype=torch.uint8)}, "got [96, 1]; flatten it with .reshape(-1)"),
        ({0: torch.zeros(96)}, "packed must be uint8, got float32; view its bytes"),
        ({1: torch.zeros(4, dtype=torch.uint8)}, "absmax must be [ceil(n/blocksize)] = [3], got [4]"),
        ({1: torch.zeros(3)}, "absmax must be uint8, got float32"),
        ({2: None}, "must be given together"),
        ({2: None, 3: None, 4: None}, "absmax must be float32, got uint8"),
        ({2: torch.zeros(2)}, "nested_absmax must be [ceil(blocks/nested_blocksize)] = [1], got [2]"),
        ({3: torch.zeros(255)}, "nested_code must be [256] = [256], got [255]"),
        ({3: torch.zeros(256, dtype=torch.float16)}, "nested_code must be float32, got float16"),
        ({4: torch.zeros(1)}, "nested_offset must be 0-dim = [], got [1]"),
        ({4: torch.zeros((), dtype=torch.float64)}, "nested_offset must be float32, got float64"),
        ({5: 0}, "nested_blocksize must be one of 32, 64"),
        ({6: 100}, "blocksize must be one of 32, 64"),
        ({7: (3, 65)}, "packed must be [(n+1)//2] = [98], got [96]"),
        ({8: torch.float64}, "dtype must be float32, bfloat16 or float16, got float64"),
    ],
)
def test_dequantize_refuses(change: dict[int, Any], message: str) -> None:
    """The same words from the reference and from the fake; the native kernel refuses too, in its own."""
    w = pk.functional.nf4_quantize(torch.randn(3, 64), 64, double_quant=True)
    arguments: list[Any] = [*w.base_weight(), w.shape, torch.float32]
    DEQUANTIZE.default(*arguments)
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        DEQUANTIZE.reference(*arguments)
    with pytest.raises((ValueError, RuntimeError)):
        DEQUANTIZE.default(*arguments)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=re.escape(message)):
        DEQUANTIZE.default(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])


def test_dequantize_refuses_what_is_no_nf4_weight() -> None:
    with pytest.raises(TypeError, match=r"w must be an NF4Weight, got Tensor; make one with nf4_quantize"):
        pk.functional.nf4_dequantize(torch.zeros(4))
