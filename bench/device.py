"""What a run measures on: the clock, the memory and the tensors of the CPU or of a CUDA GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from .case import Case, Program
from .measure import Contestant, LocalContestant
from .stats import Sample
from .worker import Workers

Calls = Mapping[str, Sequence[Callable[[], Any]]]  # contestant -> a call for every copy of the weight
_WARM_UP = 3  # calls before a graph is captured: libraries choose algorithms, autotuning ends


# Other people's libraries meet machines and versions that nobody has tried: a row says so, others go on.
FAILURES = (AttributeError, ImportError, RuntimeError, TypeError, ValueError)


class Device(Protocol):
    """Where contestants run."""

    name: str  # as torch has it
    failures: tuple[type[Exception], ...]  # what a contestant may raise without ending the run

    def tensors(self) -> AbstractContextManager[Any]:
        """Within it, tensors are made on this device unless somebody says otherwise."""

    def synchronize(self) -> None:
        """Wait until all that was launched is done."""

    def timer(self, calls: Calls) -> tuple[dict[str, Contestant], str]:
        """Contestants that can be timed, and the name of the clock they share."""

    def memory(
        self, case: Case, programs: Mapping[str, Program], threads: int, results: int
    ) -> dict[str, int]:
        """Scratch bytes of a call of every program, beyond the bytes of its results; {} if unknown."""


class CPU:
    """Wall clock and CPU time in this process; memory in a child process."""

    name = "cpu"
    failures: tuple[type[Exception], ...] = FAILURES

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def tensors(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass

    def timer(self, calls: Calls) -> tuple[dict[str, Contestant], str]:
        return {name: LocalContestant(copies) for name, copies in calls.items()}, "wall clock"

    def memory(
        self, case: Case, programs: Mapping[str, Program], threads: int, results: int
    ) -> dict[str, int]:
        worker = self._workers.memory()
        return worker.request("scratch", case, list(programs), threads) if worker else {}


class GPU:
    """CUDA events around calls that find nothing in the L2 cache.

    Calls are captured in CUDA graphs, which leaves the time of the GPU alone. Where one contestant of a case
    cannot be captured, all of them are launched call by call, as a user does: the clock's name says so. The
    flush before a call keeps the GPU busy while the call is being launched; only what takes longer to launch
    than to flush shows the time of the launches.

    Args:
        cuda: the module `torch.cuda`.
    """

    name = "cuda"
    failures: tuple[type[Exception], ...]

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._capture_failed = False
        self.failures = (*FAILURES, *_triton_errors())

    @contextlib.contextmanager
    def tensors(self) -> Iterator[None]:
        with torch.device(self.name), self._cuda.stream(self._stream):
            yield

    def synchronize(self) -> None:
        self._cuda.synchronize()

    def timer(self, calls: Calls) -> tuple[dict[str, Contestant], str]:
        with self._cuda.stream(self._stream):
            for call in (call for copies in calls.values() for call in copies):
                for _ in range(_WARM_UP):
                    call()
            self.synchronize()
            timed = self._graphs(calls)
        clock = "launches" if timed is None else "CUDA graphs"
        return {name: _Events(self, copies) for name, copies in (timed or calls).items()}, clock

    def memory(
        self, case: Case, programs: Mapping[str, Program], threads: int, results: int
    ) -> dict[str, int]:
        sizes = {}
        with self._cuda.stream(self._stream):
            for name, program in programs.items():
                program.call()  # what the first call leaves behind is there from now on
                self.synchronize()
                self._cuda.reset_peak_memory_stats()
                before = self._cuda.memory_allocated()
                program.call()
                self.synchronize()
                sizes[name] = max(0, self._cuda.max_memory_allocated() - before - results)
        return sizes

    def _graphs(self, calls: Calls) -> Calls | None:
        """The calls as replays of graphs; None where one of them cannot be captured.

        What waits for the GPU, such as a copy to the host, is found without a capture: one that fails leaves
        torch's allocator (before 2.13 its generators too) in the midst of it. No other is begun after one.
        """
        if self._capture_failed or not all(map(self._never_waits, itertools.chain(*calls.values()))):
            return None
        try:
            return {name: [self._captured(call) for call in copies] for name, copies in calls.items()}
        except RuntimeError:  # something else that a graph cannot hold
            self._capture_failed = True
            self.synchronize()
            return None

    def _never_waits(self, call: Callable[[], Any]) -> bool:
        self._cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return False
        finally:
            self._cuda.set_sync_debug_mode("default")
        return True

    def _captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph, stream=self._stream):
            results = call()

        def replay(_: Any = results) -> None:  # the graph writes into these results
            graph.replay()

        return replay

    @functools.cached_property
    def _stream(self) -> Any:
        """Where all happens: autograd calls backward on the stream of the forward, and no graph can be
        captured on the default stream."""
        return self._cuda.Stream()

    @functools.cached_property
    def _buffer(self) -> torch.Tensor:
        size = 2 * self._cuda.get_device_properties().L2_cache_size
        return torch.empty(size, dtype=torch.uint8, device=self.name)

    def sample(self, calls: Iterator[Callable[[], Any]], count: int) -> Sample:
        """Time the next calls, each from a flushed cache."""
        events = []
        with self._cuda.stream(self._stream):
            for call in itertools.islice(calls, count):
                start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
                self._flush()
                start.record()
                call()
                end.record()
                events.append((start, end))
        self.synchronize()
        seconds = sum(start.elapsed_time(end) for start, end in events) / 1e3
        return Sample(seconds, seconds, count)  # nothing else runs on it: no sample is disturbed

    def _flush(self) -> None:
        self._buffer.zero_()


class _Events:
    """A contestant on a GPU; successive calls rotate over its copies of the weight."""

    def __init__(self, gpu: GPU, calls: Sequence[Callable[[], Any]]) -> None:
        self._gpu, self._rotation = gpu, itertools.cycle(calls)

    def sample(self, calls: int) -> Sample:
        return self._gpu.sample(self._rotation, calls)


def _triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises for a kernel that a GPU cannot take: no RuntimeError."""
    if importlib.util.find_spec("triton") is None:
        return ()
    from triton.errors import TritonError

    return (TritonError,)


def why_no_cuda() -> str | None:
    """Why this machine has no CUDA GPU to measure on; None if it has."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU or no driver"


def describe_gpu(cuda: Any = torch.cuda) -> str:
    """Name, architecture, size, caches, driver and CUDA of the current GPU."""
    facts = cuda.get_device_properties()
    return (
        f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.multi_processor_count} SMs, "
        f"{facts.total_memory / 2**30:.0f} GiB, L2 {facts.L2_cache_size / 2**20:.0f} MiB, "
        f"driver {_driver_version()}, CUDA {torch.version.cuda}"
    )


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} from nvidia-smi)"
    return run.stdout.split("\n")[0].strip()
