import pytest
from peft_kernels.bench.case import Case
from peft_kernels.bench.machine import machine_facts
from peft_kernels.bench.results import (
    CaseResult,
    ContestantResult,
    Gate,
    Measurement,
    Report,
    Settings,
)
from peft_kernels.bench.roofline import Roofline
from peft_kernels.bench.stats import Band


def measurement(ratio):
    return Measurement(
        ms=Band(1.0, 0.9, 1.1), ratio=ratio, gb_s=3.0, gflop_s=None, roofline_percent=40.0, calls=5, rounds=6,
        dropped=1, samples_ms=[1.0] * 6,
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
        1.5,
    )
    settings = Settings("smoke", ["linear"], "*", ["eager", "bitsandbytes"], [1], 0.2, 0.95, 0)
    roofline = Roofline(1, 11.0, 7.0, {"float32": 150.0})
    return Report(1, "2026-01-01T00:00:00+00:00", machine_facts(), settings, [roofline], [result], False)
