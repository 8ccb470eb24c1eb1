"""The HTML report: whole, escaped, without anything from elsewhere, and right in what it says."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from peft_kernels.bench.case import EXACT, OURS, Case
from peft_kernels.bench.compare import Change, Comparison
from peft_kernels.bench.html import html_report
from peft_kernels.bench.results import ContestantResult
from peft_kernels.bench.roofline import Roofline
from peft_kernels.bench.stats import Band

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)></style>&amp;"
REFERENCES = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "formaction"}


class Page(HTMLParser):
    """A page taken apart; refuses tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def having(self, tag, **attributes):
        return [each for name, each in self.tags if name == tag and attributes.items() <= each.items()]


def page(report, comparison=None):
    """The page of a report, held to what must be true of every page."""
    text = html_report(report, comparison)
    found = Page(text)
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in found.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
        assert not [name for name in attrs if name.startswith("on")]
        for name in REFERENCES & attrs.keys():
            assert attrs[name].removeprefix("#") in ids, attrs[name]
            assert attrs[name].startswith("#")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    assert len(found.having("caption")) == len(found.having("table"))
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for attrs in found.having("svg"))
    return found


def section(report, anchor, comparison=None):
    """The words of one section, or None."""
    text = html_report(report, comparison)
    match = re.search(rf'<section id="{anchor}">.*?</section>', text, re.DOTALL)
    return Page(match[0]).words if match else None


def linear(m=3, **changes):
    return Case("linear", "nf4_linear", m, 128, 64, **{"weight": "nf4", **changes})


def test_verdict_counts_cases_against_all_stock_baselines(result_of, report_of):
    report = report_of(
        "quick",
        [
            result_of(linear(1), eager=2.0, bitsandbytes=3.0, dense=0.5),
            result_of(linear(2), eager=2.0, bitsandbytes=0.5),  # slower than one of them
            result_of(linear(3), eager=2.0, bitsandbytes=1.05),  # band 0.945 to 1.155
            result_of(linear(4), eager=2.0, bitsandbytes=None),
        ],
    )
    words = page(report).words
    assert "Faster than every stock baseline in 1 of 4 cases, slower in 1, 1 not judged" in words
    assert "▲ 1 faster ▼ 1 slower = 1 level ? 1 not judged" in words
    assert "All 9 comparisons: 5 faster, 2 slower, 1 level, 1 not judged." in words


def test_without_stock_baselines_comparisons_are_counted(result_of, report_of):
    report = report_of("sweep", [result_of(linear(m), dense=ratio) for m, ratio in ((1, 2.0), (2, 0.5))])
    assert "Faster than the baselines in 1 of 2 comparisons, slower in 1" in page(report).words


def test_losses_are_listed_like_wins(result_of, report_of):
    results = [result_of(linear(m), eager=0.1 * m) for m in range(1, 9)]  # 0.9 and 1.0 would be level
    results += [result_of(linear(m), eager=float(m)) for m in range(20, 40)]
    words = section(report_of("quick", results), "verdict")
    losses, wins = words.split("▼ Where ours is slower")[1].split("▲ Where ours is furthest ahead")
    assert re.findall(r"▼ ([\d.]+)×", losses) == [f"{0.1 * m:.2f}" for m in range(1, 9)]  # worst first
    assert re.findall(r"▲ ([\d.]+)×", wins) == [f"{m:.2f}" for m in range(39, 31, -1)]  # as many
    assert "12 more in the tables below" in wins


def test_no_loss_is_said(result_of, report_of):
    report = report_of("quick", [result_of(linear(), eager=2.0)])
    assert "slower in none" in page(report).words
    assert "▼ Where ours is slower Nowhere, beyond the noise bands." in section(report, "verdict")


def test_variants_of_ours_are_no_opponents(result_of, report_of):
    report = report_of("full", [result_of(linear(), eager=2.0, ours_no_dropout=0.5, ours_exact=0.5)])
    words = page(report).words
    assert "All 1 comparisons: 1 faster, 0 slower" in words
    assert EXACT in words  # they have rows all the same
    assert "▼ 0.50×" not in words


