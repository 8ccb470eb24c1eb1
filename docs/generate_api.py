"""Write `docs/api/`, the API reference, from the docstrings and signatures of the package: `make api`.

    python docs/generate_api.py    # a test fails while the files are not what this would write

What is in it follows from the package: `__all__` of each public module, the classes that public calls return,
the operators in torch's registry, and the parsers of the command lines. It says nothing about the machine it
is written on.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import runpy
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import peft_kernels
from peft_kernels.core.backend import op_names

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "api"
MODULES = ("peft_kernels", "functional", "nn", "optim", "io")
PROGRAMS = {
    "peft_kernels": "python -m peft_kernels",
    "peft_kernels.bench": "python -m peft_kernels.bench",
    "peft_kernels.bench.show": "python -m peft_kernels.bench.show",
    "examples/demo.py": "python examples/demo.py",
    "examples/demo_methods.py": "python examples/demo_methods.py",
}
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$", re.M)
_TITLES = {"Args": "Arguments", "Attributes": "Attributes", "Returns": "Returns", "Raises": "Raises"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public function or class.

    Attributes:
        name: as users write it after the module's name.
        object: itself.
        members: of a class, its public methods and properties by name, those of torch and Python left out.
    """

    name: str
    object: Any
    members: dict[str, Any]


class _ParserFound(Exception):
    """How a program's parser gets out of it."""


def module_of(name: str) -> ModuleType:
    """A public module by its short name."""
    return peft_kernels if name == "peft_kernels" else importlib.import_module(f"peft_kernels.{name}")


def entries(module: ModuleType) -> list[Entry]:
    """What a module offers, in the order of its names, then the classes that its calls return."""
    names: list[str] = getattr(module, "__all__", None) or _own_names(module)
    offered = {name: getattr(module, name) for name in sorted(names, key=str.lower)}
    found = {n: thing for n, thing in offered.items() if inspect.isroutine(thing) or inspect.isclass(thing)}
    for thing in list(found.values()):
        found |= {each.__name__: each for each in _returned(thing) if each not in found.values()}
    if module is not peft_kernels:
        elsewhere = {id(entry.object) for entry in entries(peft_kernels)}
        found = {name: thing for name, thing in found.items() if id(thing) not in elsewhere}
    return [Entry(name, thing, _members(thing)) for name, thing in found.items()]


def _own_names(module: ModuleType) -> list[str]:
    own = vars(module).items()
    return [n for n, thing in own if n[0] != "_" and getattr(thing, "__module__", "") == module.__name__]


def _returned(thing: Any) -> Iterator[type]:
    """Dataclasses of this package among the results of a call, their fields and the fields of those."""
    hints = typing.get_type_hints(thing if inspect.isclass(thing) else inspect.unwrap(thing))
    for hint in hints.values() if inspect.isclass(thing) else [hints.get("return")]:
        for each in (hint, *_parts(hint)):
            if dataclasses.is_dataclass(each) and isinstance(each, type) and each is not thing:
                yield each
                yield from _returned(each)


def _parts(hint: Any) -> Iterator[Any]:
    for part in typing.get_args(hint):
        yield part
        yield from _parts(part)


def _members(thing: Any) -> dict[str, Any]:
    """Public methods and properties that this package defines and documents, in the order of the sources."""
    found: dict[str, Any] = {}
    for base in reversed(thing.__mro__ if inspect.isclass(thing) else ()):
        for name, member in vars(base).items():
            function = function_of(member)
            if (
                name[0] != "_"
                and name != "extra_repr"
                and function
                and function.__module__.startswith("peft_kernels")
            ):
                found[name] = member
    return found


