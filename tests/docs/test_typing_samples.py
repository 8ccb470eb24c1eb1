"""User code under mypy --strict: right code passes with the types that it says, wrong code is refused."""

import re
import runpy
import subprocess
import sys

import pytest
from pages import ROOT

SAMPLES = ROOT / "tests" / "typing_samples"
REFUSED = SAMPLES / "refused.py"
ACCEPTED = sorted(path for path in SAMPLES.glob("*.py") if path != REFUSED)


def test_samples_have_the_types_that_they_say():
    """One run for all of them, with the cache of `make types`: mypy takes a while to read torch."""
    command = [sys.executable, "-m", "mypy", *map(str, (*ACCEPTED, REFUSED))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    output = done.stdout
    found = re.findall(r"^(\S+?):(\d+): error: .*\[([\w-]+)\]$", output, re.M)
    assert found, done.stderr or output
    lines = enumerate(REFUSED.read_text(encoding="utf-8").splitlines(), start=1)
    marks = [(number, re.search(r"# error: (\S+)", line)) for number, line in lines]
    wanted = {(REFUSED.name, str(number), mark[1]) for number, mark in marks if mark}
    assert {(path.rpartition("/")[2], line, code) for path, line, code in found} == wanted, output


@pytest.mark.parametrize("sample", ACCEPTED, ids=lambda path: path.stem)
def test_samples_run(sample):
    runpy.run_path(str(sample), run_name="__sample__")


def test_samples_use_every_public_name():
    import peft_kernels as pk

    text = "".join(path.read_text(encoding="utf-8") for path in ACCEPTED)
    modules = {"functional": pk.functional, "nn": pk.nn, "io": pk.io}
    names = {f"pk.{name}" for name in pk.__all__}
    names |= {f"pk.{short}.{name}" for short, module in modules.items() for name in module.__all__}
    names.add("pk.optim.loraplus_param_groups")
    assert {name for name in names if not re.search(rf"{re.escape(name)}\b", text)} == set()
