"""The project's documents, taken apart: code in the order of the page, commands, links, names of files.

```python            runs, top to bottom, in one namespace a page; a statement followed by a comment
                     `# SomeError: message` must raise that (`…` stands for anything)
<!-- run             set-up that runs in its place on the page, and that readers do not see
code -->
<!-- own process: why -->   anywhere: the page runs in an interpreter of its own
<!-- not run: why -->   before a ```python block, which is then compiled, not run
```sh                commands, checked by `commands.py`; so are `commands` in running text
"""

import ast
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
SHELLS = ("sh", "bash")  # languages of fences with commands
_HIDDEN = re.compile(r"<!-- run\n(.*?)-->", re.S)
_NOT_RUN = re.compile(r"<!-- not run: (.*?) -->", re.S)
_ERROR = re.compile(r"# (?P<kind>[A-Z]\w*(?:Error|Warning)): (?P<message>.*)")


@dataclass(frozen=True)
class Block:
    """A piece of code of a page.

    Attributes:
        page: path from the root of the project.
        line: of the page, where the code begins, from 1.
        language: "python" or "sh"; another word of a fence, or "" for an indented block.
        code: its text.
        not_run: why it is not executed; "" where it is.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str = ""

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Step:
    """One statement of a Python block, and the error that the comment below it announces."""

    code: str
    line: int
    kind: str = ""
    message: str = ""


def pages() -> list[str]:
    """Every document for users and developers."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    found += ROOT.glob("peft_kernels/ops/*/README.md")
    return [str(path.relative_to(ROOT)) for path in sorted(found)]


def tokens(page: str) -> list[Token]:
    """The page's Markdown."""
    parser = MarkdownIt("commonmark").enable("table")
    return parser.parse((ROOT / page).read_text(encoding="utf-8"))


def blocks(page: str) -> list[Block]:
    """All code of a page, hidden set-up too, in its order."""
    found, not_run = [], ""
    for token in tokens(page):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block":
            if hidden := _HIDDEN.fullmatch(token.content.strip()):
                found.append(Block(page, line + 1, "python", hidden[1]))
            elif reason := _NOT_RUN.fullmatch(token.content.strip()):
                not_run = reason[1]
        elif token.type == "fence":
            found.append(Block(page, line + 1, token.info.strip(), token.content, not_run))
            not_run = ""
        elif token.type == "code_block":
            found.append(Block(page, line, "", token.content))
    return found


def inline(page: str) -> Iterator[Token]:
    """What is inside paragraphs, headings and tables: code spans (`code_inline`) and links (`link_open`)."""
    for token in tokens(page):
        yield from token.children or ()


def steps(block: Block) -> list[Step]:
    """The statements of a Python block; their lines are those of the page."""
    errors = _announced(block.code)
    lines = block.code.splitlines()
    found = []
    for statement in ast.parse(block.code).body:
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        decorators = getattr(statement, "decorator_list", [])
        first = min([first, *(decorator.lineno for decorator in decorators)])
        kind, message = errors.pop(last + 1, ("", ""))
        # Empty lines before it, so that a traceback shows the line of the page.
        code = "\n" * (block.line + first - 2) + "\n".join(lines[first - 1 : last])
        found.append(Step(code, block.line + first - 1, kind, message))
    if errors:
        raise ValueError(f"{block.place}: an error is announced below no statement: {errors}")
    return found


def _announced(code: str) -> dict[int, tuple[str, str]]:
    """Comments `# SomeError: message`, with the comment lines that continue them, by their line."""
    found: dict[int, tuple[str, str]] = {}
    start = previous = -1
    for token in tokenize.generate_tokens(StringIO(code).readline):
        if token.type != tokenize.COMMENT or token.line.strip() != token.string:
            continue
        line = token.start[0]
        if error := _ERROR.fullmatch(token.string):
            found[line] = error["kind"], error["message"]
            start = line
        elif start > 0 and line == previous + 1:
            kind, message = found[start]
            found[start] = kind, f"{message} {token.string.removeprefix('#').strip()}"
        else:
            start = -1
        previous = line
    return found
