import subprocess
import sys

import pytest
import torch
from peft_kernels.bench.case import Program, differentiated
from peft_kernels.bench.memory import can_measure_scratch, saved_bytes

SCRATCH = """
import torch
from peft_kernels.bench.case import Program
from peft_kernels.bench.memory import scratch_bytes, warm_up
torch.set_num_threads(1)
warm_up()
kept = []
def call():
    if not kept:
        kept.append(torch.ones(2 << 20))  # 8 MiB that stay
    temporary = torch.ones(8 << 20)  # 32 MiB that go
    return temporary[: 1 << 20] + 1  # 4 MiB of result
print(scratch_bytes(Program(call, dict), 4 << 20))
"""


def test_saved_counts_each_storage_once_and_no_weight():
    x = torch.randn(16, 32, requires_grad=True)
    weight = torch.randn(8, 32)
    scale = torch.randn(16, 1)

    def forward():
        return ((x * scale) @ weight.T).exp()  # saves scale, weight and the result of exp

    program = differentiated("both", forward, {"dx": x}, torch.ones(16, 8), frozen=(weight,))
    assert saved_bytes(program) == scale.nbytes + 16 * 8 * 4


def test_saved_counts_the_whole_storage_behind_a_view():
    x = torch.randn(4, 4, requires_grad=True)
    large = torch.randn(1000)
    program = differentiated("both", lambda: x * large[:4], {"dx": x}, torch.ones(4, 4))
    assert saved_bytes(program) == large.nbytes


def test_nothing_is_saved_where_nothing_is_differentiated():
    assert saved_bytes(Program(lambda: None, dict)) is None


@pytest.mark.skipif(not can_measure_scratch(), reason="needs /proc/self/clear_refs")
def test_scratch_is_what_goes_and_what_stays_but_not_the_result():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRATCH], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) / 2**20 == pytest.approx(40, abs=2)
