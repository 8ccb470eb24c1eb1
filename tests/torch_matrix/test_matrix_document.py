"""docs/compatibility.md: each line names tests, and they exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_line_names_a_test() -> None:
    lines = (ROOT / "docs" / "compatibility.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and not re.match(r"\|(---|\s*feature)", line)]
    assert len(rows) > 30
    assert [row for row in rows if "::" not in row] == []


def test_the_tests_named_exist() -> None:
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", (ROOT / "docs" / "compatibility.md").read_text())
    assert len(named) > 30
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
