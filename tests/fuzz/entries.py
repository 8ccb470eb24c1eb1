"""All that is fuzzed, by name, and one run of it."""

from collections.abc import Callable
from typing import Any

from .calls import check_call
from .functional_calls import FUNCTIONAL
from .modules import OBJECTS
from .odd import Draw
from .raw_calls import RAW
from .weights import STATE_DICTS, WEIGHTS

Run = Callable[[Draw], None]


def _of_call(entry: Any) -> Run:
    return lambda draw: check_call(draw, entry)


ENTRIES: dict[str, Run] = {
    **{f"functional.{name}": _of_call(entry) for name, entry in FUNCTIONAL.items()},
    **{f"torch.ops.{name}": _of_call(entry) for name, entry in RAW.items()},
    **{name: _of_call(entry) for name, entry in WEIGHTS.items()},
    **STATE_DICTS,
    **OBJECTS,
}
