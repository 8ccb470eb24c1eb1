import dataclasses
import io
import math

import pytest
from peft_kernels.bench.case import NO_DROPOUT, OURS_LORA, PLAIN_SCALES
from peft_kernels.bench.limits import Line, judge_limits
from peft_kernels.bench.registry import select
from peft_kernels.bench.report import limits_table
from peft_kernels.bench.results import ContestantResult
from peft_kernels.bench.suites import LIMITS, LIMITS_SHAPES, METHODS
from rich.console import Console

FIRST = LIMITS[0]  # forward float32 M=1
(QLORA,) = (row for row in LIMITS if row.title == "QLoRA forward+backward M=64")
(DROPOUT,) = (row for row in LIMITS if row.title == "QLoRA with dropout M=64")


def line_of(lines, against="", title=""):
    (line,) = (line for line in lines if line.against == against and title in line.title)
    return line


def test_the_figures_are_those_of_the_issue():
    figures = {row.title: row.figures for row in LIMITS}
    assert figures["forward float32 M=1"]["bitsandbytes"] == (30, 50)
    assert figures["forward float32 M=1"]["bitsandbytes-tuned"] == (15, 25)
    assert figures["forward float32 M=1024"]["dense"] == (0.97, 1.05)
    assert figures["forward bfloat16 M=256"] == {
        "bitsandbytes": (4, 4.5), "dense": (3.5, 4), "bitsandbytes-repacked": (None, None)
    }  # fmt: skip
    assert [figures[f"dx float32 M={m}"]["bitsandbytes"] for m in (1, 64, 512)] == [
        (12, 20),
        (3.5, 4.5),
        (1.3, 1.5),
    ]
    assert [figures[f"QLoRA forward+backward M={m}"]["peft"] for m in (1, 64, 512)] == [
        (12, 20),
        (3.5, 5),
        (2, 2.3),
    ]
    assert QLORA.figures[PLAIN_SCALES] == (0.05, 0.02)
    assert DROPOUT.figures == {NO_DROPOUT: (0.03, None)}
    assert len(LIMITS) == 15


def test_the_figures_of_the_methods_are_those_of_the_issue():
    figures = {row.title: {name: figure for name, (figure, _) in row.figures.items()} for row in METHODS}
    assert figures["dora_norm"] == {"peft": 25, "eager": 1.3}
    assert figures["DoRA NF4 forward+backward M=64"] == {"peft": 8}
    assert figures["DoRA NF4 forward+backward M=512"] == {"peft": 2.7, OURS_LORA: 0.12}
    assert figures["DoRA NF4 evaluation M=1"] == {OURS_LORA: 0.05}
    assert figures["IA3 NF4 outputs forward+backward M=512"] == {"peft": 2}
    assert figures["IA3 dense scale alone M=4096"] == {"eager": 2}
    assert figures["bottleneck adapter forward M=512"] == {"eager": 2.5, "compile": 2.5}
    assert figures["bottleneck adapter forward+backward M=512"] == {"eager": 2, "compile": 2}
    assert all(case in select("methods") for row in METHODS for case in row.cases)


def test_methods_are_judged_without_the_sizes_of_limits(result_of, report_of):
    row = next(row for row in METHODS if OURS_LORA in row.figures and "peft" in row.figures)
    results = [result_of(row.cases[0], threads, peft=3.0, ours_lora=0.9) for threads in (1, 2)]
    lines = judge_limits(report_of("methods", results))
    assert [(line.against, line.reached) for line in lines] == [("peft", "at least"), (OURS_LORA, "at least")]
    assert line_of(lines, OURS_LORA).value == pytest.approx(1 / 0.9 - 1)


