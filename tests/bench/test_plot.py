import importlib.util

import pytest
from matplotlib.figure import Figure
from peft_kernels.bench.case import OURS, Case
from peft_kernels.bench.plot import check_plot, save_plot
from peft_kernels.bench.sweep import curves


@pytest.fixture
def sweep(result_of, report_of):
    """Two directions and dtypes at four M, ours and dense: eight curves."""
    return curves(
        report_of(
            "sweep",
            [
                result_of(
                    Case("linear", "nf4_linear", m, 128, 64, direction=direction, dtype=dtype, weight="nf4"),
                    ms=float(m),
                    dense=3.0,
                )
                for direction in ("forward", "backward")
                for dtype in ("float32", "bfloat16")
                for m in (1, 2, 16, 4096)
            ],
        )
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig

    def spy(figure, *arguments, **options):
        saved.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


@pytest.mark.parametrize(
    ("name", "magic"), [("plot.png", b"\x89PNG"), ("plot.svg", b"<?xml"), ("plot.pdf", b"%PDF")]
)
def test_a_file_is_written_in_the_format_of_its_name(tmp_path, sweep, name, magic):
    save_plot(sweep, "a machine", tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(magic)
    assert len(content) > 5000


def test_every_curve_is_a_line_of_time_and_a_line_of_roofline(tmp_path, sweep, figures):
    save_plot(sweep, "a machine", tmp_path / "plot.png")
    (figure,) = figures
    times, shares = figure.axes
    assert len(times.get_lines()) == len(shares.get_lines()) == len(sweep) == 8
    assert (times.get_xscale(), times.get_yscale()) == ("log", "log")
    assert (shares.get_xscale(), shares.get_yscale()) == ("log", "linear")
    for curve, time, share in zip(sweep, times.get_lines(), shares.get_lines(), strict=True):
        factor = 1.0 if curve.contestant == OURS else 3.0
        assert list(time.get_xdata()) == list(share.get_xdata()) == [1, 2, 16, 4096]
        assert list(time.get_ydata()) == [factor * m for m in (1, 2, 16, 4096)]
        assert list(share.get_ydata()) == [40.0] * 4


def test_lines_are_told_apart(tmp_path, sweep, figures):
    save_plot(sweep, "a machine", tmp_path / "plot.png")
    times = figures[0].axes[0]
    labels = [text.get_text() for text in times.get_legend().get_texts()]
    assert labels[:2] == ["forward, float32, peft_kernels", "forward, float32, dense"]
    assert len(set(labels)) == 8
    looks = {(line.get_color(), line.get_linestyle()) for line in times.get_lines()}
    assert len(looks) == 8


def test_a_label_has_what_is_not_the_same_for_all(tmp_path, result_of, report_of, figures):
    results = [
        result_of(Case("linear", "nf4_linear", m, k, 64, weight="nf4"), threads)
        for m in (1, 2)
        for k in (128, 256)
        for threads in (1, 2)
    ]
    save_plot(curves(report_of("full", results)), "a machine", tmp_path / "plot.svg")
    labels = {text.get_text() for text in figures[0].axes[0].get_legend().get_texts()}
    ends = ("K128-N64, 1 thread", "K128-N64, 2 threads", "K256-N64, 1 thread", "K256-N64, 2 threads")
    assert labels == {f"forward, float32, peft_kernels, {end}" for end in ends}


def test_matplotlib_is_needed_and_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(ValueError, match=r"--plot needs matplotlib, .*: pip install 'peft_kernels\[bench\]'"):
        check_plot(tmp_path / "plot.png")


def test_a_plot_that_could_not_be_saved_is_refused(tmp_path):
    check_plot(tmp_path / "plot.png")
    with pytest.raises(ValueError, match=r"--plot must end in one of \.png, \.svg, \.pdf, got .*plot\.txt"):
        check_plot(tmp_path / "plot.txt")
    with pytest.raises(ValueError, match=r"--plot must be in a folder that exists, got .*missing"):
        check_plot(tmp_path / "missing" / "plot.png")
