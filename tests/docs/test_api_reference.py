"""Docstrings of public names: complete, their examples run, and `docs/api/` is what they say."""

import ast
import doctest
import importlib.util
import inspect
import re
import sys
import textwrap
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from pages import ROOT
from torch import nn

import peft_kernels as pk


def load_generator() -> ModuleType:
    """The program behind `make api`."""
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "docs" / "generate_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


api = load_generator()
# (module, name, object): classes, then their methods and properties, and functions
PUBLIC = [
    (module, name, thing)
    for module in api.MODULES
    for entry in api.entries(api.module_of(module))
    for name, thing in [
        (entry.name, entry.object),
        *((f"{entry.name}.{member}", thing) for member, thing in entry.members.items()),
    ]
]
IDS = [f"{module}.{name}" for module, name, _ in PUBLIC]
# Words that say of which kind a tensor's elements are.
_DTYPES = re.compile(r"float|bf16|fp16|fp32|int64|uint8|bool|dtype|see `|as for|parameter|floats")
_SHAPES = re.compile(r"\[[^\]]*\]|0-dim|any shape|see `|tensor of|one element|elements sharing")


def test_the_reference_is_up_to_date():
    wanted = api.generate()
    found = {path.name: path.read_text(encoding="utf-8") for path in api.FOLDER.glob("*.md")}
    assert found == wanted, "run `make api` and commit docs/api"


def test_everything_that_is_offered_is_in_it():
    names = {name for _, name, _ in PUBLIC}
    for module in (pk, pk.functional, pk.nn, pk.io):
        offered = {name for name in module.__all__ if callable(getattr(module, name))}
        assert offered <= names
    assert {"loraplus_param_groups", "NF4Weight.from_bitsandbytes", "LoRALinear.merge", "Row"} <= names


def sections(docstring: str) -> dict[str, str]:
    """The text under each heading, and that before the first one under ""."""
    head, *rest = re.split(r"^(Args|Attributes|Returns|Raises):$", inspect.cleandoc(docstring), flags=re.M)
    indented = [re.match(r"\n(?:(?: .*)?\n?)*", body) for body in rest[1::2]]
    bodies = [textwrap.dedent(body[0]) if body else "" for body in indented]
    return {"": head, **dict(zip(rest[::2], bodies, strict=True))}


def described(section: str) -> dict[str, str]:
    """The entries of an Args or Attributes section."""
    found = re.findall(r"^\*{0,2}(\w+): (.*(?:\n(?:[ ].*)?)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in found}


def parameters(thing: Any) -> dict[str, inspect.Parameter]:
    """What a caller passes."""
    if isinstance(thing, property):
        return {}
    found = inspect.signature(api.function_of(thing) or thing).parameters
    return {name: parameter for name, parameter in found.items() if name not in ("self", "cls")}


@pytest.mark.parametrize(("module", "name", "thing"), PUBLIC, ids=IDS)
def test_parameters_are_described(module, name, thing):
    doc = sections((api.function_of(thing) or thing).__doc__)
    entries = described(doc.get("Args", "")) | described(doc.get("Attributes", ""))
    if name == "DoRALinear":  # it says that its arguments are those of its base class
        entries |= described(sections(pk.nn.LoRALinear.__doc__)["Args"])
    wanted = parameters(thing)
    assert set(wanted) <= set(entries), "parameters without a description"
    if inspect.isfunction(thing):
        assert set(wanted) == set(entries), "descriptions of no parameter"
    for argument, parameter in wanted.items():
        annotation = re.sub(r"Callable\[.*?\](?:, [\w.]+\])?", "", str(parameter.annotation))
        if re.search(r"\bTensor\b", annotation) and inspect.isfunction(thing):
            text = entries[argument]
            assert _SHAPES.search(text), f"{argument} has no shape: {text}"
            assert _DTYPES.search(text) or module != "functional", f"{argument} has no dtype: {text}"


@pytest.mark.parametrize(("module", "name", "thing"), PUBLIC, ids=IDS)
def test_results_and_errors_are_described(module, name, thing):
    function = api.function_of(thing) or thing
    doc = sections(function.__doc__)
    if inspect.isfunction(thing) and parameters(thing):
        result = inspect.signature(thing).return_annotation
        assert ("Returns" in doc) == (result is not None and "Iterator" not in str(result))
    if not isinstance(thing, property) and raises(function):
        assert "Raises" in doc, "it raises, and does not say what"
    if module == "functional" or (module == "nn" and inspect.isclass(thing)):
        assert re.search(r"Source: .*(arXiv|SC'11)", function.__doc__, re.S), "no source"
        assert re.search(r"=|\|\|", doc[""]), "no formula"


def raises(thing: Any) -> bool:
    """Whether a function, or the making of an object, has a `raise` or a check of its own."""
    makers = ("__init__", "_init", "__post_init__")
    functions = [thing]
    if inspect.isclass(thing):
        functions = [vars(thing)[name] for name in makers if name in vars(thing)]
    for function in functions:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except OSError:  # made by dataclass
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise):
                return True
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called.startswith(("check_", "require_", "refuse_")):
                return True
    return False


@pytest.mark.parametrize(("module", "name", "thing"), PUBLIC, ids=IDS)
def test_code_in_docstrings_is_an_example_that_runs(module, name, thing):
    """By doctest; `model` is a small PEFT model. An indented block may be a formula, but no code."""
    text = inspect.cleandoc((api.function_of(thing) or thing).__doc__)
    without = re.sub(r"^ *>>> .*(?:\n *\S.*)*", "", text, flags=re.M)
    indented = re.findall(r"(?:^ {4,}.*\n?)+", sections(without)[""], re.M)
    for block in indented:
        assert not re.search(r"\b(pk|torch|peft)\.\w+\(|\bmodel\b", block), f"not run:\n{block}"
    run_doctest(text, f"{module}.{name}")


def test_the_packages_own_example_runs():
    assert ">>> report = pk.replace_layers(model)" in (pk.__doc__ or "")
    run_doctest(pk.__doc__ or "", "peft_kernels")


def run_doctest(text: str, name: str) -> None:
    """Fail with doctest's own report."""
    if ">>>" not in text:
        return
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model = peft.get_peft_model(layers, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    names = {"pk": pk, "torch": torch, "nn": nn, "peft": peft, "model": model}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append)
    assert not report, "".join(report)
