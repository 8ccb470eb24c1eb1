"""Every document is true of this tree: its code runs, its commands parse, its links and files exist."""

import ast
import fnmatch
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import commands
import pytest
from execution import execute, needs_own_process
from pages import ROOT, SHELLS, blocks, inline, pages, tokens

# peft 0.21 asks transformers 5 for a property by its former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Blocks of code that are shown and not run, by page. A new one has to be argued for here as well.
NOT_RUN = {"docs/performance.md": 1}
# What programs write, builds leave or CUDA has. (Data, .json, .png, …, are not looked for.)
NOT_IN_THE_TREE = {
    *("bench-cuda.md", "bench-output/", "demo-output/", "build/gpuless/"),
    *("_native_build_failure.txt", "cuda_occupancy.h"),
}
LANGUAGES = ("python", *SHELLS, "text", "json", "yaml", "toml", "cpp", "")
_FOLDERS = ("csrc", "peft_kernels", "python_bindings", "tests", "bench", "docs", "examples", ".ci", ".github")
_FILE = re.compile(r"[\w.*<>{}…/-]+\.(?:py|md|h|cpp|cu|cuh|sh|toml|txt|yml)|[\w.*<>-]+/[\w.*<>/-]*/")

# errors.md is run by test_error_catalogue.py
with_code = [page for page in pages() if page != "docs/errors.md"]
with_code = [page for page in with_code if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", with_code)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not needs_own_process(page):
        execute(page)
        return
    code = f"import sys; sys.path[:0] = {sys.path}; from execution import execute; execute({page!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_what_is_not_run_is_counted():
    found = [block for page in pages() for block in blocks(page) if block.not_run]
    assert all(len(block.not_run.split()) > 3 for block in found), "the reason is a sentence"
    assert {page: sum(block.page == page for block in found) for page in {b.page for b in found}} == NOT_RUN


@pytest.mark.parametrize("page", pages())
def test_fences_have_a_language_and_python_is_fenced(page):
    for block in blocks(page):
        generated = ("py", "pycon") if page.startswith("docs/api/") else ()  # signatures, and doctests
        assert block.language in (*LANGUAGES, *generated), block.place
        assert block.language or not is_python(block.code), (
            f"{block.place}: Python, which is not run; fence it"
        )


def is_python(code: str) -> bool:
    """Whether an indented block, which may be a formula or a listing, calls something of ours or of torch."""
    try:
        names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    except SyntaxError:
        return False
    return not names.isdisjoint({"model", "peft", "pk", "torch"})


@pytest.mark.parametrize("page", [page for page in pages() if not page.startswith("docs/api/")])
def test_commands_can_be_given(page):
    assert commands.unknown_programs(page) == []
    wrong = {command: error for command in commands.commands(page) if (error := commands.check(command))}
    assert not wrong


def test_commands_that_are_wrong_are_noticed():
    wrong = {
        "make no-such-target": "no make target no-such-target",
        "python -m peft_kernels.bench --suite enormous": "invalid choice: 'enormous'",
        "python -m peft_kernels.bench --filter 'no-such-case'": "matches --filter no-such-case",
        "python -m peft_kernels.bench --no-such-option": "unrecognized arguments: --no-such-option",
        "python -m peft_kernels.no_such_module": "no module peft_kernels.no_such_module",
        "python examples/demo.py --quickly": "unrecognized arguments: --quickly",
        "python examples/no_such_file.py": "no file examples/no_such_file.py",
        "python -m gpuless.decode_variants --fast": "takes no arguments",
        "make lint no-such-target": "no make target no-such-target",
        "pytest no_such_folder": "no file no_such_folder",
        "pytest bench --no-such-option=1": "pytest has no option --no-such-option",
        "pip install 'peft_kernels[no_such_extra]'": "no extra no_such_extra",
        "make test && bash .ci/no_such_file": "no file .ci/no_such_file",
    }
    for command, error in wrong.items():
        assert error in commands.check(command), command


@pytest.mark.parametrize("arguments", [["peft_kernels.bench", "--list"], ["peft_kernels", "--help"]])
def test_cheap_commands_run(arguments):
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    for token in inline(page):
        target = str(token.attrs.get("href", "")) if token.type == "link_open" else ""
        if not target or re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: link to {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page}: link to {target}"


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {"README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = [str(token.attrs.get("href", "")) for token in inline(page) if token.type == "link_open"]
        files = [(ROOT / page).parent / link.partition("#")[0] for link in links if ":" not in link]
        named = [str(file.resolve().relative_to(ROOT)) for file in files if file.suffix == ".md"]
        named += [token.content for token in inline(page) if token.type == "code_inline"]
        new |= {name for name in named if name in pages() and name not in reached}
    assert set(pages()) - reached == set()


@cache
def anchors(page: str) -> set[str]:
    """The names that GitHub gives headings."""
    found, heading = set(), False
    for token in tokens(page):
        if heading:
            text = "".join(child.content for child in token.children or ())
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
        heading = token.type == "heading_open"
    return found


@pytest.mark.parametrize("page", pages())
def test_files_that_are_named_exist(page):
    """A file goes by its path from the root, or by as much of its end as the page needs."""
    for token in inline(page):
        if token.type == "code_inline" and _FILE.fullmatch(token.content):
            assert token.content in NOT_IN_THE_TREE or exists(token.content), f"{page}: `{token.content}`"


def test_only_what_is_not_in_the_tree_is_excused():
    assert not {name for name in NOT_IN_THE_TREE if exists(name)}


def exists(name: str) -> bool:
    """Whether a file or folder of the tree ends in `name`, where <family> and * stand for anything."""
    pattern = re.sub(r"<\w+>", "*", name).rstrip("/")
    return any(
        fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*/{pattern}") for path in tree()
    )


@cache
def tree() -> list[str]:
    """Every file and folder that belongs to the project."""
    found = [path.name for path in ROOT.iterdir() if path.is_file()] + list(_FOLDERS)
    for folder in _FOLDERS:
        for base, folders, files in os.walk(ROOT / folder):
            folders[:] = [name for name in folders if name != "__pycache__"]
            found += [str(Path(base, name).relative_to(ROOT)) for name in (*folders, *files)]
    return found
