"""Run one case: check every contestant, then memory, then time; it yields a `CaseResult`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from . import memory
from .case import CHECK_SEED, OURS, TUNED_SUFFIX, Case, Prepared, Program, Unavailable
from .device import CPU, Device
from .gate import gate_of
from .machine import usable_processors
from .measure import Budget, Rounds, interleave
from .oracle import compare
from .rating import Work, passes_of, rate
from .registry import baselines, prepare
from .results import CaseResult, ContestantResult, finite
from .roofline import Roofline
from .worker import RemoteContestant, Workers

Results = dict[str, ContestantResult]


@dataclass
class CaseRunner:
    """Runs cases with the settings of one run.

    Attributes:
        baselines: names of `case.BASELINES` to measure against, where they apply.
        budget: time per case.
        seed: of the order of contestants.
        workers: child processes.
        rooflines: limits by thread count.
        tick: called outside of any timing, for a progress bar.
        scratch_of_all: whether to measure the scratch memory of baselines too, which takes seconds a case.
        device: where to measure; None: the CPU.
    """

    baselines: Collection[str]
    budget: Budget
    seed: int
    workers: Workers
    rooflines: dict[int, Roofline]
    tick: Callable[[], None] = field(default=lambda: None)
    scratch_of_all: bool = True
    device: Device | None = None
    _last: tuple[Case, Prepared] | None = field(default=None, init=False, repr=False)

    def run(self, case: Case, threads: int, earlier: CaseResult | None = None) -> CaseResult:
        """Check, measure and rate one case; with `earlier`, the result so far, add another pass to it.

        Another pass has new tensors, checks nothing again, and leaves out what takes seconds to set up.
        """
        start, clock = time.perf_counter(), ""
        device = CPU(self.workers) if self.device is None else self.device
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(usable_processors())  # preparing and checking are not timed
            with device.tensors():
                prepared = self._prepare(case)
                roofline_ms, bound = self.rooflines[threads].milliseconds(prepared, case.dtype)
                if earlier:
                    results = {result.name: result for result in earlier.contestants}
                    programs = _rebuild(prepared, results)
                else:
                    names = [name for name in baselines(case) if name in self.baselines]
                    results, programs = self._check(device, prepared, names, threads)
            if OURS in programs and results[OURS].status != "failed":
                torch.set_num_threads(threads)
                if not earlier:
                    results = self._measure_memory(device, case, prepared, results, programs, threads)
                rounds, results, clock = self._measure_time(device, case, results, programs, threads, earlier)
                results |= _rate(results, rounds, threads, Work.of(prepared, roofline_ms))
        finally:
            torch.set_num_threads(before)
            gc.collect()
        return CaseResult(
            name=case.name,
            case=case,
            threads=threads,
            copies=prepared.copies,
            flops=prepared.flops,
            read_bytes=prepared.read_bytes,
            write_bytes=prepared.write_bytes,
            roofline_ms=roofline_ms,
            bound=bound,
            status=results[OURS].status,
            contestants=list(results.values()),
            gate=gate_of(results.values()),
            clock=clock,
            seconds=time.perf_counter() - start + (earlier.seconds if earlier else 0.0),
        )

    def _prepare(self, case: Case) -> Prepared:
        """Tensors and oracle of a case, the same ones while thread counts follow one another."""
        if self._last is None or self._last[0] != case:
            self._last = None  # free the last case first: it may hold a gigabyte
            self._last = case, prepare(case)
        return self._last[1]

    def _check(
        self, device: Device, prepared: Prepared, names: Collection[str], threads: int
    ) -> tuple[Results, dict[str, list[Program]]]:
        """Build every contestant and compare its results with the oracle."""
        results: Results = {}
        programs: dict[str, list[Program]] = {}
        for name in (OURS, *names):
            self.tick()
            if name.endswith(TUNED_SUFFIX):  # the same code in another process: its check is the stock one's
                results[name] = ContestantResult(name, "measured")
                continue
            try:
                results[name], programs[name] = _check_contestant(prepared, name, threads)
            except Unavailable as unavailable:
                results[name] = ContestantResult(name, "missing", str(unavailable))
            except device.failures as error:
                status: Literal["failed", "missing"] = "failed" if name == OURS else "missing"
                results[name] = ContestantResult(name, status, f"{type(error).__name__}: {error}")
            if name == OURS and results[name].status != "measured":
                break  # there is nothing to compare with
        return results, programs

    def _measure_memory(
        self,
        device: Device,
        case: Case,
        prepared: Prepared,
        results: Results,
        programs: dict[str, list[Program]],
        threads: int,
    ) -> Results:
        self.tick()
        names = list(programs) if self.scratch_of_all else [OURS]
        first = {name: programs[name][0] for name in names}
        scratch = device.memory(case, first, threads, prepared.write_bytes)
        with device.tensors():
            saved = {name: memory.saved_bytes(copies[0]) for name, copies in programs.items()}
        return results | {
            name: replace(results[name], scratch_bytes=scratch.get(name), saved_bytes=saved[name])
            for name in programs
        }

    def _measure_time(
        self,
        device: Device,
        case: Case,
        results: Results,
        programs: dict[str, list[Program]],
        threads: int,
        earlier: CaseResult | None,
    ) -> tuple[Rounds, Results, str]:
        contestants, clock = device.timer(
            {name: [program.call for program in copies] for name, copies in programs.items()}
        )
        for name in results:
            if name.endswith(TUNED_SUFFIX) and not earlier:
                try:
                    stock = name.removesuffix(TUNED_SUFFIX)
                    contestants[name] = RemoteContestant(self.workers.tuned(), case, stock, threads)
                except Unavailable as unavailable:
                    results = results | {name: ContestantResult(name, "missing", str(unavailable))}
        return interleave(contestants, OURS, threads, self.budget, self.seed, self.tick), results, clock


def _rebuild(prepared: Prepared, results: Results) -> dict[str, list[Program]]:
    """The programs of another pass: of whoever could run in the first, but for what is costly to set up."""
    return {
        name: prepared.contestants[name]()
        for name, result in results.items()
        if result.status in ("measured", "noisy") and name != "compile" and not name.endswith(TUNED_SUFFIX)
    }


def _rate(results: Results, rounds: Rounds, threads: int, work: Work) -> Results:
    """The results of this pass's contestants, with this pass added to those they have."""
    rated = {}
    for name, this in passes_of(rounds, threads).items():
        before = results[name].measurement
        rated[name] = rate(results[name], [*(before.passes if before else ()), this], work)
    return rated


def _check_contestant(prepared: Prepared, name: str, threads: int) -> tuple[ContestantResult, list[Program]]:
    many = torch.get_num_threads()
    programs = prepared.contestants[name]()
    torch.set_num_threads(threads)
    torch.manual_seed(CHECK_SEED)
    outputs = programs[0].outputs(programs[0].call())
    torch.set_num_threads(many)
    oracle = prepared.oracle(name)
    if oracle is None:
        return ContestantResult(name, "measured"), programs
    check = compare(outputs, oracle)
    if name == OURS and not check.passed:
        reason = f"{check.worst} is off by {check.tolerance_used:.3g} times its tolerance"
        return ContestantResult(
            name, "failed", reason, finite(check.error), finite(check.tolerance_used)
        ), programs
    result = ContestantResult(
        name, "measured", error=finite(check.error), tolerance_used=finite(check.tolerance_used)
    )
    return result, programs
