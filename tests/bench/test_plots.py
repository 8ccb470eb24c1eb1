"""The pictures of a run: which files there are, and what is in them."""

import dataclasses

import pytest
from matplotlib.figure import Figure
from peft_kernels.bench.case import OURS, Case
from peft_kernels.bench.plots import save_plots
from peft_kernels.bench.results import ContestantResult
from peft_kernels.bench.roofline import Roofline


@pytest.fixture
def pictures(monkeypatch, tmp_path):
    """Saves the plots of a report; returns file name -> figure."""
    figures, save = {}, Figure.savefig

    def spy(figure, path, **options):
        figures[path.name] = figure
        return save(figure, path, **{**options, "dpi": 20})

    monkeypatch.setattr(Figure, "savefig", spy)

    def pictures(report):
        figures.clear()
        paths = save_plots(report, tmp_path)
        assert [path.name for path in paths] == list(figures)
        assert all(path.parent == tmp_path and path.read_bytes().startswith(b"\x89PNG") for path in paths)
        return dict(figures)

    return pictures


def linear(m=3, **changes):
    return Case("linear", "nf4_linear", m, 128, 64, **{"weight": "nf4", **changes})


def labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_every_kind_of_picture(pictures, result_of, report_of, with_flops):
    lora = Case("linear", "nf4_lora_linear", 8, 128, 64, weight="nf4_double")
    cases = [linear(1), linear(2), dataclasses.replace(lora, r=4), dataclasses.replace(lora, r=8)]
    ours = {"scratch_bytes": 0}
    results = [
        with_flops(result_of(case, threads, ours=ours, eager=2.0)) for case in cases for threads in (1, 2)
    ]
    roofs = [Roofline(threads, 11.0, 7.0, {"float32": 150.0, "bfloat16": 90.0}) for threads in (1, 2)]
    found = pictures(dataclasses.replace(report_of("full", results), rooflines=roofs))
    names = ["roofline-1", "roofline-2", "ratios", "scaling-m", "scaling-r", "memory"]
    assert list(found) == [f"{name}.png" for name in names]
    (roofline,) = found["roofline-1.png"].axes
    marks = [line for line in roofline.get_lines() if line.get_marker() != "None"]
    assert sorted(len(line.get_xdata()) for line in marks) == [4, 4]  # ours and eager of four cases
    assert {float(x) for line in marks for x in line.get_xdata()} == {100 / 75}
    for name in ("scaling-m.png", "scaling-r.png"):  # two thread counts, two contestants
        assert [len(axes.get_lines()) for axes in found[name].axes if axes.axison] == [2, 2]
    assert labels(found["memory.png"]) == [result.title for result in results]


def test_losses_come_first_and_are_named(pictures, result_of, report_of):
    results = [result_of(linear(1), eager=2.0, dense=1.0), result_of(linear(2), eager=0.5, ours_exact=0.1)]
    figure = pictures(report_of("quick", results))["ratios.png"]
    first, second = (result.title for result in results)
    assert labels(figure) == [
        f"SLOWER  {second}, against eager",
        f"level  {first}, against dense",
        f"{first}, against eager",
    ]
    (axes,) = figure.axes
    markers = {float(line.get_xdata()[0]): line for line in axes.get_lines() if len(line.get_xdata()) == 1}
    assert [markers[ratio].get_marker() for ratio in (0.5, 1.0, 2.0)] == ["v", "o", "o"]
    assert len({markers[ratio].get_color() for ratio in (0.5, 1.0, 2.0)}) == 3
    bands = [tuple(map(float, line.get_xdata())) for line in axes.get_lines() if line.get_linewidth() == 4]
    assert bands == [(0.45, 0.55), (0.9, 1.1), (1.8, 2.2)]


def test_a_long_list_is_in_several_pictures(pictures, result_of, report_of):
    results = [result_of(linear(m), eager=float(m)) for m in range(2, 72)]
    found = pictures(report_of("full", results))
    assert [name for name in found if name.startswith("ratios")] == ["ratios-1.png", "ratios-2.png"]
    shown = labels(found["ratios-1.png"]) + labels(found["ratios-2.png"])
    assert shown == [f"{result.title}, against eager" for result in results]


def test_there_is_no_picture_of_nothing(pictures, report):
    noisy = dataclasses.replace(report.cases[0], contestants=[ContestantResult(OURS, "noisy")])
    assert pictures(dataclasses.replace(report, cases=[noisy])) == {}
    assert pictures(dataclasses.replace(report, cases=[])) == {}
