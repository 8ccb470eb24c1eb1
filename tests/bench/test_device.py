"""Measuring on a GPU, without one: a stand-in for torch.cuda, refusals, and all that is built before."""

import contextlib
import dataclasses
import types

import pytest
import torch
from peft_kernels.bench import __main__ as command_line
from peft_kernels.bench import baselines, device
from peft_kernels.bench.__main__ import main
from peft_kernels.bench.case import Case, Program
from peft_kernels.bench.cases_model import model_case
from peft_kernels.bench.device import CPU, GPU, describe_gpu, why_no_cuda
from peft_kernels.bench.gate import EXIT_NO_DEVICE
from peft_kernels.bench.markdown import markdown
from peft_kernels.bench.measure import Budget
from peft_kernels.bench.registry import select
from peft_kernels.bench.results import read_json
from peft_kernels.bench.roofline import Roofline, measure_gpu_roofline
from peft_kernels.bench.run import CaseRunner
from peft_kernels.bench.worker import Workers

from peft_kernels import functional

CASE = Case("linear", "nf4_linear", 3, 128, 64, weight="nf4", dtype="bfloat16", suites=("gpu",))
MODEL = model_case("train_step", "llama-tiny:2-layers", 24, "bfloat16", suites=("gpu",))
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


class FakeCuda:
    """torch.cuda whose clock advances by what calls say they take; everything happens on the CPU."""

    def __init__(self, capturable=True):
        self.now, self.log, self.capturable, self.capturing = 0.0, [], capturable, False
        self.captures, self.sync_debug_mode = 0, "default"
        self.allocated = self.peak = 1000

    def get_device_properties(self):
        sizes = {"multi_processor_count": 132, "total_memory": 80 << 30, "L2_cache_size": 4096}
        return types.SimpleNamespace(name="Fake 1", major=9, minor=0, **sizes)

    def Event(self, enable_timing):
        assert enable_timing
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.now

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        return Event()

    def set_sync_debug_mode(self, mode):
        self.sync_debug_mode = mode

    def work(self, name, seconds, scratch=0, waits=False):
        """A call that takes so long on the GPU, and waits for it or not."""

        def call():
            if waits and self.sync_debug_mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            if not self.capturable and self.capturing:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.log.append(name)
            if not self.capturing:
                self.now += seconds
            self.peak = max(self.peak, self.allocated + scratch)
            return name

        return call

    def CUDAGraph(self):
        return types.SimpleNamespace(replay=None)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing, start = True, len(self.log)
        self.captures += 1
        try:
            yield
        finally:
            self.capturing = False
        recorded = self.log[start:]
        del self.log[start:]

        def replay():
            self.log.extend(f"graph of {name}" for name in recorded)
            self.now += 0.5  # less than a launch

        graph.replay = replay

    def Stream(self):
        return types.SimpleNamespace()

    def stream(self, _):
        return contextlib.nullcontext()

    def synchronize(self):
        self.log.append("synchronize")

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.peak


@pytest.fixture
def gpu_of(monkeypatch):
    """A GPU on a stand-in for torch.cuda, whose tensors are on the CPU."""
    monkeypatch.setattr(GPU, "name", "cpu")

    def gpu_of(cuda):
        gpu = GPU(cuda)
        flush = gpu._flush
        gpu._flush = lambda: (flush(), cuda.log.append("flush"), setattr(cuda, "now", cuda.now + 100.0))
        return gpu

    return gpu_of


def test_events_time_the_calls_and_not_the_flushes(gpu_of):
    cuda = FakeCuda(capturable=False)
    contestants, clock = gpu_of(cuda).timer({"a": [cuda.work("a0", 1.0), cuda.work("a1", 3.0)]})
    assert clock == "launches"
    cuda.log.clear()
    sample = contestants["a"].sample(3)
    assert cuda.log == ["flush", "a0", "flush", "a1", "flush", "a0", "synchronize"]
    assert sample.wall == pytest.approx(5.0)
    assert (sample.cpu, sample.calls, sample.seconds) == (sample.wall, 3, pytest.approx(5 / 3))


def test_graphs_are_replayed_where_all_can_be_captured(gpu_of):
    cuda = FakeCuda()
    contestants, clock = gpu_of(cuda).timer({"a": [cuda.work("a", 1.0)], "b": [cuda.work("b", 2.0)]})
    assert clock == "CUDA graphs"
    # Warm; what waits for the GPU looked for; captured without running.
    assert cuda.log == ["a"] * 3 + ["b"] * 3 + ["synchronize", "a", "b"]
    cuda.log.clear()
    assert contestants["b"].sample(2).wall == pytest.approx(1.0)
    assert cuda.log == ["flush", "graph of b", "flush", "graph of b", "synchronize"]


