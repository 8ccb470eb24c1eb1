"""Child processes: one whose allocator is tuned, one that measures memory.

Why a process for the allocator: glibc reads its settings once, at start. Changing them with mallopt(3)
around a call is not sound: any such call switches the dynamic mmap threshold off for good, and pages that
the tuned call leaves in the heap would then serve the stock baseline too. Why a forked child for every
case's memory: buffers that one case leaves behind must not be there for the next.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import memory, registry
from .baselines import require
from .case import Case, Unavailable
from .measure import LocalContestant, page_faults
from .stats import Sample

TUNED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",  # never a mapping of its own, which is fresh, zeroed pages at every call
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),  # never give freed pages back
}
_SETTLING_CALLS = (
    24  # freed aligned blocks leave holes that are too small until neighbours have merged; seen: 12
)
_SPIN_SECONDS = (
    0.02  # an idle OpenMP pool busy-waits for some milliseconds; the other process must not time that
)
_PROBE_BYTES = 64 << 20


class Worker:
    """A child process with its own environment, doing one request at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child,))
        with _environment(environment), _ctrl_c_ignored():
            self._process.start()
        child.close()

    def request(self, name: str, *arguments: Any) -> Any:
        """Have the child run one of the functions below.

        Raises:
            Unavailable: as in the child.
            RuntimeError: the child died (its own message is on stderr).
        """
        try:
            self._connection.send((name, arguments))
            reply = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"benchmark worker died while doing {name}{arguments}") from error
        if isinstance(reply, Unavailable):
            raise reply
        return reply

    def close(self) -> None:
        """End the child."""
        self._connection.close()
        self._process.join()


class Workers:
    """The child processes of a run, started when first needed and ended with the context."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._tuned: Worker | Unavailable | None = None
        self._memory: Worker | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tuned(self) -> Worker:
        """The one whose allocator is tuned.

        Raises:
            Unavailable: the tuning has no effect on this system.
        """
        if self._tuned is None:
            worker = self._start(TUNED_ALLOCATOR)
            try:
                worker.request("check_tuned")
                self._tuned = worker
            except Unavailable as unavailable:
                self._tuned = unavailable
        if isinstance(self._tuned, Unavailable):
            raise self._tuned
        return self._tuned

    def memory(self) -> Worker | None:
        """The one that measures scratch memory; None on systems that cannot."""
        if self._memory is None and memory.can_measure_scratch():
            self._memory = self._start({})
        return self._memory

    def _start(self, environment: Mapping[str, str]) -> Worker:
        worker = Worker(environment)
        self._stack.callback(worker.close)
        return worker


class RemoteContestant:
    """A contestant timed in a worker while this process waits."""

    def __init__(self, worker: Worker, case: Case, name: str, threads: int) -> None:
        self._worker = worker
        self._pause = _SPIN_SECONDS if threads > 1 else 0.0
        worker.request("prepare", case, name, threads)

    def sample(self, calls: int) -> Sample:
        time.sleep(self._pause)
        sample: Sample = self._worker.request("sample", calls)
        time.sleep(self._pause)
        return sample


class _Served:
    """What a child can be asked for."""

    def __init__(self) -> None:
        self._contestant: LocalContestant | None = None

    def check_tuned(self) -> None:
        """Whether the allocator settings have an effect: freed memory must come back without page faults."""
        faults = [_faults_of(lambda: torch.empty(_PROBE_BYTES, dtype=torch.uint8).fill_(1))]
        for _ in range(_SETTLING_CALLS):
            faults.append(_faults_of(lambda: torch.empty(_PROBE_BYTES, dtype=torch.uint8).fill_(1)))
        if faults[-1] > faults[0] // 10:
            raise Unavailable("the allocator of this system does not take glibc's settings")

    def prepare(self, case: Case, name: str, threads: int) -> None:
        self._contestant = None  # free the last case first
        torch.set_num_threads(threads)
        programs = registry.prepare(case).contestants[name]()
        _settle([program.call for program in programs])
        self._contestant = LocalContestant([program.call for program in programs])

    def sample(self, calls: int) -> Sample:
        if self._contestant is None:
            raise RuntimeError("prepare must come before sample")
        return self._contestant.sample(calls)

    def scratch(self, case: Case, names: list[str], threads: int) -> dict[str, int]:
        """Scratch memory of contestants, in a forked child: this process must not have run threads."""
        torch.set_num_threads(1)
        memory.warm_up()  # here, so that the children find everything imported
        for library in ("bitsandbytes", "peft"):
            with contextlib.suppress(Unavailable):
                require(library)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(
            target=_scratch, args=(sender, case, names, threads)
        )
        child.start()
        sender.close()
        result: dict[str, int] = receiver.recv()
        child.join()
        return result


def _faults_of(call: Callable[[], Any]) -> int:
    start = page_faults()
    call()
    return page_faults() - start


def _settle(calls: Sequence[Callable[[], Any]]) -> None:
    """Call until a call and the one before it need hardly any new pages: the state a long run is in."""
    most = last = _faults_of(calls[0])
    for call in itertools.islice(itertools.cycle(calls), _SETTLING_CALLS):
        faults = _faults_of(call)
        most = max(most, faults)
        if max(faults, last) <= most // 10:
            return
        last = faults


def _scratch(sender: Connection, case: Case, names: list[str], threads: int) -> None:
    torch.set_num_threads(threads)
    memory.warm_up()
    prepared = registry.prepare(case)
    sizes = {}
    for name in names:
        with contextlib.suppress(Unavailable):
            sizes[name] = memory.scratch_bytes(prepared.contestants[name]()[0], prepared.write_bytes)
    sender.send(sizes)


def _serve(connection: Connection) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # the parent has said it already
    served = _Served()
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is done, or gone
        while True:
            name, arguments = connection.recv()
            try:
                reply = getattr(served, name)(*arguments)
            except Unavailable as unavailable:
                reply = unavailable
            connection.send(reply)


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C from their first instruction on, while they import too.

    It is for the parent, which then closes the connection.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
