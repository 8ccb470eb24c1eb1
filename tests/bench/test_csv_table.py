"""The CSV of a run: every contestant, every number in full, nothing invented."""

import csv
import dataclasses
import io
from pathlib import Path

from peft_kernels.bench.case import Case
from peft_kernels.bench.csv_table import COLUMNS, csv_text

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def rows(report):
    return list(csv.DictReader(io.StringIO(csv_text(report))))


def test_a_row_has_everything_of_case_and_contestant(report):
    ours, eager, missing = rows(report)
    assert list(eager) == list(COLUMNS)
    line = csv_text(report).splitlines()[2]
    assert line.startswith(report.created)
    assert line.endswith(
        f"{report.cases[0].name},,linear,nf4_linear,forward,3,128,64,0,nf4,float32,0.0,1,wall clock,8,100,50,"
        "25,0.5,memory,eager,1,measured,,1.0,0.9,1.1,2.0,1.8,2.2,3000.0,3.0,,40.0,6,1,0.0,2048,96,2e-07,0.2"
    )
    assert (eager["device"], eager["contestant"], eager["gflop_s"]) == (report.machine.cpu, "eager", "")
    assert (ours["contestant"], ours["gates"], ours["ms"], ours["ratio"]) == ("peft_kernels", "0", "1.0", "")
    assert (missing["status"], missing["reason"]) == ("missing", "bitsandbytes is not installed")
    assert {missing[name] for name in ("ms", "ms_low", "ratio", "rounds", "error", "tokens_per_s")} == {""}


def test_names_with_commas_quotes_and_newlines_come_back(report, result_of):
    case = Case("linear", "nf4_linear", 1, 128, 64, label='llama-3.1-8b:q,o "x"\ny')
    (row,) = rows(dataclasses.replace(report, cases=[result_of(case)]))
    assert row["label"] == case.label
    assert row["name"] == case.name


def test_numbers_are_written_in_full(report, result_of):
    (row,) = rows(dataclasses.replace(report, cases=[result_of(Case("nf4", "op", 0, 1, 1), ms=1 / 3)]))
    assert float(row["ms"]) == 1 / 3
    assert row["tokens_per_s"] == ""  # a case without tokens


def test_nothing_measured_is_a_head_alone(report):
    assert csv_text(dataclasses.replace(report, cases=[])) == ",".join(COLUMNS) + "\n"


def test_every_column_is_documented():
    section = DOCUMENT.read_text().split("\n## CSV\n")[1].split("\n## ")[0]
    for name in COLUMNS:
        assert f"`{name}`" in section, name
