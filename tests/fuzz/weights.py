"""NF4 weights from outside: the constructor, bitsandbytes' states, and state_dicts as files hold them."""

import json
import math
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from hypothesis import strategies as st

import peft_kernels as pk

from . import properties
from .calls import Arguments, Entry
from .odd import Draw, choose, odd_tensor
from .problems import Maker
from .properties import Refusal

STATE = "weight.quant_state.bitsandbytes__nf4"
# What errors may name: the keys of a state_dict, the attributes of a QuantState, the parts of an NF4Weight.
NAMES = (
    *(
        "packed",
        "absmax",
        "nested",
        "nested_absmax",
        "nested_code",
        "nested_offset",
        "nested_blocksize",
        "shape",
    ),
    *("blocksize", "dtype", "quant_storage", "quant_type", "code", "quant_state", "state_dict", "weight"),
)
JSON_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        63,
        64,
        2**62,
        2**63,
        10**400,
        1e308,
        -0.0,
        64.0,
        math.nan,
        math.inf,
        -math.inf,
    ),
    *(
        "",
        "nf4",
        "fp4",
        "float32",
        "float64",
        "int8",
        "nn",
        "Tensor",
        "__class__",
        "\ud83d",
        "x" * 5000,
        [],
        {},
    ),
    *(
        [8, 64],
        [-8, -64],
        [64, 8],
        [512],
        [8, 64, 1],
        [0, 0],
        [2**31, 2**31],
        [2**62, 4],
        ["8", "64"],
        [8.0, 64.0],
    ),
    *([None], {"a": 1}, [[8, 64]], [True, 512]),
)


def constructor_arguments(draw: Draw) -> Arguments:
    """The parts of a valid weight."""
    return dict(vars(Maker(draw).nf4()))


def construct(**parts: Any) -> torch.Tensor:
    """Construct, and read all of it."""
    return _read(pk.NF4Weight(**parts))


def _read(w: pk.NF4Weight) -> torch.Tensor:
    assert str(tuple(w.shape)) in repr(w)
    return w.dequantize(torch.float32)


def state_arguments(draw: Draw) -> Arguments:
    """A packed weight and the attributes of its bitsandbytes state."""
    packed, state = Maker(draw).nf4().to_bitsandbytes()
    names = ("absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset", "nested", "state2")
    attributes = {name: getattr(state, name) for name in names}
    second = attributes.pop("state2")
    parts = {f"state2_{name}": getattr(second, name, None) for name in ("absmax", "code", "blocksize")}
    return {"packed": packed, **attributes, "has_state2": second is not None, **parts, "rearranged": False}


def from_bitsandbytes(packed: Any, has_state2: Any, rearranged: Any, **attributes: Any) -> torch.Tensor:
    """Set every attribute of a state, and wrap the weight."""
    state, second = object.__new__(QuantState), object.__new__(QuantState)
    for name, value in attributes.items():
        owner = second if name.startswith("state2_") else state
        setattr(owner, name.removeprefix("state2_"), value)
    state.state2 = second if has_state2 is True else None if has_state2 is False else has_state2
    if rearranged is not False:
        state.packing_format_for_cpu = True
        state.original_nested, state.original_dtype = False, torch.float32
    return _read(pk.NF4Weight.from_bitsandbytes(packed, state))


def hostile_json(draw: Draw, text: bytes) -> bytes:
    """What may come in the place of the JSON of a quant_state."""
    meta: Any = json.loads(text)
    kind = draw(st.integers(0, 7))
    if kind <= 2:
        meta[choose(draw, [*meta, "nested_offset", "other"])] = choose(draw, JSON_VALUES)
    elif kind == 3:
        del meta[choose(draw, [*meta])]
    elif kind == 4:
        name = choose(draw, [*meta])  # twice
        return text[:-1] + b", " + json.dumps({name: choose(draw, JSON_VALUES)}).encode()[1:]
    elif kind == 5:
        whole = (
            b"",
            b"null",
            b"[]",
            b"1",
            b'"nf4"',
            b"{",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"NaN",
            b"\xff\xfe",
            b"{}",
        )
        return choose(draw, (*whole, b"9" * 6000, b"{" + b" " * 10_000 + b"}"))
    elif kind == 6:
        return text[: draw(st.integers(0, len(text)))]
    else:
        at = draw(st.integers(0, len(text) - 1))
        return text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
    return json.dumps(meta).encode()


def hostile_state_dict(draw: Draw, w: pk.NF4Weight) -> dict[str, Any]:
    """The state_dict of `w` with something wrong."""
    state: dict[str, Any] = w.state_dict()
    for _ in range(choose(draw, (0, 1, 1, 1, 2))):
        key = choose(draw, [*state])
        kind = draw(st.integers(0, 4))
        if key == STATE and kind < 4:
            content = hostile_json(draw, bytes(w.state_dict()[key].tolist()))
            state[key] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)]
        elif kind == 0:
            del state[key]
        elif kind == 1 and isinstance(state[key], torch.Tensor) and state[key].dim() > 0:
            state[key] = state[key][: draw(st.integers(0, len(state[key])))]  # a file cut short
        elif isinstance(state[key], torch.Tensor):
            state[key] = odd_tensor(draw, w.state_dict()[key])[0]
        if not state:
            break
    return state


def from_state_dict(draw: Draw) -> None:
    """Read a hostile state_dict; what is read can be used, and is written back as it was."""
    state = hostile_state_dict(draw, Maker(draw).nf4())
    names = (
        *NAMES,
        *state,
        STATE,
        *(f"weight.{name}" for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
    )
    with properties.unchanged(state):
        try:
            result = pk.NF4Weight.from_state_dict(state)
        except (*properties.DOCUMENTED, KeyError) as error:
            properties.refuse(Refusal(error), names)
            return
        dense = properties.outcome(_read, result)
    if isinstance(dense, Refusal):  # a part without memory
        properties.refuse(dense, names)
        return
    again = pk.NF4Weight.from_state_dict(result.state_dict())
    with pk.use_backend("reference"):
        properties.same_bits(dense, _read(again))


def load_state_dict(draw: Draw) -> None:
    """Load a hostile state_dict into a layer: it takes all of the weight, or is left as it was."""
    make = Maker(draw)
    w = make.nf4(8, 64)
    layer = pk.nn.NF4Linear(64, 8, blocksize=make.pick((32, 64)), double_quant=make.maybe())
    state = {"bias": torch.ones(8), **hostile_state_dict(draw, w)}
    before = {name: value.clone() for name, value in layer.state_dict().items() if name != "bias"}
    loaded = properties.outcome(layer.load_state_dict, state, strict=make.maybe(), assign=make.maybe())
    if isinstance(loaded, Refusal):
        assert "Error(s) in loading state_dict for NF4Linear" in loaded.text, loaded.text[:500]
        after = layer.state_dict()
        if "weight: " in loaded.text:
            assert before.keys() == after.keys() - {"bias"}
            for name, value in before.items():
                properties.same_bits(after[name], value)
        return
    y = properties.outcome(layer, torch.ones(2, 64))
    if isinstance(y, Refusal):
        properties.refuse(y, NAMES)


def _entry(function: Any, build: Any) -> Entry:
    return Entry(function, build, names=NAMES, differentiable=False, fixed=("code", "state2_code", "packed"))


WEIGHTS = {
    "NF4Weight": _entry(construct, constructor_arguments),
    "NF4Weight.from_bitsandbytes": _entry(from_bitsandbytes, state_arguments),
}
STATE_DICTS = {"NF4Weight.from_state_dict": from_state_dict, "nn.NF4Linear.load_state_dict": load_state_dict}
