"""What the page shows of a report, ready for its template: groups, counts, verdicts, scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from ..case import GATE_BASELINES, OURS
from ..compare import Change, Comparison, judge_regressions
from ..gate import Verdict, judge
from ..results import CaseResult, ContestantResult, Measurement, Report
from ..standing import Outcome, Score, Standing, count, is_rival, scores, standings, stock_outcome
from ..sweep import Over, curves, judge_sweep
from . import prose
from .axis import Axis, log_axis
from .charts import by_problem, curve_charts, family_mark, roofline_chart
from .words import MODEL, problem_words

SCRATCH_RESOLUTION = 1 << 18  # bytes that are not told apart: docs/benchmarks.md, "scratch"
_WIDE, _NARROW = (960.0, 470.0), (380.0, 380.0)


@dataclass(frozen=True)
class Family:
    """The cases of one family by their anchors in the page."""

    name: str
    mark: Markup
    cases: dict[str, CaseResult]

    @property
    def is_model(self) -> bool:
        """Whether its cases are whole models, whose speed is tokens a second."""
        return self.name == MODEL


@dataclass(frozen=True)
class MatrixRow:
    """One quantity of one case.

    Attributes:
        anchor: of the case.
        result: the case.
        values: by contestant, where there is one.
        outcome: how ours compares with the stock baseline that needs least; "faster" stands for less.
    """

    anchor: str
    result: CaseResult
    values: dict[str, float]
    outcome: Outcome

    @property
    def outside(self) -> set[str]:
        """Contestants that exceed the tolerance of ours."""
        return {each.name for each in self.result.contestants if (each.tolerance_used or 0) > 1}

    @property
    def used(self) -> float | None:
        """Share of the tolerance that ours uses."""
        return self.result.contestants[0].tolerance_used


@dataclass(frozen=True)
class Matrix:
    """One field of all contestants of some cases, and a scale of 0 to 100 to draw it on."""

    title: str
    field: str
    rows: list[MatrixRow]
    axis: Axis

    @property
    def counts(self) -> dict[Outcome, int]:
        """How many rows there are of each outcome; "faster" stands for less."""
        return count(row.outcome for row in self.rows)


@dataclass(frozen=True)
class Chart:
    """A drawing twice, for a wide and for a narrow page, or a pair of drawings, under a title."""

    title: str
    drawings: tuple[Markup, Markup]


@dataclass(frozen=True)
class Absence:
    """Why something has no speed, and where."""

    contestant: str
    status: str
    reason: str
    places: list[str]


@dataclass(frozen=True)
class View:
    """A report as its page shows it."""

    report: Report
    comparison: Comparison | None = None

    @cached_property
    def cases(self) -> dict[str, CaseResult]:
        """Anchor in the page -> case."""
        return {f"case-{i}": result for i, result in enumerate(self.report.cases, 1)}

    @cached_property
    def anchors(self) -> dict[int, str]:
        """`id` of a case's result -> its anchor; the results themselves cannot be keys."""
        return {id(result): anchor for anchor, result in self.cases.items()}

    @cached_property
    def families(self) -> list[Family]:
        """In the order of the report, whole models first."""
        names = dict.fromkeys(result.case.family for result in self.report.cases)
        order = sorted(names, key=lambda name: name != MODEL)
        return [
            Family(
                name, Markup(family_mark(i)), {a: r for a, r in self.cases.items() if r.case.family == name}
            )
            for i, name in enumerate(order)
        ]

    @cached_property
    def standings(self) -> list[Standing]:
        """Ours against every rival in every case."""
        return standings(self.report)

    @cached_property
    def scores(self) -> list[Score]:
        """Ours against every rival, over all of its cases."""
        return scores(self.standings)

    @cached_property
    def stock(self) -> list[str]:
        """The stock baselines that took part; where there are none, all baselines count."""
        present = {standing.contestant.name for standing in self.standings}
        return [name for name in GATE_BASELINES if name in present]

    @cached_property
    def counts(self) -> dict[Outcome, int]:
        """Cases by how ours stands against all stock baselines; without those, comparisons by outcome."""
        if self.stock or not self.standings:
            return count(map(stock_outcome, self.report.cases))
        return count(standing.outcome for standing in self.standings)

    @property
    def headline(self) -> str:
        """Wins and losses in one sentence."""
        whom = ("than every stock baseline", "cases") if self.stock else ("than the baselines", "comparisons")
        return prose.headline(self.counts, *whom)

    @property
    def headline_note(self) -> str:
        """What the headline counts, and all comparisons with it."""
        every = count(standing.outcome for standing in self.standings)
        whom = f"the stock baselines ({', '.join(self.stock)})" if self.stock else "every baseline"
        judged = f"{every['faster']} faster, {every['slower']} slower, {every['level']} level"
        numbers = f"{judged}, {every['unjudged']} not judged"
        all_of_them = f" All {sum(every.values())} comparisons: {numbers}." if self.stock else ""
        return f"Against {whom}, beyond the 95 % noise bands.{all_of_them}"

    @property
    def warnings(self) -> list[str]:
        """What a reader has to know before believing a number."""
        return prose.warnings(self.report, sum(result.status == "failed" for result in self.report.cases))

    @property
    def gate_failures(self) -> list[tuple[str, CaseResult, Verdict]]:
        """The cases that do not pass the gate, if there is one."""
        verdicts = [
            (anchor, result, judge(result, self.report.settings.fail_below))
            for anchor, result in self.cases.items()
        ]
        return [each for each in verdicts if each[2].kind != "passed"]

    def ranked(self, outcome: Outcome) -> list[tuple[str, Standing]]:
        """Comparisons of one outcome with their anchors, those farthest from 1 first."""
        found = [
            (standing.ratio.median, self.anchors[id(standing.result)], standing)
            for standing in self.standings
            if standing.outcome == outcome and standing.ratio
        ]
        found.sort(key=lambda each: each[0], reverse=outcome == "faster")
        return [(anchor, standing) for _, anchor, standing in found]

    @staticmethod
    def outcome_of(result: CaseResult, contestant: ContestantResult) -> str:
        """What the band of a ratio says; "own" for a variant of ours: nothing is won or lost."""
        return Standing(result, contestant).outcome if is_rival(contestant.name) else "own"

    @staticmethod
    def tokens_per_second(result: CaseResult, speed: Measurement) -> float:
        """Tokens of a call over its time."""
        return 1e3 * result.case.m / speed.ms.median

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Anchors and titles of the sections that the page has."""
        every: tuple[tuple[str, str, object], ...] = (
            ("verdict", "Where ours stands", True),
            ("comparison", "Against the old run", self.comparison),
            ("machine", "Machine", True),
            ("roofline", "Roofline", self.rooflines or self.off_roofline),
            ("speed", "Speed", self.cases),
            ("scaling", "Scaling", self.scalings),
            ("memory", "Memory", self.memory),
            ("error", "Error", self.errors),
            ("absent", "Not measured", self.absences),
            ("legend", "How to read this", True),
        )
        return [(anchor, title) for anchor, title, content in every if content]

    @property
    def changes(self) -> list[Change]:
        """Changes since the old run, those that became slower first, then the faster ones."""
        found = self.comparison.changes if self.comparison else []
        order = ("slower", "faster", "same")
        return sorted(found, key=lambda change: (order.index(change.verdict), -change.time.median))

    @property
    def regressions(self) -> list[Verdict]:
        """The cases that --fail-regression fails for, if that was asked for."""
        threshold = self.report.settings.fail_regression
        if self.comparison is None or threshold is None:
            return []
        return [each for each in judge_regressions(self.comparison, threshold) if each.kind == "slow"]

    @property
    def breaks(self) -> list[Verdict]:
        """Where cost does not grow with M as it should, if there is a time at several M."""
        return [verdict for verdict in judge_sweep(self.report) if verdict.kind == "slow"]

    @cached_property
    def change_axis(self) -> Axis:
        """The scale of these changes."""
        ends = [end for change in self.changes for end in (change.time.low, change.time.high)]
        return log_axis([0.8, 1.25, *ends], 0, 100, base=2, room=1.05, least=1.5)

    @cached_property
    def ratio_axis(self) -> Axis:
        """One scale for all ratios in the page, 1 and its neighbourhood on it."""
        speeds = [each.measurement for result in self.report.cases for each in result.contestants]
        ends = [end for each in speeds if each and each.ratio for end in (each.ratio.low, each.ratio.high)]
        return log_axis([0.5, 2.0, *ends], 0, 100, base=2, room=1.1)

    @cached_property
    def rooflines(self) -> list[Chart]:
        """The roofline of every thread count that has a case on it."""
        names = [family.name for family in self.families]
        charts = []
        for roof in self.report.rooflines:
            wide, narrow = (roofline_chart(roof, self.cases, names, *area) for area in (_WIDE, _NARROW))
            if wide:
                charts.append(Chart(self.report.measured_on(roof.threads), (Markup(wide), Markup(narrow))))
        return charts

    @cached_property
    def off_roofline(self) -> dict[str, CaseResult]:
        """Measured cases without arithmetic to count, whose limit is the bandwidth alone."""
        return {
            anchor: result
            for anchor, result in self.cases.items()
            if result.contestants[0].measurement and not result.gflop_s
        }

    @cached_property
    def scalings(self) -> list[Chart]:
        """Time and share of the roofline over M, then over r: a pair of charts a problem."""
        charts = []
        overs: tuple[Over, ...] = ("m", "r")
        for over in overs:
            for group in by_problem(curves(self.report, over)):
                words = problem_words(group[0].problem, without=over)
                title = f"{group[0].problem.op} · {words} · {self.report.measured_on(group[0].threads)}"
                time, share = curve_charts(group, over)
                charts.append(Chart(title, (Markup(time), Markup(share))))
        return charts

    @cached_property
    def memory(self) -> list[Matrix]:
        """Scratch of a call and bytes saved for backward, of whole models the peak."""
        models = [result for result in self.report.cases if result.case.family == MODEL]
        others = [result for result in self.report.cases if result.case.family != MODEL]
        return self._matrices(
            ("Peak memory of a call, whole models", models, "scratch_bytes", SCRATCH_RESOLUTION),
            (
                "Scratch: peak memory of a call beyond its results",
                others,
                "scratch_bytes",
                SCRATCH_RESOLUTION,
            ),
            ("Saved for backward", self.report.cases, "saved_bytes", 0),
        )

    @cached_property
    def errors(self) -> list[Matrix]:
        """Largest error over largest value of the float64 result."""
        return self._matrices(("Error against float64", self.report.cases, "error", 0))

    def _matrices(self, *quantities: tuple[str, Iterable[CaseResult], str, float]) -> list[Matrix]:
        """Those of the quantities (title, cases, field, resolution) that some contestant has."""
        matrices = []
        for title, results, field, resolution in quantities:
            rows = []
            for result in results:
                found = {each.name: getattr(each, field) for each in result.contestants}
                values = {name: value for name, value in found.items() if value is not None}
                if values:
                    rows.append(
                        MatrixRow(self.anchors[id(result)], result, values, _least(values, resolution))
                    )
            if rows:
                drawn = (value for row in rows for value in row.values.values())
                axis = log_axis(drawn, 0, 100, base=10 if field == "error" else 2)
                matrices.append(Matrix(title, field, rows, axis))
        return matrices

    @cached_property
    def absences(self) -> list[Absence]:
        """What has no speed, with the reason, one entry for all cases that share it."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for anchor, result in self.cases.items():
            for each in result.contestants:
                if each.status != "measured":
                    key = (each.name, each.status, each.reason or "no reason given")
                    found.setdefault(key, []).append(anchor)
        return [Absence(*key, places) for key, places in found.items()]


def _least(values: dict[str, float], resolution: float) -> Outcome:
    """Whether ours needs less than every stock baseline, or more than the best of them, or neither."""
    stock = [values[name] for name in GATE_BASELINES if name in values]
    if OURS not in values or not stock:
        return "unjudged"
    difference = values[OURS] - min(stock)
    if abs(difference) <= resolution:
        return "level"
    return "faster" if difference < 0 else "slower"
