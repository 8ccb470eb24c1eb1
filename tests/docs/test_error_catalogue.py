"""docs/errors.md has every error that a user of the package can meet, and each is as it says."""

import ast
import re

import pytest
from execution import execute
from pages import ROOT, blocks, inline

PAGE = "docs/errors.md"

# Messages that no public call leads to, by a part of them.
OPERATORS = "the contract of torch.ops.peft_kernels, which the public functions fulfil"
INTERNAL = {
    "the native library is not loaded": "core.plan is asked about a library that is there",
    "has no float64 oracle": "a benchmark family's author reads it",
    "must be .*, got .*": "part of what load_state_dict reports; that is on the page",
    **dict.fromkeys(
        (
            "absmax must be given for an NF4 weight",
            "nested_absmax, nested_code and nested_offset must be given together",
            "activation must be from 0 to",
            "residual_is_hidden must be False",
            "hidden must be [M, d]",
            "grad must be [M, N]",
            "must be given when need_",
            "du and lora_a must be given together",
            "seed must be given when dropout_p > 0",
        ),
        OPERATORS,
    ),
}

Template = tuple[str, str]  # the error's name, and a pattern of its message


def templates() -> dict[Template, str]:
    """Every error and warning that the sources raise with a message, and where."""
    found = {}
    for path in sorted((ROOT / "peft_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            if name == "warnings.warn":
                name = ast.unparse(call.args[1])
            elif not isinstance(node, ast.Raise):
                continue
            found[name, pattern(call.args[0])] = f"{path.relative_to(ROOT)}:{call.lineno}"
    return found


def pattern(message: ast.expr) -> str:
    """A regular expression for the messages that an expression can make."""
    if isinstance(message, ast.Constant):
        return re.escape(str(message.value)).replace("\\\n", " ")  # line breaks are spaces on the page
    if isinstance(message, ast.JoinedStr):
        return "".join(map(pattern, message.values))
    if isinstance(message, ast.BinOp):
        return pattern(message.left) + pattern(message.right)
    return ".*"


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """What the code of the page raises, and what it shows without code."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("errors"))
        raised = execute(PAGE)
    shown = [line for block in blocks(PAGE) if block.language == "text" for line in block.code.splitlines()]
    return raised + shown


def test_every_message_is_in_the_catalogue(catalogue):
    missing = {
        f"{place}: {name}: {message}"
        for (name, message), place in templates().items()
        if not any(re.fullmatch(f"{name}: {message}", entry) for entry in catalogue)
    }
    excused = {line for line in missing for part in INTERNAL if escaped(part) in line}
    assert missing <= excused, f"no entry in {PAGE} for\n" + "\n".join(sorted(missing - excused))
    assert len(INTERNAL) == len(excused), "an excuse that nothing needs, or one that excuses too much"


def escaped(part: str) -> str:
    """A piece of a message as `pattern` has it, .* where a value stands."""
    return ".*".join(map(re.escape, part.split(".*")))


def test_the_page_is_of_a_size_to_be_a_catalogue(catalogue):
    assert len(catalogue) > 90
    assert all(re.match(r"[A-Z]\w+(Error|Warning): ", entry) for entry in catalogue)


# Texts in the same places of the sources that are no reasons.
NO_REASONS = {"…: …"}


def reasons() -> dict[str, str]:
    """Every reason for leaving a layer alone, … where a value stands, and where it is given.

    It is returned, assigned to `reason`, or handed to Unfit, Status, leaves_alone or run_stock.
    """
    found = {}
    files = [*(ROOT / "peft_kernels" / "surgery").glob("*.py"), ROOT / "peft_kernels/nn/plain_linear.py"]
    for path in (*files, ROOT / "peft_kernels/core/transforms.py"):
        if path.name == "report.py":
            continue  # it shows reasons and has none
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for text in texts(node):
                if " " in text:
                    found[text] = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
    return found


def texts(node: ast.AST) -> list[str]:
    """The strings that a statement or call gives as a reason."""
    given: list[ast.expr] = []
    is_reason = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason"
    if isinstance(node, (ast.Assign, ast.Return)) and (is_reason or isinstance(node, ast.Return)):
        given = [node.value] if node.value else []
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("Unfit", "Status", "leaves_alone"):
        given = node.args
    found = []
    while given:
        expression = given.pop()
        if isinstance(expression, ast.BoolOp):
            given += expression.values
        elif isinstance(expression, ast.IfExp):
            given += [expression.body, expression.orelse]
        elif isinstance(expression, ast.Constant) and isinstance(expression.value, str):
            found.append(expression.value)
        elif isinstance(expression, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in expression.values]
            found.append("".join(map(str, parts)))
    return found


def test_every_reason_in_a_report_is_listed():
    listed = {token.content for token in inline(PAGE) if token.type == "code_inline"}
    missing = {f"{place}: {text}" for text, place in reasons().items() if text not in listed | NO_REASONS}
    assert not missing, f"reasons that {PAGE} does not have:\n" + "\n".join(sorted(missing))
    assert len(reasons()) > 50
