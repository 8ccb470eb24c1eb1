"""Running the Python of a page, statement by statement."""

import contextlib
import io
import re
import warnings

from pages import ROOT, Block, Step, blocks, steps, tokens


def needs_own_process(page: str) -> bool:
    """Whether a page changes what cannot be changed back; it then says so: `<!-- own process: why -->`."""
    comments = (token.content for token in tokens(page) if token.type == "html_block")
    return any(comment.startswith("<!-- own process: ") for comment in comments)


def execute(page: str) -> list[str]:
    """Run all Python of a page in one namespace; the errors, "SomeError: message", that it announces."""
    names: dict[str, object] = {"__name__": "__document__"}
    raised = []
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(page):
            if block.language == "python":
                raised += [_run(step, block, names) for step in steps(block)]
    return [message for message in raised if message]


def _run(step: Step, block: Block, names: dict[str, object]) -> str:
    """Execute one statement; the error that is announced for it must come."""
    code = compile(step.code, str(ROOT / block.page), "exec")
    if block.not_run:
        return ""
    if not step.kind:
        exec(code, names)
        return ""
    raised = "nothing"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(code, names)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is compared)
        message = str(error.args[0] if isinstance(error, KeyError) else error)
        raised = f"{type(error).__name__}: {' '.join(message.split())}"
    wanted = ".*".join(map(re.escape, f"{step.kind}: {step.message}".split("…")))
    place = f"{block.page}:{step.line}"
    assert re.fullmatch(wanted, raised), f"{place} announces\n{wanted}\nbut it is\n{raised}"
    return raised