def test_bars_stand_on_the_side_of_1_that_they_belong_to(result_of, report_of):
    results = [result_of(linear(1), eager=0.5), result_of(linear(2), eager=16.0)]
    text = html_report(report_of("quick", results))
    one = float(re.search(r'<body style="--one:([\d.]+)"', text)[1])
    strips = re.findall(r'class="strip (\w+)" style="--a:([\d.]+);--b:([\d.]+);--m:([\d.]+)"', text)
    assert {name for name, *_ in strips} == {"slower", "faster"}
    for name, low, high, middle in strips:
        assert 0 < float(low) < float(middle) < float(high) < 100
        assert float(high) < one if name == "slower" else float(low) > one
    places = {name: float(middle) for name, _, _, middle in strips}
    assert (places["faster"] - one) / (one - places["slower"]) == pytest.approx(4, rel=0.01)  # log 16 / log 2


def test_hostile_names_are_text(report, with_flops):
    (result,) = report.cases
    ours, eager, missing = result.contestants
    names = {"op": HOSTILE, "family": HOSTILE, "dtype": HOSTILE, "label": HOSTILE}
    case = dataclasses.replace(result.case, direction=HOSTILE, weight=HOSTILE, **names)
    contestants = [
        ours,
        dataclasses.replace(eager, name=HOSTILE),
        dataclasses.replace(missing, reason=HOSTILE),
    ]
    result = with_flops(
        dataclasses.replace(
            result, name=HOSTILE, case=case, contestants=contestants, clock=HOSTILE, bound=HOSTILE
        )
    )
    larger = dataclasses.replace(result, case=dataclasses.replace(case, m=7), name=HOSTILE + "7")
    machine = dataclasses.replace(
        report.machine,
        cpu=HOSTILE,
        system=HOSTILE,
        gpu=HOSTILE,
        versions={HOSTILE: HOSTILE},
        caches={HOSTILE: 1},
    )
    settings = dataclasses.replace(
        report.settings, suite=HOSTILE, command=HOSTILE, baselines=[HOSTILE], fail_below=3.0
    )
    comparison = Comparison(
        *(HOSTILE, [HOSTILE], [Change(HOSTILE, 1, Band(1.2, 1.1, 1.3), HOSTILE, "slower")]),
        *([HOSTILE], [HOSTILE], [HOSTILE]),
    )
    roof = dataclasses.replace(report.rooflines[0], gflop_s={HOSTILE: 1.0})
    hostile = dataclasses.replace(
        report,
        created=HOSTILE,
        machine=machine,
        settings=settings,
        rooflines=[roof],
        cases=[result, larger],
    )
    found = page(hostile, comparison)
    assert found.words.count(HOSTILE) > 30
    assert found.having("svg", role="img")  # with charts, too


def test_what_failed_is_loud(report):
    (result,) = report.cases
    wrong = ContestantResult(OURS, "failed", "y is off by 1e+06 times its tolerance", 0.5, 1e6)
    report = dataclasses.replace(
        report, cases=[dataclasses.replace(result, status="failed", contestants=[wrong], gate=None)]
    )
    found = page(report)
    assert found.having("p", role="alert")
    assert "✕ Wrong results in 1 of 1 cases: they were not timed." in found.words
    assert "✕ WRONG RESULT: y is off by 1e+06 times its tolerance (error 5.0e-01)" in found.words
    assert "FAILED: y is off by" in section(report, "verdict")
    assert section(report, "roofline") is None
    assert "peft_kernels failed y is off by 1e+06 times its tolerance 1" in section(report, "absent")


def test_reasons_are_listed_once_for_all_cases(result_of, report_of):
    noisy = ContestantResult(OURS, "noisy", "3 of 9 rounds undisturbed, 6 needed")
    missing = ContestantResult("bitsandbytes", "missing", "bitsandbytes is not installed")
    results = [
        dataclasses.replace(result_of(linear(m)), status="noisy", contestants=[noisy, missing])
        for m in (1, 2)
    ]
    assert "None of 2 cases could be judged" in page(report_of("quick", results)).words
    words = section(report_of("quick", results), "absent")
    assert "peft_kernels noisy 3 of 9 rounds undisturbed, 6 needed 1 2" in words
    assert "bitsandbytes * missing bitsandbytes is not installed 1 2" in words


