import dataclasses
import json

import pytest
from peft_kernels.bench.results import SCHEMA_VERSION, read_json, write_json
from peft_kernels.bench.roofline import Roofline


def test_round_trip(tmp_path, report):
    path = tmp_path / "report.json"
    write_json(report, path)
    assert read_json(path) == report
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written left


def test_unwritable_numbers_are_refused(tmp_path, report):
    broken = dataclasses.replace(report, rooflines=[Roofline(1, float("nan"), 7.0, {})])
    with pytest.raises(ValueError, match="JSON"):
        write_json(broken, tmp_path / "report.json")


def edited(tmp_path, report, edit):
    path = tmp_path / "report.json"
    write_json(report, path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(schema_version=1), rf"schema_version must be {SCHEMA_VERSION}, got 1"),
        (lambda c: c.pop("machine"), r"report must be an object with .*machine"),
        (lambda c: c.update(unknown=1), r"report must be an object"),
        (
            lambda c: c["cases"][0].update(threads="1"),
            r"report\.cases\[0\]\.threads must be .*int.*, got '1'",
        ),
        (lambda c: c["cases"][0].update(status="fine"), r"report\.cases\[0\]\.status must be"),
        (lambda c: c["cases"][0]["gate"].update(low=None), r"report\.cases\[0\]\.gate\.low must be .*float"),
        (lambda c: c.update(interrupted=0), r"report\.interrupted must be"),
    ],
)
def test_what_does_not_follow_the_schema_is_refused(tmp_path, report, edit, message):
    with pytest.raises(ValueError, match=message):
        read_json(edited(tmp_path, report, edit))
