"""The benchmark's own checks, as they will be on a GPU, on our kernels in the emulator."""

import pytest
import torch
from peft_kernels.bench.case import CHECK_SEED, OURS
from peft_kernels.bench.oracle import compare
from peft_kernels.bench.registry import prepare

import gpuless
import peft_kernels as pk
from gpuless.traffic_tables import EXECUTED


@pytest.mark.parametrize("case", EXECUTED, ids=lambda case: case.name)
def test_the_check_is_green(case, monkeypatch):
    # Tolerances are then those of a GPU; tensors are on the CPU, where the emulator is.
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    prepared = prepare(case)
    with gpuless.device(80) as gpu, pk.use_backend("triton"):
        (program,) = prepared.contestants[OURS]()
        gpu.launches.clear()
        torch.manual_seed(CHECK_SEED)
        results = program.call()
        assert gpu.launches
    found = compare(program.outputs(results), prepared.oracle(OURS))
    assert found.passed, f"{found.worst} is off by {found.tolerance_used:.2f} times its tolerance"
