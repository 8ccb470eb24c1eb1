"""Options of `pytest bench` and the one runner behind its tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
from peft_kernels.bench.case import Case
from peft_kernels.bench.measure import Budget
from peft_kernels.bench.options import DEFAULT_SECONDS, default_passes
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
    group.addoption("--bench-seconds", metavar="S", type=float, help="time per case (default: the suite's)")
    group.addoption("--bench-passes", metavar="N", type=int, help="visits to a case (default: the suite's)")


def pytest_configure(config: pytest.Config) -> None:
    for option in ("--bench-threads", "--bench-seconds", "--bench-passes"):
        value = config.getoption(option)
        if value is not None and not value > 0:
            raise pytest.UsageError(f"{option} must be positive, got {value}")


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], CaseResult]]:
    """Case -> its result; all contestants of a case are measured together, once."""
    option = request.config.getoption
    threads, suite = option("--bench-threads"), option("--bench-suite")
    passes = option("--bench-passes") or default_passes(suite)
    names = default_baselines(suite)
    budget = Budget(max_seconds=(option("--bench-seconds") or DEFAULT_SECONDS[suite]) / passes)
    roofline = functools.cache(lambda dtype: measure_roofline(threads, [dtype]))
    results: dict[Case, CaseResult] = {}
    with Workers() as workers:

        def measure(case: Case) -> CaseResult:
            if case not in results:
                runner = CaseRunner(names, budget, 0, workers, {threads: roofline(case.dtype)})
                for _ in range(passes):
                    results[case] = runner.run(case, threads, results.get(case))
            return results[case]

        yield measure
