"""Options of `pytest bench` and the one runner behind its tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from peft_kernels.bench.case import Case
from peft_kernels.bench.measure import Budget
from peft_kernels.bench.registry import SUITES, default_baselines
from peft_kernels.bench.results import CaseResult
from peft_kernels.bench.roofline import measure_roofline
from peft_kernels.bench.run import CaseRunner
from peft_kernels.bench.worker import Workers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peft_kernels benchmarks")
    group.addoption("--bench-suite", choices=SUITES, default="quick", help="default: quick")
    group.addoption("--bench-preset", metavar="NAMES", default="", help="the layers of models instead")
    group.addoption("--bench-filter", metavar="GLOB", default="*", help="only cases whose name matches")
    group.addoption("--bench-threads", metavar="N", type=int, default=1, help="default: 1")
    group.addoption(
        "--bench-seconds", metavar="S", type=float, default=2.0, help="time per case (default: 2)"
    )
    group.addoption("--bench-passes", metavar="N", type=int, default=1, help="visits to a case (default: 1)")


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], CaseResult]]:
    """Case -> its result; all contestants of a case are measured together, once."""
    option = request.config.getoption
    threads, passes = option("--bench-threads"), option("--bench-passes")
    names = default_baselines(option("--bench-suite"))
    budget = Budget(max_seconds=option("--bench-seconds") / passes)
    results: dict[Case, CaseResult] = {}
    with Workers() as workers:

        def measure(case: Case) -> CaseResult:
            if case not in results:
                rooflines = {threads: measure_roofline(threads, [case.dtype])}
                runner = CaseRunner(names, budget, 0, workers, rooflines)
                for _ in range(passes):
                    results[case] = runner.run(case, threads, results.get(case))
            return results[case]

        yield measure