def function_of(member: Any) -> Callable[..., Any] | None:
    """The function behind a method, class method or property; None for anything else."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return function if inspect.isfunction(function) else None


def signature(name: str, thing: Any) -> str:
    """`name(parameters) -> result`, one parameter a line where it is long; types by their last names."""
    if isinstance(thing, property):
        return f"{name}: {_type(typing.get_type_hints(thing.fget).get('return'))}"
    found = inspect.signature(thing)
    parameters = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    words, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        star = {"VAR_KEYWORD": "**", "VAR_POSITIONAL": "*"}.get(parameter.kind.name, "")
        keyword_only |= star == "*"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        words.append(f"{star}{parameter.name}: {_type(parameter.annotation)}{default}")
    result = "" if inspect.isclass(thing) else f" -> {_type(found.return_annotation)}"
    line = f"{name}({', '.join(words)}){result}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){result}"])


def _type(annotation: Any) -> str:
    if annotation in (None, type(None)):
        return "None"
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\btorch\.nn\.modules\.\w+\.", "nn.", text)
    return re.sub(r"\b(?:peft_kernels|collections|typing|bitsandbytes|pathlib)\.(?:\w+\.)*", "", text)


def markdown(docstring: str) -> str:
    """A docstring as Markdown: its sections as lists, examples fenced."""
    head, *sections = _SECTION.split(inspect.cleandoc(docstring))
    parts = [_prose(head)]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        lines = body.strip("\n").split("\n")
        size = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
        section, rest = "\n".join(lines[:size]), "\n".join(lines[size:])
        parts += [f"**{_TITLES[title]}**", _items(title, section), _prose(rest)]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())


def _prose(text: str) -> str:
    def fence(match: re.Match[str]) -> str:
        return f"```pycon\n{textwrap.dedent(match[0])}```\n"

    text = re.sub(r"^( *)>>> .*\n(?:\1\S.*\n?)*", fence, text + "\n", flags=re.M).strip("\n")
    return _escaped(text)


def _escaped(text: str) -> str:
    """Asterisks of formulas in running text, which Markdown would take for emphasis."""
    paragraphs = re.split(r"(```.*?```|^(?: {4}.*\n?)+|`[^`]*`)", text, flags=re.S | re.M)
    return "".join(part if i % 2 else part.replace("*", "\\*") for i, part in enumerate(paragraphs))


def _items(title: str, section: str) -> str:
    text = _escaped(textwrap.dedent(section))
    if title == "Returns":
        return text
    found = re.findall(r"^(\*{0,2}\w+): (.*(?:\n(?: .*)?)*)", text, re.M)
    return "\n".join(f"- `{name}`: {' '.join(body.split())}" for name, body in found)


def page(name: str) -> str:
    """The reference of one module."""
    module = module_of(name)
    title = "peft_kernels" if name == "peft_kernels" else f"peft_kernels.{name}"
    parts = [f"# {title}", _NOTE, markdown(module.__doc__ or "")]
    for entry in entries(module):
        parts += [f"## {entry.name}", _described(entry.name, entry.object)]
        for member, thing in entry.members.items():
            parts += [f"### {entry.name}.{member}", _described(member, thing)]
    return _finished(parts)


def _described(name: str, thing: Any) -> str:
    function: Any = function_of(thing) or thing
    kind = "class " if inspect.isclass(thing) else "@classmethod\n" if isinstance(thing, classmethod) else ""
    shown = thing if isinstance(thing, property) else function
    return f"```py\n{kind}{signature(name, shown)}\n```\n\n{markdown(function.__doc__ or '')}"


def operators_page() -> str:
    """The operators that torch's dispatcher knows."""
    parts = ["# torch.ops.peft_kernels", _NOTE, _OPERATORS]
    for op_name in op_names():
        family, reference = _reference(op_name)
        schema = str(getattr(torch.ops.peft_kernels, op_name).default._schema)
        schema = schema.replace("(", "(\n    ", 1).replace(", ", ",\n    ").replace(") -> ", "\n) -> ", 1)
        head, arrow, result = schema.partition("\n) -> ")
        schema = head + arrow + result.replace(",\n    ", ", ")
        links = ", ".join(
            f"[`ops/{family}/{file}`](../../peft_kernels/ops/{family}/{file})"
            for file in ("README.md", "schema.py")
        )
        parts += [
            f"## {op_name}",
            f"```text\n{schema}\n```",
            markdown(reference.__doc__ or ""),
            f"See {links}.",
        ]
    return _finished(parts)


