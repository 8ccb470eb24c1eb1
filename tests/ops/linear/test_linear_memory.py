"""No call on a 4-bit weight allocates anything of the dense weight's size: peak memory proves it."""

import subprocess
import sys

import pytest
from peft_kernels.bench.memory import can_measure_scratch

from peft_kernels.core.library import native_library

SIZE = 4096  # the dense weight would take 64 MiB
MEASURE = f"""
import torch
import peft_kernels as pk
from peft_kernels.bench.case import Program
from peft_kernels.bench.memory import scratch_bytes, warm_up
torch.set_num_threads(1)
warm_up()
n = {SIZE}
packed = torch.zeros(n * n // 2, dtype=torch.uint8)
w = pk.NF4Weight(packed, torch.ones(n * n // 64), None, (n, n), 64, torch.float32)
lora_a, lora_b = (torch.randn(shape, requires_grad=True) for shape in ((8, n), (n, 8)))
for tokens in (1, 16, 64):
    x, grad = torch.randn(tokens, n, requires_grad=True), torch.randn(tokens, n)
    def call():
        y = pk.functional.nf4_lora_linear(x, w, lora_a, lora_b, 2.0, dropout_p=0.1, seed=1)
        return y, torch.autograd.grad(y, (x, lora_a, lora_b), grad)
    results = 2 * x.nbytes + lora_a.nbytes + lora_b.nbytes
    print(scratch_bytes(Program(call, dict), results))
"""


@pytest.mark.skipif(not can_measure_scratch(), reason="needs /proc/self/clear_refs")
@pytest.mark.skipif(not native_library().loaded, reason="native library not loaded")
def test_scratch_is_a_small_part_of_the_dense_weight() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    scratch = [int(line) for line in run.stdout.split()]
    assert len(scratch) == 3
    assert max(scratch) < 4 * 2**20, scratch  # bitsandbytes: 64 MiB