def test_one_contestant_without_a_graph_has_all_of_them_launched(gpu_of):
    cuda = FakeCuda()
    other = FakeCuda(capturable=False)
    refuses = other.work("b", 2.0)

    def call():
        other.capturing = cuda.capturing
        return refuses()

    contestants, clock = gpu_of(cuda).timer({"a": [cuda.work("a", 1.0)], "b": [call]})
    assert clock == "launches"
    assert contestants["a"].sample(1).wall == pytest.approx(1.0)


def test_a_call_that_waits_for_the_gpu_is_found_before_any_capture(gpu_of):
    """A capture that fails would spoil torch's allocator for all cases after it."""
    cuda = FakeCuda()
    gpu = gpu_of(cuda)
    calls = {"a": [cuda.work("a", 1.0)], "b": [cuda.work("b", 2.0, waits=True)]}
    contestants, clock = gpu.timer(calls)
    assert (clock, cuda.captures, cuda.sync_debug_mode) == ("launches", 0, "default")
    assert contestants["b"].sample(1).wall == pytest.approx(2.0)
    assert gpu.timer({"a": calls["a"]})[1] == "CUDA graphs"


def test_after_a_failed_capture_there_is_no_other(gpu_of):
    cuda = FakeCuda(capturable=False)
    gpu = gpu_of(cuda)
    for _ in range(2):
        assert gpu.timer({"a": [cuda.work("a", 1.0)]})[1] == "launches"
    assert cuda.captures == 1


def test_the_flush_covers_the_cache(gpu_of):
    gpu = gpu_of(FakeCuda())
    assert gpu._buffer.nbytes == 2 * 4096
    gpu._buffer.fill_(1)
    gpu._flush()
    assert not gpu._buffer.any()


def test_memory_is_the_peak_beyond_what_was_there_and_results(gpu_of):
    cuda = FakeCuda()
    programs = {
        "a": Program(cuda.work("a", 1.0, scratch=500), dict),
        "b": Program(cuda.work("b", 1.0, 70), dict),
    }
    assert gpu_of(cuda).memory(CASE, programs, 1, 100) == {"a": 400, "b": 0}


@pytest.mark.filterwarnings("default")  # of the libraries that whole models are made of
@pytest.mark.parametrize(("case", "baseline"), [(CASE, "eager"), (MODEL, "peft")])
def test_a_case_on_a_gpu_end_to_end(gpu_of, case, baseline):
    """Checks, memory, interleaved time and rates, all of them real but the clock: half a second a replay."""
    with Workers() as workers:
        roofline = Roofline(1, 10.0, 10.0, {"float32": 100.0, "bfloat16": 100.0})
        gpu = gpu_of(FakeCuda())
        runner = CaseRunner([baseline], Budget(0.0, 0.0), 0, workers, {1: roofline}, device=gpu)
        result = runner.run(case, 1)
    ours, other = result.contestants
    assert (result.status, result.clock) == ("measured", "CUDA graphs")
    assert ours.tolerance_used <= 1
    assert ours.scratch_bytes == 0
    assert ours.measurement.ms.median == pytest.approx(500.0)
    assert other.measurement.ratio.median == pytest.approx(1.0)
    assert ours.measurement.dropped == 0


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize(("broken", "status"), [("nf4_linear", "failed"), ("eager_nf4_linear", "measured")])
def test_a_contestant_that_raises_does_not_end_the_run(gpu_of, monkeypatch, on_gpu, broken, status):
    def fails(*_):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(functional if status == "failed" else baselines, broken, fails)
    with Workers() as workers:
        roofline = Roofline(1, 10.0, 10.0, {"float32": 100.0, "bfloat16": 100.0})
        device = gpu_of(FakeCuda()) if on_gpu else None
        runner = CaseRunner(["eager"], Budget(0.0, 0.0), 0, workers, {1: roofline}, device=device)
        result = runner.run(CASE, 1)
        assert result.status == status
        assert result.contestants[-1].reason == "RuntimeError: no kernel image is available"


def test_what_triton_raises_does_not_end_the_run():
    errors = pytest.importorskip("triton.runtime.errors")
    assert issubclass(errors.OutOfResources, GPU(FakeCuda()).failures)


