"""NF4Weight: bitsandbytes and back without copies, state dicts, devices, compile, and what is refused."""

import copy
import pickle
import re
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import (
    QuantState,
    _convert_weight_packed_for_cpu,
    dequantize_4bit,
    quantize_4bit,
)

import numerics
import peft_kernels as pk

STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
DOUBLE = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])


def quantize(weight: torch.Tensor, double_quant: bool, **options: Any) -> tuple[torch.Tensor, QuantState]:
    return quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant, **options)


def layer_4bit(n: int, k: int, double_quant: bool, **options: Any) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(k, n, bias=False, compress_statistics=double_quant, quant_type="nf4", **options)
    return layer.to("cpu")  # quantises


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.nbytes == b.nbytes


def assert_same_weight(a: pk.NF4Weight, b: pk.NF4Weight) -> None:
    assert (a.shape, a.blocksize, a.dtype, a.quant_storage) == (
        b.shape,
        b.blocksize,
        b.dtype,
        b.quant_storage,
    )
    for x, y in zip(a.base_weight(), b.base_weight(), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@DOUBLE
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_bitsandbytes_and_back_without_a_copy(
    double_quant: bool, storage: torch.dtype, blocksize: int
) -> None:
    weight = torch.randn(24, 96, dtype=torch.bfloat16)
    packed, state = quantize(weight, double_quant, blocksize=blocksize, quant_storage=storage)
    w = pk.NF4Weight.from_bitsandbytes(packed, state)
    assert (w.shape, w.blocksize, w.dtype, w.quant_storage) == ((24, 96), blocksize, torch.bfloat16, storage)
    assert same_memory(w.packed, packed)
    assert same_memory(w.absmax, state.absmax)
    back, back_state = w.to_bitsandbytes()
    assert same_memory(back, packed)
    assert (back.shape, back.dtype) == (packed.shape, packed.dtype)
    assert same_memory(back_state.absmax, state.absmax)
    assert (w.nested is not None) == back_state.nested == double_quant
    if double_quant:
        assert same_memory(back_state.state2.absmax, state.state2.absmax)
        assert same_memory(back_state.state2.code, state.state2.code)
        assert same_memory(back_state.offset, state.offset)
        assert back_state.state2.dtype == state.state2.dtype
    assert back_state == state
    assert torch.equal(
        dequantize_4bit(back, back_state).reshape(24, 96), dequantize_4bit(packed, state).reshape(24, 96)
    )


@DOUBLE
def test_a_layers_weight(double_quant: bool) -> None:
    layer = layer_4bit(8, 64, double_quant)
    w = pk.NF4Weight.from_bitsandbytes(layer.weight)
    assert same_memory(w.packed, layer.weight.data)
    assert not w.packed.requires_grad
    assert torch.equal(w.dequantize(), dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    packed, state = w.to_bitsandbytes()
    again = bnb.nn.Params4bit(packed, quant_state=state, quant_type="nf4", bnb_quantized=True)
    x = torch.randn(3, 64)
    assert torch.equal(bnb.matmul_4bit(x, again, state), layer.train()(x))


@DOUBLE
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_layout_for_bitsandbytes_cpu_inference_is_undone_on_a_copy(
    double_quant: bool, storage: torch.dtype
) -> None:
    """The same nibbles come back; absmax come back as the bf16 values that this form keeps."""
    weight = torch.randn(64, 128, dtype=torch.float16)
    packed, state = quantize(weight, double_quant, quant_storage=storage)
    expected = pk.NF4Weight.from_bitsandbytes(packed.clone(), copy.deepcopy(state))
    packed, state = _convert_weight_packed_for_cpu(packed, state)
    bytes_before, state_before = packed.clone(), dict(vars(state))

    w = pk.NF4Weight.from_bitsandbytes(packed, state)

    assert torch.equal(w.packed, expected.packed)
    assert (w.shape, w.dtype, w.quant_storage, w.nested) == ((64, 128), torch.float16, storage, None)
    exact = expected.dequantize(torch.float32).double()
    numerics.assert_within(
        "weight",
        w.dequantize(torch.float32),
        exact,
        # absmax rounded to bf16, then each product to fp32
        (numerics.unit_roundoff(torch.bfloat16) + 2 * numerics.unit_roundoff(torch.float32)) * exact.abs()
        + numerics.smallest(torch.float32),
    )
    assert torch.equal(packed, bytes_before)
    assert list(vars(state)) == list(state_before)
    assert all(vars(state)[name] is value for name, value in state_before.items())


def test_layer_after_bitsandbytes_cpu_inference() -> None:
    """bitsandbytes' own eval forward rearranges the layer in place where the CPU has AVX512-BF16."""
    layer = layer_4bit(64, 128, double_quant=False).eval()
    before = pk.NF4Weight.from_bitsandbytes(layer.weight)
    dense = before.dequantize()
    with torch.no_grad():
        layer(torch.randn(2, 128))
    after = pk.NF4Weight.from_bitsandbytes(layer.weight)
    assert torch.equal(after.packed, before.packed)
    assert torch.equal(before.dequantize(), dense)
    assert (
        (after.absmax - before.absmax).abs() <= numerics.unit_roundoff(torch.bfloat16) * before.absmax
    ).all()


@DOUBLE
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_state_dict_is_bitsandbytes(double_quant: bool, storage: torch.dtype) -> None:
    layer = layer_4bit(16, 128, double_quant, quant_storage=storage)
    w = pk.NF4Weight.from_bitsandbytes(layer.weight)
    theirs, ours = layer.state_dict(prefix="model.q_proj."), w.state_dict(prefix="model.q_proj.")
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours[key].view(torch.uint8), tensor.data.view(torch.uint8)), key
    assert_same_weight(pk.NF4Weight.from_state_dict(theirs, "model.q_proj."), w)
    assert_same_weight(pk.NF4Weight.from_state_dict(w.state_dict()), w)
    stats = {key.removeprefix("weight."): value for key, value in w.state_dict().items() if key != "weight"}
    loaded = bnb.nn.Params4bit.from_prequantized(w.state_dict()["weight"], stats, device="cpu")
    assert torch.equal(dequantize_4bit(loaded.data, loaded.quant_state), w.dequantize())


def test_state_dict_of_several_weights_saves_with_safetensors(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    weights = {
        f"layer{i}.": pk.functional.nf4_quantize(torch.randn(8, 64), double_quant=True) for i in range(2)
    }
    state = {key: value for prefix, w in weights.items() for key, value in w.state_dict(prefix).items()}
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    for prefix, w in weights.items():
        assert_same_weight(pk.NF4Weight.from_state_dict(loaded, prefix), w)


@DOUBLE
def test_copies_pickles_and_moves(double_quant: bool) -> None:
    w = pk.functional.nf4_quantize(torch.randn(8, 64), double_quant=double_quant)
    assert_same_weight(copy.deepcopy(w), w)
    assert_same_weight(pickle.loads(pickle.dumps(w)), w)
    assert same_memory(w.to("cpu").packed, w.packed)
    assert w.to("meta").device.type == "meta"
    assert {part.device.type for part in w.to("meta").base_weight() if isinstance(part, torch.Tensor)} == {
        "meta"
    }


def test_size_and_repr() -> None:
    plain = pk.functional.nf4_quantize(torch.randn(256, 256, dtype=torch.bfloat16))
    double = pk.functional.nf4_quantize(torch.randn(256, 256), double_quant=True)
    assert plain.nbytes == 256 * 256 // 2 + 4 * 1024
    assert double.nbytes == 256 * 256 // 2 + 1024 + 4 * 4 + 4 * 256 + 4
    assert repr(plain) == (
        "NF4Weight(shape=(256, 256), blocksize=64, dtype=torch.bfloat16, quant_storage=torch.uint8, "
        "device=cpu, 4.500 bits/element)"
    )
    assert "double-quantised" in repr(double)


class Holder(torch.nn.Module):
    def __init__(self, w: pk.NF4Weight) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pk.functional.nf4_linear(x, self.w)


@DOUBLE
def test_compile_as_input_attribute_and_closure(fresh_compiler: None, double_quant: bool) -> None:
    w = pk.functional.nf4_quantize(torch.randn(16, 64), double_quant=double_quant)
    other = pk.functional.nf4_quantize(torch.randn(16, 64), double_quant=double_quant)
    x = torch.randn(3, 64)
    expected = pk.functional.nf4_linear(x, w)

    def compiled(function: Any) -> Any:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    as_input = compiled(pk.functional.nf4_linear)
    assert torch.equal(as_input(x, w), expected)
    assert torch.equal(as_input(x, other), pk.functional.nf4_linear(x, other))
    assert torch.equal(compiled(Holder(w))(x), expected)
    assert torch.equal(compiled(lambda x: pk.functional.nf4_linear(x, w))(x), expected)
    assert torch.equal(compiled(lambda: w.dequantize())(), w.dequantize())


def corrupted(**changes: Any) -> tuple[torch.Tensor, QuantState]:
    packed, state = quantize(torch.randn(8, 64), double_quant=False)
    for name, value in changes.items():
        setattr(state, name, value)
    return packed, state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (quantize_4bit(torch.randn(8, 64), quant_type="fp4"), "quant_type must be 'nf4', got 'fp4'"),
        (corrupted(code=torch.linspace(-1, 1, 16)), "code must be the NF4 table, got [-1.0, -0.866"),
        ((torch.zeros(4),), "packed must be quantised, got a tensor without a quant_state; move the"),
        ((bnb.nn.Params4bit(torch.zeros(8, 64), quant_type="nf4"),), "without a quant_state"),
        (
            (corrupted()[0].t(), corrupted()[1]),
            "packed must be [(n+1)//2, 1], got [1, 256], which bitsandbytes",
        ),
        (corrupted(shape=torch.Size([8, 65])), "packed must be [(n+1)//2] = [260], got [256]"),
        (corrupted(absmax=torch.zeros(4, 2)), "absmax must be [ceil(n/blocksize)] = [8], got [4, 2]"),
        (corrupted(shape=None), "quant_state.shape must be that of the weight, (N, K), got None"),
        (corrupted(blocksize=63), "blocksize must be one of 32, 64"),
        (
            corrupted(dtype=torch.float64),
            "dtype must be one of float32, bfloat16, float16, got torch.float64",
        ),
    ],
)
def test_from_bitsandbytes_refuses(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.NF4Weight.from_bitsandbytes(*arguments)


def test_from_bitsandbytes_refuses_a_layer() -> None:
    with pytest.raises(TypeError, match=r"^packed must be a .*, got .*Linear4bit; pass layer\.weight$"):
        pk.NF4Weight.from_bitsandbytes(bnb.nn.Linear4bit(64, 8))


def test_constructor_refuses() -> None:
    w = pk.functional.nf4_quantize(torch.randn(8, 64))
    spread = torch.zeros(512, dtype=torch.uint8)[::2]
    for changes, message in (
        ({"packed": spread}, "packed must be contiguous, got strides (2,)"),
        ({"quant_storage": torch.int8}, "quant_storage must be one of uint8, bfloat16, float16, float32"),
        (
            {"packed": w.packed[:255], "shape": (8, 63), "absmax": w.absmax, "quant_storage": torch.bfloat16},
            "packed must",
        ),
        ({"shape": (8, 63)}, "packed must be [(n+1)//2] = [252], got [256]"),
    ):
        fields = {**vars(w), **changes}
        with pytest.raises(ValueError, match=re.escape(message)):
            pk.NF4Weight(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must be JSON in UTF-8, got Expecting value"),
        (b"\xff", "must be JSON in UTF-8"),
        (b"[" * 100_000, "must be JSON in UTF-8, got maximum recursion depth"),
        (b"[]", "must be a JSON object, got a list"),
        (b'{"quant_type": 4}', "quant_type must be in weight.quant_state"),
        (b'{"quant_type": "nf4", "blocksize": "64"}', "blocksize must be in"),
        (b'{"quant_type": "nf4", "blocksize": true}', "blocksize must be in"),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "nn"}', "shape must be in"),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "nn", "shape": []}', "dtype must be one of"),
        (
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [-8, -64]}',
            "shape must have no",
        ),
        (
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": ["8"]}',
            "shape must be a sequence",
        ),
    ],
)
def test_from_state_dict_refuses_hostile_json(text: bytes, message: str) -> None:
    w = pk.functional.nf4_quantize(torch.randn(8, 64))
    state = {
        **w.state_dict(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        pk.NF4Weight.from_state_dict(state)
    many = torch.zeros(1, dtype=torch.uint8).expand(2**50)
    with pytest.raises(ValueError, match="must have at most 1048576 bytes"):
        pk.NF4Weight.from_state_dict({**state, "weight.quant_state.bitsandbytes__nf4": many})
    layer = pk.nn.NF4Linear(64, 8, bias=False)
    before = layer.nf4_weight
    with pytest.raises(RuntimeError, match=re.escape(message)):
        layer.load_state_dict(state)
    assert_same_weight(layer.nf4_weight, before)


def test_from_state_dict_refuses_what_is_no_tensor() -> None:
    state: dict[str, Any] = pk.functional.nf4_quantize(torch.randn(8, 64), double_quant=True).state_dict()
    for key in state:
        with pytest.raises(TypeError, match=rf"^{re.escape(key)} must be a torch\.Tensor, got int"):
            pk.NF4Weight.from_state_dict({**state, key: 3})
    with pytest.raises(ValueError, match=r"code must be \[16\] = \[16\], got \[15\]"):
        pk.NF4Weight.from_state_dict({**state, "weight.quant_map": torch.ones(15)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"absmax": None}, "absmax must be a torch.Tensor"),
        ({"code": torch.ones(15)}, "code must be [16]"),
        ({"shape": 512}, "quant_state.shape must be a sequence of ints"),
        ({"shape": (-8, -64)}, "quant_state.shape must have no negative size"),
        ({"state2": 3}, "quant_state.state2 must be a bitsandbytes QuantState, got a int"),
        ({"packing_format_for_cpu": True}, "quant_state must be of a weight that bitsandbytes rearranged"),
    ],
)
def test_from_bitsandbytes_refuses_a_hostile_state(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        pk.NF4Weight.from_bitsandbytes(*corrupted(**changes))
    with pytest.raises(
        TypeError, match=r"^quant_state must be a bitsandbytes QuantState, got a object without absmax"
    ):
        pk.NF4Weight.from_bitsandbytes(corrupted()[0], object())  # type: ignore[arg-type]


def test_from_state_dict_refuses() -> None:
    state = pk.functional.nf4_quantize(torch.randn(8, 64), double_quant=True).state_dict()
    for key in state:
        without = {k: v for k, v in state.items() if k != key}
        with pytest.raises(KeyError, match=re.escape(f"state_dict must have '{key}' for an NF4 weight")):
            pk.NF4Weight.from_state_dict(without)
    fp4 = bnb.nn.Linear4bit(64, 8, quant_type="fp4").to("cpu").state_dict()
    with pytest.raises(ValueError, match="quant_type must be 'nf4', got 'fp4'"):
        pk.NF4Weight.from_state_dict(fp4)
