import dataclasses

import pytest
from peft_kernels.bench.case import OURS, Case
from peft_kernels.bench.machine import machine_facts
from peft_kernels.bench.results import (
    SCHEMA_VERSION,
    CaseResult,
    ContestantResult,
    Gate,
    Measurement,
    Pass,
    Report,
    Settings,
)
from peft_kernels.bench.roofline import Roofline
from peft_kernels.bench.stats import Band


def measurement(ratio):
    return Measurement(
        ms=Band(1.0, 0.9, 1.1), ratio=ratio, gb_s=3.0, gflop_s=None, roofline_percent=40.0, page_faults=0.0,
        passes=[Pass([1.0] * 6, [ratio.median] * 6 if ratio else [], rounds=7, calls=5, page_faults=0.0)],
    )  # fmt: skip


@pytest.fixture
def report():
    """One case, twice as fast as eager [1.8, 2.2]."""
    case = Case("linear", "nf4_linear", 3, 128, 64, weight="nf4", suites=("smoke",))
    contestants = [
        ContestantResult("peft_kernels", "measured", None, 1e-7, 0.1, 1024, None, measurement(None)),
        ContestantResult("eager", "measured", None, 2e-7, 0.2, 2048, 96, measurement(Band(2.0, 1.8, 2.2))),
        ContestantResult("bitsandbytes", "missing", "bitsandbytes is not installed"),
    ]
    result = CaseResult(
        case.name,
        case,
        1,
        8,
        100,
        50,
        25,
        0.5,
        "memory",
        "measured",
        contestants,
        Gate("eager", 2.0, 1.8),
        "wall clock",
        1.5,
    )
    settings = Settings(
        *("smoke", ["linear"], "*", ["eager", "bitsandbytes"], [], [1], 1, 0.2, 0.95, None, False, 0, "cpu"),
        "python -m peft_kernels.bench --suite smoke",
    )
    roofline = Roofline(1, 11.0, 7.0, {"float32": 150.0})
    created = "2026-01-01T00:00:00+00:00"
    return Report(SCHEMA_VERSION, created, machine_facts(), settings, [roofline], [result], False)


@pytest.fixture
def result_of(report):
    """Makes the result of a case: ms of ours, and of every baseline the ratio, or None where it has no time.

    `ours`: fields of ours to change, such as scratch_bytes; `page_faults`: of a call of ours.
    """

    def result_of(case, threads=1, ms=1.0, width=0.02, page_faults=0.0, ours=(), **ratios):
        def timed(ratio=None):
            own = ms * (ratio or 1.0)
            time = Band(own, own * (1 - width / 2), own * (1 + width / 2))
            band = None if ratio is None else Band(ratio, ratio * 0.9, ratio * 1.1)
            return dataclasses.replace(measurement(band), ms=time, page_faults=page_faults)

        contestants = [ContestantResult(OURS, "measured", measurement=timed(), **dict(ours))]
        for name, ratio in ratios.items():
            status, speed = ("noisy", None) if ratio is None else ("measured", timed(ratio))
            contestants.append(ContestantResult(name.replace("_", "-"), status, measurement=speed))
        return dataclasses.replace(
            report.cases[0], name=case.name, case=case, threads=threads, contestants=contestants, gate=None
        )

    return result_of


@pytest.fixture
def with_flops():
    """Gives every contestant of a result the GFLOP/s that its milliseconds and the case's FLOPs come to."""

    def rated(each, flops):
        if each.measurement is None:
            return each
        speed = dataclasses.replace(each.measurement, gflop_s=flops / (each.measurement.ms.median * 1e6))
        return dataclasses.replace(each, measurement=speed)

    def with_flops(result):
        contestants = [rated(each, result.flops) for each in result.contestants]
        return dataclasses.replace(result, contestants=contestants)

    return with_flops


@pytest.fixture
def report_of(report):
    """Makes the report of a suite from results."""

    def report_of(suite, results, **settings):
        counts = sorted({result.threads for result in results})
        settings = {"suite": suite, "threads": counts, "fail_below": None, **settings}
        return dataclasses.replace(
            report, cases=list(results), settings=dataclasses.replace(report.settings, **settings)
        )

    return report_of