def test_a_figure_is_the_geometric_mean_over_shapes_and_threads(result_of, report_of):
    ratios = [10.0, 20.0, 40.0, 80.0, 160.0, 320.0]
    places = [(case, threads) for case in FIRST.cases for threads in (1, 2)]
    results = [
        result_of(case, threads, bitsandbytes=ratio, dense=ratio / 10)
        for (case, threads), ratio in zip(places, ratios, strict=True)
    ]
    lines = judge_limits(report_of("limits", results))
    stock = line_of(lines, "bitsandbytes")
    assert stock.value == pytest.approx(math.prod(ratios) ** (1 / 6))
    assert stock.worst == pytest.approx(10.0)
    assert (stock.results, stock.wanted) == (6, 6)
    assert stock.reached == "reach for"  # 56.6 of 50
    assert line_of(lines, "dense").reached == "reach for"
    assert [line.against for line in lines][:2] == ["bitsandbytes", "dense"]


@pytest.mark.parametrize(
    ("ratio", "reached"), [(50.1, "reach for"), (49.9, "at least"), (30.1, "at least"), (29.9, "no")]
)
def test_which_figure_is_reached(result_of, report_of, ratio, reached):
    results = [result_of(case, bitsandbytes=ratio) for case in FIRST.cases]
    assert line_of(judge_limits(report_of("limits", results)), "bitsandbytes").reached == reached


@pytest.mark.parametrize(
    ("more", "reached"),
    [(-0.01, "reach for"), (0.019, "reach for"), (0.021, "at least"), (0.049, "at least"), (0.051, "no")],
)
def test_a_part_of_ours_is_rated_by_the_time_it_adds(result_of, report_of, more, reached):
    results = [result_of(case, ours_plain_scales=1 / (1 + more)) for case in QLORA.cases]
    line = line_of(judge_limits(report_of("limits", results)), PLAIN_SCALES)
    assert line.unit == "more time"
    assert line.value == line.worst == pytest.approx(more)
    assert line.reached == reached


def test_the_worst_of_a_cost_is_the_largest(result_of, report_of):
    costs = (0.0, 0.1, 0.02)
    results = [
        result_of(case, ours_no_dropout=1 / (1 + cost))
        for case, cost in zip(DROPOUT.cases, costs, strict=True)
    ]
    line = line_of(judge_limits(report_of("limits", results)), NO_DROPOUT)
    assert line.worst == pytest.approx(0.1)
    assert line.value == pytest.approx((1.0 * 1.1 * 1.02) ** (1 / 3) - 1)
    assert line.reached == "no"  # 3.9 % of 3 %


def test_missing_results_leave_a_figure_open(result_of, report_of):
    whole = [result_of(case, threads, bitsandbytes=60.0) for case in FIRST.cases for threads in (1, 2)]
    assert line_of(judge_limits(report_of("limits", whole)), "bitsandbytes").reached == "reach for"
    part = line_of(judge_limits(report_of("limits", whole[:5])), "bitsandbytes")
    assert (part.value, part.results, part.wanted, part.reached) == (pytest.approx(60.0), 5, 6, "incomplete")
    noisy = [*whole[:5], result_of(whole[5].case, whole[5].threads, bitsandbytes=None)]
    assert line_of(judge_limits(report_of("limits", noisy)), "bitsandbytes").reached == "incomplete"
    none = [result_of(case, bitsandbytes=None) for case in FIRST.cases]
    line = line_of(judge_limits(report_of("limits", none)), "bitsandbytes")
    assert (line.value, line.worst, line.reached) == (None, None, "incomplete")


def test_a_baseline_without_figures_is_shown_all_the_same(result_of, report_of):
    results = [result_of(case, bitsandbytes_repacked=0.7, eager=90.0) for case in FIRST.cases]
    lines = judge_limits(report_of("limits", results))
    for name, ratio in (("bitsandbytes-repacked", 0.7), ("eager", 90.0)):
        line = line_of(lines, name)
        assert line.value == pytest.approx(ratio)
        assert (line.at_least, line.reach_for, line.reached) == (None, None, "")


def test_other_shapes_and_problems_do_not_count(result_of, report_of):
    results = [result_of(case, bitsandbytes=60.0) for case in FIRST.cases]
    strangers = [
        dataclasses.replace(FIRST.cases[0], **change)
        for change in ({"n": 64}, {"m": 3}, {"dtype": "float16"})
    ]
    results += [result_of(case, bitsandbytes=1.0) for case in strangers]
    assert line_of(judge_limits(report_of("limits", results)), "bitsandbytes").value == pytest.approx(60.0)


