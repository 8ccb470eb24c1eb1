"""Every instruction set that this machine has passes the native tests, not only the best one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_kernels.core.library import native_library

pytestmark = pytest.mark.skipif(not native_library().loaded, reason="native library not loaded")

TESTS = Path(__file__).parents[1]
FOLDERS = [str(TESTS / folder) for folder in ("ops", "nn", "surgery")]
# Left out is what takes long and calls no kernel in another way than the rest: how ops look to torch, graphs;
# and what runs on emulated GPUs.
LEFT_OUT = "reference or compile or opcheck or gradcheck or instruction_sets or triton or cuda or gpus"
SELECTED = f"native or not ({LEFT_OUT})"
OTHERS = sorted({*native_library().capabilities_found} - {native_library().capability or ""})
USE = """
import torch
import peft_kernels as pk
from peft_kernels.core.library import native_library
print(native_library().capability)
pk.functional.nf4_quantize(torch.ones(64))
"""


def environment(capability: str) -> dict[str, str]:
    return {**os.environ, "PEFT_KERNELS_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}


def use(capability: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", USE]
    return subprocess.run(
        command, env=environment(capability), capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The tests under each set, all at the same time: a run takes one core."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not gpuless_full", "-k", SELECTED, *FOLDERS]
    processes = {
        capability: subprocess.Popen(
            command, env=environment(capability), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for capability in OTHERS
    }
    yield processes
    for process in processes.values():
        process.kill()  # if a test was interrupted
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("capability", OTHERS)
def test_native_tests_pass_on(capability: str, runs: dict[str, subprocess.Popen[str]]) -> None:
    assert use(capability).stdout.strip() == capability
    output, _ = runs[capability].communicate()
    assert runs[capability].returncode == 0, output[-4000:]
    assert " passed" in output


@pytest.mark.slow
def test_the_best_one_is_used_unless_another_is_named() -> None:
    assert use("").stdout.strip() == native_library().capabilities_found[-1]


@pytest.mark.slow
def test_an_unknown_one_is_refused_by_a_call() -> None:
    run = use("avx1024")
    assert run.stdout.strip() == "None"
    assert run.returncode != 0
    found = ",".join(native_library().capabilities_found)
    message = f"PEFT_KERNELS_CPU_CAPABILITY must be one of {found} on this machine, got avx1024; unset it"
    assert message in run.stderr
