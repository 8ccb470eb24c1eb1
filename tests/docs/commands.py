"""Commands in documents: the make target is there, the module takes the options, the file exists."""

import argparse
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from pathlib import Path
from unittest import mock

from pages import ROOT, SHELLS, blocks, inline

# Programs of others, in commands whose arguments mean nothing to us.
OTHERS = {"apt-get", "cd", "cmake", "docker", "export", "gh", "git", "nvidia-smi", "source", "torchrun", "uv"}
OURS = {"bash", "make", "pip", "pytest", "python"}


class _ParsedError(Exception):
    """The arguments were understood; the program itself is not wanted."""


def commands(page: str) -> list[str]:
    """Every command of a page: in ```sh blocks, in indented ones, and between backticks."""
    found = []
    for block in blocks(page):
        if block.language in ("", *SHELLS):
            lines = block.code.replace("\\\n", " ").splitlines()
            found += [line for line in lines if block.language in SHELLS or _is_ours(line)]
    found += [token.content for token in inline(page) if token.type == "code_inline"]
    return [command for command in found if _is_ours(command) or program(command) in OTHERS]


def unknown_programs(page: str) -> list[str]:
    """First words of lines in ```sh blocks that are no program we know."""
    lines = [
        line
        for block in blocks(page)
        if block.language in SHELLS
        for line in block.code.replace("\\\n", " ").splitlines()
    ]
    known = OURS | OTHERS | {""}
    return [line for line in lines if program(line) not in known]


def program(command: str) -> str:
    """The program that a command line starts, without its folder, settings before it and a comment."""
    words = _words(command)
    return Path(words[0]).name if words else ""


def check(command: str) -> str:
    """What is wrong with a command; "" if nothing is."""
    parts = re.split(r"\s*(?:&&|;|\|\|?)\s+", re.sub(r"\s#.*", "", command))
    return "; ".join(filter(None, map(_check, parts)))


def _check(command: str) -> str:
    words = _words(command)
    if not words:
        return ""
    name, *arguments = words
    name = Path(name).name
    if name == "make":
        targets = _make_targets()
        return " ".join(
            f"no make target {word}" for word in arguments if "=" not in word and word not in targets
        )
    if name == "pip":
        return _check_extras(arguments)
    if name == "bash":
        return "" if (ROOT / arguments[0]).is_file() else f"no file {arguments[0]}"
    if name == "pytest":
        return _check_pytest(arguments)
    if name == "python":
        return _check_python(arguments)
    return ""


def _check_python(arguments: list[str]) -> str:
    if arguments[0] == "-m":
        module = arguments[1]
        if module == "pytest":
            return _check_pytest(arguments[2:])
        if module == "pip":
            return _check_extras(arguments[2:])
        if not module.startswith(("peft_kernels", "gpuless")):
            return ""
        if importlib.util.find_spec(module) is None:
            return f"no module {module}"
        return _parses(module, arguments[2:])
    if arguments[0] == "-c":
        compile(arguments[1], "a command", "exec")
        return ""
    path = ROOT / arguments[0]
    return _parses(path, arguments[1:]) if path.is_file() else f"no file {arguments[0]}"


def _parses(program: str | Path, arguments: list[str]) -> str:
    """Run a program up to where it has understood its arguments."""
    spec = importlib.util.find_spec(program) if isinstance(program, str) else None
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{program}.__main__")
    source = Path(spec.origin if spec is not None and spec.origin else program).read_text(encoding="utf-8")
    if "parse_args(" not in source:
        return f"{program} takes no arguments, got {arguments}" if arguments else ""
    placeholder = any(re.fullmatch("[A-Z]{2,}", word) for word in arguments)
    if program == "peft_kernels.bench" and "--compare" not in arguments and not placeholder:
        arguments = [*arguments, "--list"]  # which tells whether the options go together and select a case
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *rest: object) -> argparse.Namespace:
        parsed = parse(parser, *rest)  # type: ignore[arg-type]
        if getattr(parsed, "list", False):
            return parsed
        raise _ParsedError

    def fail(parser: argparse.ArgumentParser, message: str) -> None:
        raise ValueError(message)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only))
        stack.enter_context(mock.patch.object(argparse.ArgumentParser, "error", fail))
        stack.enter_context(mock.patch.object(sys, "argv", [str(program), *arguments]))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)  # of runpy: the module has been imported before
        try:
            if isinstance(program, Path):
                runpy.run_path(str(program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except _ParsedError:
            return ""
        except ValueError as error:
            return str(error)
        except SystemExit as listed:
            return "" if listed.code == 0 else f"exit status {listed.code}"
    return f"{program} did not look at its arguments"


def _check_pytest(arguments: list[str]) -> str:
    """Paths exist, and options are among those of pytest and its plugins here."""
    import pytest

    config = pytest.Config.fromdictargs({}, [])
    options = {
        name for group in config._parser._groups for option in group.options for name in option.names()
    }
    options |= {name for option in config._parser._anonymous.options for name in option.names()}
    wrong, skip = [], False
    for word in arguments:
        if skip:
            skip = False
        elif word.startswith("-"):
            option = word.split("=")[0]
            skip = "=" not in word and option not in ("-x", "-q", "-v", "-s")
            bench = re.findall(r'"(--bench-\w+)"', (ROOT / "bench/conftest.py").read_text(encoding="utf-8"))
            if option not in options | set(bench) and not option.startswith("--benchmark"):
                wrong.append(f"pytest has no option {option}")
        elif not (ROOT / word.split("::")[0]).exists():
            wrong.append(f"no file {word}")
    return "; ".join(wrong)


def _check_extras(arguments: list[str]) -> str:
    """The extras of this package are those of pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = re.findall(r"(?:peft_kernels|\.)\[([\w,]+)\]", " ".join(arguments))
    known = extras["optional-dependencies"]
    return " ".join(f"no extra {extra}" for each in wanted for extra in each.split(",") if extra not in known)


def _make_targets() -> set[str]:
    return set(re.findall(r"^([\w/.-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def _words(command: str) -> list[str]:
    command = command.strip().removeprefix("$ ")
    try:
        words = shlex.split(command, comments=True)
    except ValueError:  # an apostrophe of running text
        return []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words[1:] if words[:1] == ["nice"] else words


def _is_ours(text: str) -> bool:
    """Whether a piece of text is a command of ours and not one word, or code."""
    words = _words(text)
    if len(words) < 2 or "…" in text:
        return False
    name = Path(words[0]).name
    return name in OURS and (name != "python" or words[1] in ("-m", "-c") or words[1].endswith(".py"))