def test_baselines_named_on_the_command_line_do_not_hide_a_row(result_of, report_of):
    results = [result_of(dataclasses.replace(case, against=()), peft=6.0) for case in QLORA.cases]
    assert line_of(judge_limits(report_of("limits", results)), "peft").reached == "reach for"


def with_saved(result, ours, without):
    first, second = result.contestants
    contestants = [
        dataclasses.replace(first, saved_bytes=ours),
        dataclasses.replace(second, saved_bytes=without),
    ]
    return dataclasses.replace(result, contestants=contestants)


def all_dropout(result_of, saved):
    rows = [row for row in LIMITS if row.problem.dropout]
    return [
        with_saved(result_of(case, ours_no_dropout=1.0), ours, without)
        for (case, (ours, without)) in zip([case for row in rows for case in row.cases], saved, strict=True)
    ]


@pytest.mark.parametrize(("last", "value", "reached"), [(108, 8, "at least"), (109, 9, "no")])
def test_dropout_saves_no_more_than_its_seed(result_of, report_of, last, value, reached):
    results = all_dropout(result_of, [(108, 100)] * 8 + [(last, 100)])
    line = line_of(judge_limits(report_of("limits", results)), title="saved")
    assert (line.value, line.at_least, line.reached) == (value, 8, reached)


def everything(result_of, **last):
    cases = [case for row in LIMITS for case in row.cases]
    return [
        result_of(case, 2, **(last if case == cases[-1] else {"ours": {"scratch_bytes": 1 << 20}}))
        for case in cases
    ]


@pytest.mark.parametrize(("mebibytes", "reached"), [(8, "at least"), (9, "no")])
def test_scratch_is_the_largest_by_thread(result_of, report_of, mebibytes, reached):
    results = everything(result_of, ours={"scratch_bytes": mebibytes << 20})
    line = line_of(judge_limits(report_of("limits", results)), title="scratch")
    assert (line.value, line.reached) == (mebibytes << 19, reached)


@pytest.mark.parametrize(
    ("pages", "value", "reached"), [(0, 0, "at least"), (5, 4, "at least"), (6, 5, "no")]
)
def test_fresh_pages_are_those_beyond_the_results(result_of, report_of, pages, value, reached):
    results = everything(result_of, page_faults=pages)  # results of 50 bytes: one page
    line = line_of(judge_limits(report_of("limits", results)), title="fresh pages")
    assert (line.value, line.reached) == (value, reached)


def test_the_table_has_value_figures_and_verdict(result_of, report_of):
    results = [result_of(case, bitsandbytes=33.0) for case in FIRST.cases]
    results += [result_of(case, ours_plain_scales=1 / 1.031) for case in QLORA.cases]
    console = Console(width=160, file=io.StringIO())
    console.print(limits_table(judge_limits(report_of("limits", results))))
    stock, scales, *_ = (line.split() for line in console.file.getvalue().splitlines()[2:])
    assert " ".join(stock) == "forward float32 M=1 bitsandbytes 33.00x 33.00x 30.00x 50.00x 3 of 3 at least"
    assert " ".join(scales).startswith(
        "QLoRA forward+backward M=64 ours-plain-scales +3.1% +3.1% +5.0% +2.0% 3 of 3"
    )


def test_a_contestant_that_cannot_run_leaves_its_figure_open(result_of, report_of):
    results = []
    for case in FIRST.cases:
        result = result_of(case)
        missing = ContestantResult("bitsandbytes-tuned", "missing", "no glibc")
        results.append(dataclasses.replace(result, contestants=[*result.contestants, missing]))
    line = line_of(judge_limits(report_of("limits", results)), "bitsandbytes-tuned")
    assert line == Line(
        FIRST.title, "bitsandbytes-tuned", "times as fast", None, None, 15, 25, 0, len(LIMITS_SHAPES)
    )
    assert line.reached == "incomplete"
