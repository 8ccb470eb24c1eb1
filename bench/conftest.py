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
    group.addoption("--bench-filter", metavar="GLOB", default="*", help="only cases whose name matches")
    group.addoption("--bench-threads", metavar="N", type=int, default=1, help="default: 1")
    group.addoption(
        "--bench-seconds", metavar="S", type=float, default=2.0, help="time per case (default: 2)"
    )


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], CaseResult]]:
    """Case -> its result; all contestants of a case are measured together, once."""
    threads = request.config.getoption("--bench-threads")
    names = default_baselines(request.config.getoption("--bench-suite"))
    budget = Budget(max_seconds=request.config.getoption("--bench-seconds"))
    results: dict[Case, CaseResult] = {}
    with Workers() as workers:

        def measure(case: Case) -> CaseResult:
            if case not in results:
                rooflines = {threads: measure_roofline(threads, [case.dtype])}
                results[case] = CaseRunner(names, budget, 0, workers, rooflines).run(case, threads)
            return results[case]

        yield measure