def test_nothing_is_known(report):
    (result,) = report.cases
    contestants = [ContestantResult(name, "noisy") for name in (OURS, "eager")]
    machine = dataclasses.replace(
        report.machine, caches={}, native_capability=None, native_reason=None, versions={"torch": None}
    )
    bare = dataclasses.replace(result, contestants=contestants, gate=None, clock="", status="noisy")
    found = page(dataclasses.replace(report, machine=machine, cases=[bare], rooflines=[]))
    assert "? noisy" in found.words
    assert "torch –" in found.words


@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_was_measured(report, interrupted):
    found = page(dataclasses.replace(report, cases=[], rooflines=[], interrupted=interrupted))
    assert "Nothing was measured" in found.words
    assert ("Interrupted: this is what was done by then, 0 cases." in found.words) == interrupted


def test_one_case_has_machine_settings_and_command(report):
    words = page(report).words
    for part in (
        report.machine.cpu,
        report.machine.system,
        report.settings.command,
        report.created,
        "limits, 1 thread read 11.0 GB/s, write 7.0 GB/s, float32 150 GFLOP/s",
        f"torch {report.machine.versions['torch']}",
    ):
        assert part in words


def test_every_case_is_on_the_roofline_of_its_threads(result_of, report_of, with_flops):
    results = [with_flops(result_of(linear(m), threads, eager=2.0)) for m in (1, 2, 3) for threads in (1, 2)]
    results.append(dataclasses.replace(result_of(linear(4), 1), flops=0))
    report = report_of("quick", results)
    roofs = [Roofline(threads, 11.0, 7.0, {"float32": 150.0}) for threads in (1, 2)]
    found = page(dataclasses.replace(report, rooflines=roofs))
    for width in ("0 0 960 470", "0 0 380 380"):
        assert [svg["viewbox"] for svg in found.having("svg", role="img")].count(width) == 2
    assert (
        len(found.having("circle", **{"class": "ours f0"})) == 2 * 6 + 2
    )  # wide and narrow, and two legends
    assert len(found.having("circle", **{"class": "other f0"})) == 2 * 6
    assert "Cases without arithmetic that is counted" in section(report, "roofline")


def test_a_gpu_has_no_threads(report, with_flops):
    machine = dataclasses.replace(report.machine, gpu="NVIDIA H100, 80 GB")
    words = page(dataclasses.replace(report, machine=machine, cases=[with_flops(report.cases[0])])).words
    assert "limits, GPU read 11.0 GB/s" in words
    assert "NVIDIA H100, 80 GB · 1 case" in words
    assert "1 thread" not in words


def test_a_case_at_its_limit_touches_the_roof(result_of, report_of, with_flops):
    """100 flops in 75 bytes; 0.5 ms is the roofline time, 2 ms a quarter of the speed."""
    for ms, touches in ((0.5, True), (2.0, False)):
        found = page(report_of("quick", [with_flops(result_of(linear(), ms=ms))]))
        for stem in found.having("line", **{"class": "stem f0"}):
            assert (stem["y1"] == stem["y2"]) == touches
            assert float(stem["y1"]) >= float(stem["y2"])


def test_curves_over_tokens_and_over_ranks(result_of, report_of):
    lora = Case("linear", "nf4_lora_linear", 8, 128, 64, r=4, weight="nf4_double", direction="both")
    cases = [linear(m) for m in (1, 16, 256)] + [dataclasses.replace(lora, r=r) for r in (4, 8)]
    results = [result_of(case, ms=1.0 + case.m, eager=2.0, dense=0.5) for case in cases]
    report = report_of("full", results)
    found = page(report)
    words = section(report, "scaling")
    assert "nf4_linear · forward · 128→64 · NF4 · float32 · 1 thread" in words
    assert "nf4_lora_linear · forward + backward · 8 tokens · 128→64 · NF4 double-quantised" in words
    assert "rank r" in words
    lines = found.having("polyline")
    assert len(lines) == 2 * 2 * 3  # problems, charts, contestants
    (ours, *_) = (line for line in lines if line["class"] == f"curve k-{OURS}")
    places = [tuple(map(float, place.split(","))) for place in ours["points"].split()]
    assert len(places) == 3
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # 1, 16, 256 are evenly spread
    assert y0 > y1 > y2  # more time is higher up
    assert "M = 256: 257 ms [254 to 260], 40 % of the roofline" in words


def test_where_cost_does_not_grow_is_said(result_of, report_of):
    report = report_of("sweep", [result_of(linear(m), ms=ms) for m, ms in ((1, 2.0), (4, 1.0))])
    assert "M=1 takes 100.0% more time than M=4" in section(report, "scaling")


