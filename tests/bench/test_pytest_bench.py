"""`pytest bench`: the cases and statistics of the command line under pytest-benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft_kernels.bench.stats import MIN_CLEAN_ROUNDS

BENCH = Path(__file__).parents[2] / "bench"


def pytest_bench(*options):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(BENCH), *options]
    return subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_contestant_is_a_benchmark_in_the_group_of_its_case(tmp_path):
    path = tmp_path / "out.json"
    options = ("--bench-suite", "smoke", "--bench-filter", "nf4_dequantize/*", "--bench-seconds", "0.05")
    run = pytest_bench(*options, "--bench-passes", "2", "--benchmark-json", str(path))
    assert run.returncode == 0, run.stdout + run.stderr
    found = {each["params"]["contestant"]: each for each in json.loads(path.read_text())["benchmarks"]}
    if "peft_kernels" not in found:
        pytest.skip("this machine is too busy to measure on")
    assert len({each["group"] for each in found.values()}) == 1
    for name, each in found.items():
        info = each["extra_info"]
        assert (info["bytes"], info["flops"]) == (128 * 64 // 2 + 132 + 128 * 64 * 4, 0)
        assert info["error"] < 1e-5
        assert (info["ratio"] is None) == (name == "peft_kernels")
        assert each["stats"]["rounds"] >= MIN_CLEAN_ROUNDS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bench-passes", "0"], "--bench-passes must be positive, got 0"),
        (["--bench-suite", "smoke", "--bench-preset", "minilm"], "--bench-suite must be quick or full with"),
    ],
)
def test_bad_options_are_explained(options, message):
    run = pytest_bench(*options)
    assert run.returncode != 0
    assert message in (run.stdout + run.stderr)
