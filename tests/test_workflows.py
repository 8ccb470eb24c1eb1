"""What .github/workflows would run exists: make targets, scripts, and the options of our command lines."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from peft_kernels.bench.options import parser

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(workflow):
    """Every line of every `run:`, continued lines joined."""
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        for step in job["steps"]:
            yield from step.get("run", "").replace("\\\n", " ").splitlines()


def test_there_are_workflows():
    assert [path.name for path in WORKFLOWS] == ["benchmarks.yml", "ci.yml"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_commands_exist(workflow):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    checked = 0
    for line in commands(workflow):
        words = shlex.split(line.split("||")[0])
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets
        elif "peft_kernels.bench" in words:
            parser().parse_args(words[words.index("peft_kernels.bench") + 1 :])
        elif words[:1] == ["bash"]:
            assert (ROOT / words[1]).is_file()
        else:
            continue
        checked += 1
    assert checked


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_end_and_may_write_nothing(workflow):
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 60 for job in content["jobs"].values())