def test_limits_of_a_gpu_are_measured(gpu_of, monkeypatch):
    monkeypatch.setattr("peft_kernels.bench.roofline._LARGEST_BUFFER", 1 << 16)
    monkeypatch.setattr("peft_kernels.bench.roofline._GPU_MATRIX", 32)
    cuda = FakeCuda()
    limits = measure_gpu_roofline(["bfloat16"], gpu_of(cuda))
    assert sorted(limits.gflop_s) == ["bfloat16", "float32"]
    assert limits.read_gb_s > 0
    assert "synchronize" in cuda.log


def test_without_a_gpu_there_is_one_line_and_a_status_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "why_no_cuda", lambda: "torch 9.9 is built without CUDA")
    assert main(["--device", "cuda"]) == EXIT_NO_DEVICE
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "no CUDA GPU to measure on: torch 9.9 is built without CUDA\n"


@WITHOUT_GPU
def test_the_reason_is_found():
    assert why_no_cuda().startswith(f"torch {torch.__version__} ")
    assert main(["--device", "cuda"]) == EXIT_NO_DEVICE == 4


def test_cases_can_be_listed_without_a_gpu(capsys):
    assert main(["--device", "cuda", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert names == [case.name for case in select("gpu")]
    assert main(["--device", "cuda", "--suite", "smoke", "--list"]) == 0
    assert capsys.readouterr().out.split() == [case.name for case in select("smoke")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threads", "2"], "threads must be left out with --device cuda"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--baseline", "eager,peft-tuned"], "one that runs on a GPU with --device cuda, got peft-tuned"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words, capsys):
    with pytest.raises(SystemExit) as status:
        main(["--device", "cuda", *options])
    assert status.value.code == 2
    assert words in capsys.readouterr().err


def test_a_run_writes_its_table(monkeypatch, tmp_path, capsys, result_of):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "why_no_cuda", lambda: None)
    monkeypatch.setattr(command_line, "describe_gpu", lambda: "Fake 1, sm_90, driver 555")
    monkeypatch.setattr(command_line, "measure_gpu_roofline", lambda dtypes, gpu: Roofline(1, 3e3, 3e3, {}))
    monkeypatch.setattr(
        CaseRunner, "run", lambda self, case, threads, earlier: result_of(case, threads, eager=2.0, peft=None)
    )
    assert main(["--device", "cuda", "--filter", "nf4_linear/forward/M1-*", "--json", "out.json"]) == 0
    table = (tmp_path / "bench-cuda.md").read_text()
    assert "- device: Fake 1, sm_90, driver 555" in table
    assert "- date: 20" in table
    assert f"torch {torch.__version__}" in table
    (row,) = (line for line in table.splitlines() if "M1-K4096-N4096" in line)
    assert "| 2.00× [1.80, 2.20] | noisy: None |" in row
    report = read_json(tmp_path / "out.json")
    assert (report.settings.device, report.machine.gpu) == ("cuda", "Fake 1, sm_90, driver 555")
    assert report.settings.threads == [1]


@pytest.mark.parametrize("suite", ["full", "limits"])
def test_threads_are_of_the_cpu(monkeypatch, suite):
    seen = []
    monkeypatch.setattr(command_line, "why_no_cuda", lambda: None)
    monkeypatch.setattr(command_line, "run", lambda cases, settings, *_: seen.append(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--device", "cuda", "--suite", suite])
    assert seen[0].threads == [1]
    assert not [name for name in seen[0].baselines if name.endswith("-tuned")]  # which are timed on the CPU


def test_a_wrong_result_has_no_speed_in_the_table(report_of, result_of):
    wrong = result_of(CASE)
    ours = dataclasses.replace(wrong.contestants[0], status="failed", reason="y is off", measurement=None)
    table = markdown(report_of("gpu", [dataclasses.replace(wrong, contestants=[ours])]))
    assert "| failed: y is off |" in table
    assert "ms ±" not in table.split("---|")[-1]


def test_a_gpu_is_described(monkeypatch):
    monkeypatch.setattr(device, "_driver_version", lambda: "555.42")
    text = describe_gpu(FakeCuda())
    assert text == f"Fake 1, sm_90, 132 SMs, 80 GiB, L2 0 MiB, driver 555.42, CUDA {torch.version.cuda}"


def test_the_driver_is_unknown_without_its_tool(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert device._driver_version() == "unknown (FileNotFoundError from nvidia-smi)"


def test_the_cpu_is_the_default(monkeypatch):
    with Workers() as workers:
        contestants, clock = CPU(workers).timer({"a": [lambda: None]})
    assert clock == "wall clock"
    assert contestants["a"].sample(2).calls == 2
