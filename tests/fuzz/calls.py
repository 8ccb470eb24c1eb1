"""One fuzzed call: valid arguments, some of them exchanged, and what must hold for it on every backend."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

import peft_kernels as pk

from . import properties
from .odd import Draw, choose, odd
from .properties import Refusal

Arguments = dict[str, Any]
Formula = Callable[[Arguments], torch.Tensor | tuple[torch.Tensor, ...]]

PARTS_OF_A_WEIGHT = (
    "weight",
    *(
        "packed",
        "packed weight",
        "absmax",
        "nested_absmax",
        "nested_code",
        "nested_offset",
        "nested_blocksize",
    ),
    *("blocksize", "shape", "dtype", "quant_storage"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What takes arguments, and how its results are judged.

    Attributes:
        function: called with keywords.
        build: draws valid arguments; all of them, the absent ones as None.
        exact: for these arguments, two functions of them in float64: to the result, and of their magnitudes
            to the sum of the magnitudes of its terms; None where float64 is no judge of the call. Without it
            the result has the reference's bits.
        roundings: how many a term of the result passes through.
        in_halves: whether steps on the way are rounded to 16 bits where x is.
        may_return_input: whether these arguments make it return one of them.
    """

    function: Callable[..., Any]
    build: Callable[[Draw], Arguments]
    exact: Callable[[Arguments], tuple[Formula, Formula] | None] | None = None
    roundings: Callable[[Arguments], int] = lambda arguments: 64
    in_halves: bool = True
    may_return_input: Callable[[Arguments], bool] = lambda arguments: False
    names: Sequence[str] = PARTS_OF_A_WEIGHT
    reference: Callable[..., Any] | None = None  # by default the function, on the reference backend
    same_words: bool = True  # of the errors of both
    differentiable: bool = True
    fixed: Sequence[str] = ()  # arguments that have one valid value only


def mutate(draw: Draw, arguments: Arguments, fixed: Sequence[str] = ()) -> tuple[Arguments, bool]:
    """`arguments` with none to three of them exchanged, and whether they are still valid."""
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    arguments, valid, names = dict(arguments), True, [*arguments]
    for _ in range(min(len(names), choose(draw, (0, 1, 1, 1, 2, 3)))):
        name = names.pop(draw(st.integers(0, len(names) - 1)))
        if tensors and draw(st.integers(0, 14)) == 0:  # the same tensor, or a view of it, in two places
            other = choose(draw, tensors)
            arguments[name], valid = choose(draw, (other, other.detach())), False
        else:
            arguments[name], kept = odd(draw, arguments[name])
            valid = valid and kept and name not in fixed
    return arguments, valid


def check_call(draw: Draw, entry: Entry) -> None:
    """Fuzz one call."""
    arguments, valid = mutate(draw, entry.build(draw), entry.fixed)
    names = (*arguments, *entry.names)
    with properties.unchanged(arguments):
        result = properties.outcome(entry.function, **arguments)
        expected = reference(entry, arguments)
    if isinstance(result, Refusal):
        assert not valid, f"valid arguments were refused: {result.error}"
        properties.refuse(result, names)
    if isinstance(result, Refusal) or isinstance(expected, Refusal):
        if entry.reference is None or not may_differ(result, expected):
            same_refusal(result, expected, entry.same_words)
        return
    if entry.may_return_input(arguments):
        assert any(result is argument for argument in arguments.values())
        return
    properties.same_form(result, expected)
    properties.no_alias(result, arguments)
    compare(entry, arguments, result, expected)
    if entry.reference is None and entry.differentiable:
        differentiate(entry, arguments, result)


def may_differ(result: Any, expected: Any) -> bool:
    """Whether only one of an op's overloads is to take its arguments.

    Kernels compute in float32: the public functions take float64 to the reference. And they do not look at
    the memory of tensors whose values they do not need.
    """
    if isinstance(result, Refusal):
        return result.text.endswith("must be float32, bfloat16 or float16, got Double")
    return "must have memory" in expected.text or properties.OF_INFERENCE in expected.text


def reference(entry: Entry, arguments: Arguments) -> Any:
    """What the reference makes of the same call."""
    if entry.reference is not None:
        return properties.outcome(entry.reference, **arguments)
    with pk.use_backend("reference"):
        return properties.outcome(entry.function, **arguments)