def test_memory_says_where_ours_needs_more(result_of, report_of):
    def result(m, ours, eager):
        found = result_of(linear(m), ours={"scratch_bytes": ours, "saved_bytes": 8}, eager=2.0)
        other = dataclasses.replace(found.contestants[1], scratch_bytes=eager, saved_bytes=8)
        return dataclasses.replace(found, contestants=[found.contestants[0], other])

    mib = 1 << 20
    results = [
        result(1, mib, 2 * mib),
        result(2, 3 * mib, mib),
        result(3, mib, mib + 1000),
        result(4, 0, None),
    ]
    words = section(report_of("quick", results), "memory")
    assert "less in 1 , more in 1 , the same in 1 of 4 cases" in words
    assert "▼ more 3 MiB eager * 1 MiB" in words
    assert "Saved for backward" in words


def test_errors_outside_the_tolerance_are_marked(report):
    (result,) = report.cases
    ours, eager, _ = result.contestants
    rough = dataclasses.replace(eager, name="bitsandbytes-repacked", error=4e-3, tolerance_used=5e3)
    cases = [dataclasses.replace(result, contestants=[ours, eager, rough])]
    words = section(dataclasses.replace(report, cases=cases), "error")
    assert "10 % 1.0e-07 eager * 2.0e-07 bitsandbytes-repacked 4.0e-03 !" in words
    assert words.count("!") == 2  # the explanation has the other


def test_whole_models_have_tokens_a_second_and_peak_memory(result_of, report_of):
    step = Case("model", "train_step", 512, 2048, 8192, r=16, direction="both", label="llama-3.2-1b:2-layers")
    report = report_of(
        "full",
        [
            result_of(linear(), eager=2.0),
            result_of(step, ms=100.0, ours={"scratch_bytes": 3 << 20}, peft=2.0),
        ],
    )
    words = section(report, "speed")
    assert words.index("train_step") < words.index("nf4_linear")
    assert "tokens/s peak memory" in words
    assert "llama-3.2-1b:2-layers" in words
    assert "peft_kernels 100 1.0 % 5 120 3 MiB" in words
    assert "Peak memory of a call, whole models" in section(report, "memory")


def test_the_comparison_has_what_became_slower_first(report):
    changes = [
        Change("unchanged", 1, Band(1.0, 0.98, 1.02), "eager", "same"),
        Change("better", 1, Band(0.8, 0.7, 0.9), "peft", "faster"),
        Change("worse", 2, Band(1.2, 1.15, 1.25), "eager", "slower"),
    ]
    comparison = Comparison("2026-01-01", [], changes, ["noisy"], ["new"], ["gone"])
    for threshold, sentence in (
        (0.1, "1 case is slower by more than 10 % beyond noise."),
        (0.25, "No case is slower by more than 25 % beyond noise."),
    ):
        settings = dataclasses.replace(report.settings, fail_regression=threshold)
        words = section(dataclasses.replace(report, settings=settings), "comparison", comparison)
        assert sentence in words
    assert words.index("worse, 2 threads ▼ slower 1.20× eager 1.15–1.25") < words.index("better")
    assert words.index("better, 1 thread ▲ faster 0.80× peft") < words.index("unchanged, 1 thread same")
    assert words.endswith(
        "Too noisy to compare, or no baseline in common noisy Only in this run new Only in the old run gone"
    )
    assert section(report, "comparison") is None


def test_runs_that_cannot_be_compared_are_not(report):
    comparison = Comparison("2026-01-01", ["cpu was A, is B"], [], [], [], [])
    words = section(report, "comparison", comparison)
    assert words == "Against the run of 2026-01-01 Not comparable: cpu was A, is B"


def test_the_gate_is_told(report):
    assert "Gate: every case is at or above 0.95." in section(report, "verdict")
    settings = dataclasses.replace(report.settings, fail_below=1.9)
    words = section(dataclasses.replace(report, settings=settings), "verdict")
    assert "1.800 < 1.9 against eager" in words
    assert "Gate: every case" not in words


def test_every_word_that_needs_it_is_explained(report):
    words = section(report, "legend")
    for term in ("ratio, band", "▼ slower", "roofline", "scratch", "saved", "error, tolerance", "rounds"):
        assert term in words
