"""A kernel, parsed: typed instructions, register slots, shared, local and global symbols, parameters."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

# Bits of a register that holds a value of the type.
_PACKED = {"pred": 1, "f16x2": 32, "bf16x2": 32, "f32x2": 64, "tf32": 32, "bf16": 16, "e4m3": 8, "e5m2": 8,
           "e4m3x2": 16, "e5m2x2": 16}  # fmt: skip
_TYPE = re.compile(r"pred|[bus](8|16|32|64|128)|f(16|32|64)|bf16|tf32|f16x2|bf16x2|f32x2|e4m3(x2)?|e5m2(x2)?")


class ParseError(ValueError):
    """The text is not the PTX that this parser knows; the message quotes the line."""


@functools.cache
def is_type(modifier: str) -> bool:
    """Whether a modifier of an instruction is a type."""
    return _TYPE.fullmatch(modifier) is not None


@functools.cache
def type_bits(name: str) -> int:
    """Width of a value of PTX type `name` in bits."""
    return _PACKED.get(name) or int(re.sub(r"\D", "", name))


@dataclass(frozen=True, slots=True)
class Instruction:
    """One statement. ``ld.global.v2.b32 {%r1, %r2}, [%rd1+8]`` has opcode ld, modifiers (global, v2, b32),
    types (b32,).
    """

    index: int
    line: int
    text: str
    source: str  # "kernel.py:12", where .loc says so
    opcode: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None  # predicate register
    negated: bool

    def has(self, *modifiers: str) -> bool:
        """True where one of the modifiers is there."""
        return any(modifier in self.modifiers for modifier in modifiers)

    @property
    def name(self) -> str:
        """The opcode with its modifiers."""
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True)
class Symbol:
    """A variable. ``offset`` counts from the start of its space; -1 for dynamic shared memory."""

    name: str
    space: str
    offset: int
    bytes: int
    values: bytes = b""


@dataclass(eq=False)
class Program:
    """An entry, parsed."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]
    branch_tables: dict[str, list[str]]
    registers: dict[str, tuple[int, int]]  # name -> (bits, slot); slots are counted per width
    slots: dict[int, int]  # width -> number of registers
    parameters: dict[str, int]  # name -> bytes
    float_parameters: frozenset[str]
    symbols: dict[str, Symbol]
    shared_bytes: int  # static shared memory
    local_bytes: int  # a thread's
    threads: tuple[int, int, int] | None  # .reqntid
    max_threads: int | None  # .maxntid
    variables: dict = field(default_factory=dict, repr=False)  # .global and .const: name -> bytes


def split_vector(operand: str) -> list[str]:
    """``{%r1, %r2}`` -> [%r1, %r2]; any other operand is a vector of one."""
    return (
        [part.strip() for part in operand.strip("{} ").split(",")] if operand.startswith("{") else [operand]
    )


def split_address(operand: str) -> tuple[str, int]:
    """``[%rd1+8]`` -> (%rd1, 8)."""
    match = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    if not match:
        raise ParseError(f"address {operand}")
    return match[1], int(match[2] or "0", 0)
