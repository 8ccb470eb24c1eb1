"""Tables as plain text, for `print`, log files and notebooks."""

import io
import shutil

from rich.console import Console, RenderableType


def as_text(renderable: RenderableType) -> str:
    """What rich makes of a value, without colour codes, as it may end up in a file.

    Outside a terminal 120 columns read well.
    """
    width = shutil.get_terminal_size(fallback=(120, 24)).columns
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
