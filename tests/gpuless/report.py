"""What the emulator says when a kernel is wrong, and when it cannot run one."""

from __future__ import annotations

from dataclasses import dataclass

from gpuless.program import Instruction


class Unsupported(NotImplementedError):
    """The kernel uses something that is not emulated; the message names the instruction and what to do."""


@dataclass(frozen=True)
class Finding:
    """One fault of a kernel, at the first lane that showed it."""

    kind: str  # "shared race", "global out of bounds", …
    message: str
    cta: tuple[int, int, int]
    thread: int
    lanes: int  # threads at fault in this execution of the instruction
    instruction: Instruction

    def __str__(self) -> str:
        others = f" (and {self.lanes - 1} more threads)" if self.lanes > 1 else ""
        source = f", {self.instruction.source}" if self.instruction.source else ""
        return (
            f"{self.kind}: {self.message}; CTA {self.cta}, thread {self.thread}"
            f" (warp {self.thread // 32}){others}; PTX line {self.instruction.line}{source}:"
            f" {self.instruction.text}"
        )


class Report(Exception):
    """A kernel did something undefined. ``findings`` has one entry per kind of fault and instruction."""

    def __init__(self, kernel: str, findings: list[Finding]) -> None:
        self.findings = findings
        super().__init__(f"{kernel}:\n  " + "\n  ".join(map(str, findings)))