def _reference(op_name: str) -> tuple[str, Callable[..., Any]]:
    """The family of an operator, and its reference."""
    for file in sorted((ROOT / "peft_kernels" / "ops").glob("*/reference.py")):
        module = importlib.import_module(f"peft_kernels.ops.{file.parent.name}.reference")
        function = vars(module).get(op_name)
        if function is not None and function.__module__ == module.__name__:
            return file.parent.name, function
    raise LookupError(f"operator {op_name} has no function of its name in peft_kernels/ops/*/reference.py")


def commands_page() -> str:
    """The options of every program."""
    parts = ["# Command lines", _NOTE]
    for program, command in PROGRAMS.items():
        parser = parser_of(program)
        rows = ["| argument | meaning |", "|---|---|"]
        rows += [_row(parser, action) for action in parser._actions if action.dest != "help"]
        notes = [group.description or "" for group in parser._action_groups] + [(parser.epilog or "").strip()]
        parts += [f"## {command}", parser.description or "", "\n".join(rows), *notes]
    return _finished(parts)


def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser of a module or a file, taken from it when it comes to use it."""
    found: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, *_: object) -> None:
        found.append(parser)
        raise _ParserFound

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", keep),
        mock.patch.object(sys, "argv", [program]),
        mock.patch.object(
            sys, "path", [str((ROOT / program).parent), *sys.path]
        ),  # as Python does for a file
    ):
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                module = importlib.import_module(program)
                main = module if hasattr(module, "main") else importlib.import_module(f"{program}.__main__")
                main.main()
        except _ParserFound:
            return found[0]
    raise LookupError(f"{program} has no argparse.ArgumentParser")


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    metavar = formatter._format_args(action, action.dest.upper())
    names = [f"{option} {metavar}".strip() for option in action.option_strings] or [metavar]
    help_text = formatter._expand_help(action).strip() if action.help else ""
    return f"| `{', '.join(names)}` | {help_text} |"


def index_page(texts: dict[str, str]) -> str:
    """What there is, a line for each."""
    parts = ["# API reference", _NOTE]
    for name in MODULES:
        rows = []
        for entry in entries(module_of(name)):
            first = inspect.cleandoc(entry.object.__doc__).split("\n\n")[0]
            rows.append(f"- [`{entry.name}`]({name}.md#{entry.name.lower()}): {' '.join(first.split())}")
        title = "peft_kernels" if name == "peft_kernels" else f"peft_kernels.{name}"
        parts += [f"## {title}", "\n".join(rows)]
    ops = ", ".join(f"[`{op_name}`](operators.md#{op_name})" for op_name in op_names())
    parts += ["## torch.ops.peft_kernels", ops, "## Command lines"]
    anchors = {c: re.sub(r"[^\w\- ]", "", c).replace(" ", "-") for c in PROGRAMS.values()}  # as GitHub's
    parts.append("\n".join(f"- [`{c}`](command_lines.md#{anchor})" for c, anchor in anchors.items()))
    return _finished(parts)


def generate() -> dict[str, str]:
    """The files of the reference, by name."""
    texts = {f"{name}.md": page(name) for name in MODULES}
    texts |= {"operators.md": operators_page(), "command_lines.md": commands_page()}
    return {"README.md": index_page(texts), **texts}


def _finished(parts: list[str]) -> str:
    text = "\n\n".join(part for part in parts if part)
    return re.sub(r"[ \t]+$", "", text, flags=re.M) + "\n"


_NOTE = "<!-- Written by `make api` from the sources; change them, not this file. -->"
_OPERATORS = """The operators behind `peft_kernels.functional`, for those who write compilers, exporters or
backends: all others call the functions, which flatten, check, apply autocast and differentiate. Each operator
has a fake kernel and passes `torch.library.opcheck`. It has overloads of one schema: `default` (what the
dispatcher has for the device), `reference` (plain PyTorch), `triton` and `cuda`. Gradients are operators of
their own. The shapes and dtypes of the arguments are in the family's `schema.py`, beside each field."""


def main() -> int:
    """Write the files; remove those that are no longer wanted."""
    FOLDER.mkdir(exist_ok=True)
    texts = generate()
    for path in FOLDER.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"written: {len(texts)} files in {FOLDER.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