def same_refusal(result: Any, expected: Any, same_words: bool) -> None:
    """Both backends refuse, or none; for the same reason."""
    for refused, other, who in ((result, expected, "reference"), (expected, result, "native kernel")):
        assert isinstance(other, Refusal), f"the {who} computes what the other refuses: {refused.text}"
    if same_words:
        words, expected_words = properties.words(result), properties.words(expected)
        assert words == expected_words, f"{words!r}, and on the reference {expected_words!r}"


def compare(entry: Entry, arguments: Arguments, result: Any, expected: Any) -> None:
    """The result is right."""
    results = list(properties.tensors_in(result))
    if any(t.is_meta for t in results):
        return
    if arguments.get("seed", 0) is None and arguments.get("p", arguments.get("dropout_p")) != 0.0:
        return  # masks of a seed that was drawn
    if entry.exact is None:
        for one, other in zip(results, properties.tensors_in(expected), strict=True):
            properties.same_bits(one, other)
        return
    formulas = entry.exact(arguments)
    if formulas is None or results[0].dtype == torch.float64:
        return
    with torch.no_grad():
        exact, magnitude = (
            properties.tensors_in(formula(in_float64(arguments, absolute)))
            for formula, absolute in zip(formulas, (False, True), strict=True)
        )
    inputs = inputs_of(arguments)
    for index, parts in enumerate(zip(results, exact, magnitude, strict=True)):
        extra = properties.extra(parts[0], inputs) if entry.in_halves else 0.0
        properties.close(f"result {index}", *parts, entry.roundings(arguments), extra, inputs)


def inputs_of(arguments: Arguments) -> list[Any]:
    """Numbers and tensors that go into a result."""
    return [*properties.tensors_in(arguments), arguments.get("scaling", 1.0)]


def differentiate(entry: Entry, arguments: Arguments, result: Any) -> None:
    """Gradients, where some argument wants one, equal those of the float64 function."""
    y = next(properties.tensors_in(result), None)
    leaves = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf
    }
    if y is None or not y.requires_grad or not leaves or y.is_meta:
        return
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    with properties.unchanged(arguments):
        gradients = torch.autograd.grad(y, [*leaves.values()], upstream, allow_unused=True)
    formulas = entry.exact(arguments) if entry.exact is not None else None
    finite = all(bool(t.isfinite().all()) for t in properties.tensors_in(arguments))
    # Where one formula serves both, it is a polynomial, and its gradients are too.
    compared = formulas is not None and formulas[0] is formulas[1] and finite and y.dtype != torch.float64
    exact = (
        [_gradients(formulas[0], arguments, leaves, upstream, absolute) for absolute in (False, True)]
        if compared
        else []
    )
    for index, (name, leaf) in enumerate(leaves.items()):
        gradient = gradients[index]
        if gradient is None:
            continue
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype), f"gradient of {name}"
        if compared:
            inputs = [*inputs_of(arguments), upstream]
            extra = properties.extra(gradient, inputs)
            roundings = 2 * (entry.roundings(arguments) + sum(y.shape) + leaf.numel())
            values, magnitude = (gradients64[index] for gradients64 in exact)
            properties.close(f"gradient of {name}", gradient, values, magnitude, roundings, extra, inputs)


def _gradients(
    formula: Formula, arguments: Arguments, leaves: Any, upstream: torch.Tensor, absolute: bool
) -> Any:
    inputs = in_float64(arguments, absolute)
    for name in leaves:
        inputs[name].requires_grad_()
    first = next(properties.tensors_in(formula(inputs)))
    grad = upstream.double().abs() if absolute else upstream.double()
    return torch.autograd.grad(first, [inputs[name] for name in leaves], grad, allow_unused=True)


def in_float64(arguments: Arguments, absolute: bool = False) -> Arguments:
    """The arguments in float64, NF4 weights dense; or their magnitudes."""

    converted: dict[int, Any] = {}  # of a tensor in two places

    def convert(value: Any) -> Any:
        if id(value) not in converted:
            converted[id(value)] = converted_value(value)
        return converted[id(value)]

    def converted_value(value: Any) -> Any:
        if isinstance(value, pk.NF4Weight):
            with pk.use_backend("reference"):
                value = value.dequantize(torch.float32)
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            value = value.detach().as_subclass(torch.Tensor).double()
            return value.abs() if absolute else value.clone()
        if isinstance(value, float) and absolute:
            return abs(value)
        return value

    return {name: convert(value) for name, value in arguments.items()}
