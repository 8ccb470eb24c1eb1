"""The benchmark cases under pytest-benchmark: `pytest bench --benchmark-json FILE`.

One group per case, one benchmark per contestant. Contestants are measured together in interleaved rounds, as
`python -m peft_kernels.bench` does; pytest-benchmark is handed those rounds through its timer and computes
its statistics from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import pytest
from peft_kernels.bench.case import OURS, Case
from peft_kernels.bench.presets import PRESET_SUITES, preset_cases
from peft_kernels.bench.registry import FAMILIES, baselines, default_baselines, matching, select
from peft_kernels.bench.results import CaseResult
from pytest_benchmark.fixture import BenchmarkFixture


class _Replay:
    """A clock that shows recorded durations: every two readings are one round apart."""

    __name__ = "interleaved_rounds"

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, seconds: Sequence[float]) -> None:
        self._readings = iter([reading for duration in seconds for reading in (0.0, duration)])

    def __call__(self) -> float:
        return next(self._readings)


_REPLAY = _Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    suite, presets = option("--bench-suite"), option("--bench-preset")
    if presets and suite not in PRESET_SUITES:
        raise pytest.UsageError(f"--bench-suite must be quick or full with --bench-preset, got {suite}")
    try:
        everything = (
            preset_cases(presets.split(","), PRESET_SUITES[suite], suite) if presets else select(suite)
        )
    except ValueError as error:
        raise pytest.UsageError(f"--bench-preset: {error}") from error
    cases = matching(everything, FAMILIES, option("--bench-filter"))
    if not cases:
        raise pytest.UsageError(f"--bench-filter {option('--bench-filter')} matches no case")
    wanted = {OURS, *default_baselines(suite)}
    pairs = [(case, name) for case in cases for name in (OURS, *baselines(case)) if name in wanted]
    metafunc.parametrize(("case", "contestant"), pairs, ids=[f"{case.name}-{name}" for case, name in pairs])


@pytest.mark.filterwarnings("default")  # the baselines' libraries warn; that is theirs to mend
@pytest.mark.benchmark(timer=_REPLAY)
def test_case(
    benchmark: BenchmarkFixture, case: Case, contestant: str, measured: Callable[[Case], CaseResult]
) -> None:
    result = measured(case)
    ours = result.contestants[0]
    assert ours.status != "failed", ours.reason
    (own,) = (each for each in result.contestants if each.name == contestant)
    if own.measurement is None:
        pytest.skip(f"{own.status}: {own.reason}")
    speed = own.measurement
    benchmark.group = result.title
    benchmark.extra_info = {
        "ratio": dataclasses.asdict(speed.ratio) if speed.ratio else None,
        "bytes": result.read_bytes + result.write_bytes,
        "flops": result.flops,
        "error": own.error,
        "scratch_bytes": own.scratch_bytes,
        "saved_bytes": own.saved_bytes,
        "roofline_percent": speed.roofline_percent,
        "rounds_dropped": speed.dropped,
    }
    _REPLAY.load([milliseconds / 1e3 for milliseconds in speed.samples_ms])
    benchmark.pedantic(lambda: None, rounds=speed.rounds)  # type: ignore[no-untyped-call]
