"""PTX text -> Program: typed instructions, register slots, shared, local and global symbols, parameters.

Grammar: PTX ISA, sections 4 (syntax), 5 (state spaces, types) and 9 (instructions). Only the chosen entry is
read; functions that it calls are not.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import re
from dataclasses import dataclass, field

import numpy as np

# Bits of a register that holds a value of the type.
_PACKED = {"pred": 1, "f16x2": 32, "bf16x2": 32, "f32x2": 64, "tf32": 32, "bf16": 16, "e4m3": 8, "e5m2": 8,
           "e4m3x2": 16, "e5m2x2": 16}  # fmt: skip
_TYPE = re.compile(r"pred|[bus](8|16|32|64|128)|f(16|32|64)|bf16|tf32|f16x2|bf16x2|f32x2|e4m3(x2)?|e5m2(x2)?")
_STATEMENT = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\](?:\s*\|\s*\w+)?|\([^)]*\)|[^,{}\[\]\s][^,{}\[\]]*")
_DECLARATION = re.compile(
    r"\.(?P<space>shared|local|global|const)\b(?:\s+\.(?:attribute\([^)]*\)|managed))*(?:\s+\.align\s+(?P<align>\d+))?"
    r"\s+\.(?P<type>\w+)\s+(?P<name>[$\w]+)\s*(?P<array>(?:\[\s*\d*\s*\])*)(?:\s*=\s*(?P<values>[^;]*))?;"
)


class ParseError(ValueError):
    """The text is not the PTX that this parser knows; the message quotes the line."""


@functools.cache
def _is_type(modifier: str) -> bool:
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


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])  # keeps the line numbers


@functools.lru_cache(maxsize=256)
def parse(ptx: str, name: str | None = None) -> Program:
    """Read the entry whose name is, or contains, `name` (the only one where None)."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", _blank, ptx, flags=re.S)
    entries = list(re.finditer(r"\.entry\s+([$\w]+)\s*\(([^)]*)\)([^{;]*)\{", text))
    chosen = [e for e in entries if name is None or e[1] == name] or [e for e in entries if name in e[1]]
    if len(chosen) != 1:
        raise ParseError(
            f"name must choose one entry of {[e[1] for e in entries]}, got {name!r}: give it in full"
        )
    entry = chosen[0]
    end = _closing_brace(text, entry.end())
    parser = _Body(_files(text))
    parser.declare_all(text[: entries[0].start()])
    for previous, following in itertools.pairwise(entries):  # variables between entries
        parser.declare_all(text[_closing_brace(text, previous.end()) : following.start()])
    parser.read(text, entry.end(), end - 1)
    symbols, sizes = _place(parser.variables, parser.instructions)
    threads = _directive(entry[3], "reqntid")
    maximum = _directive(entry[3], "maxntid")
    parameters = [_parameter(p) for p in entry[2].split(",") if p.strip()]
    program = Program(
        name=entry[1],
        instructions=parser.instructions,
        labels=parser.labels,
        branch_tables=parser.branch_tables,
        registers={},
        slots={},
        parameters={name: size for name, size, _ in parameters},
        float_parameters=frozenset(name for name, _, is_float in parameters if is_float),
        symbols=symbols,
        shared_bytes=sizes["shared"],
        local_bytes=sizes["local"],
        threads=threads,
        max_threads=maximum[0] * maximum[1] * maximum[2] if maximum else None,
    )
    _assign_slots(program, parser.widths)
    for symbol in program.symbols.values():
        if symbol.space in ("global", "const"):
            program.variables[symbol.name] = _aligned_bytes(symbol.bytes)
    return program


def _aligned_bytes(size: int) -> np.ndarray:
    room = np.zeros(size + 256, np.uint8)
    skip = -room.ctypes.data % 256
    return room[skip : skip + size]


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    raise ParseError("unbalanced braces")


def _files(text: str) -> dict[str, str]:
    return {m[1]: m[2].rsplit("/", 1)[-1] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', text)}


def _directive(text: str, name: str) -> tuple[int, int, int] | None:
    match = re.search(rf"\.{name}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", text)
    return (int(match[1]), int(match[2] or 1), int(match[3] or 1)) if match else None


def _parameter(text: str) -> tuple[str, int, bool]:
    match = re.fullmatch(r"\s*\.param\s.*?\.([busf]\d+)\b.*?([$\w]+)\s*(?:\[(\d+)\])?\s*", text, re.S)
    if not match:
        raise ParseError(f"parameter {text.strip()}")
    return match[2], type_bits(match[1]) // 8 * int(match[3] or 1), match[1].startswith("f")


class _Body:
    """Reads the statements of an entry; registers and labels declared in an inner { } are seen only there."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.branch_tables: dict[str, list[str]] = {}
        self.variables: dict[str, tuple[str, int, int, bytes]] = {}  # name -> space, alignment, bytes, values
        self.widths: dict[str, int] = {}  # a register, or a family such as %r
        self.scopes: list[dict[str, str]] = [{}]  # name in the text -> unique name
        self.scope_starts = [0]  # their first instructions

    def declare_all(self, text: str) -> None:
        """Note the variables of a piece of the module."""
        for match in _DECLARATION.finditer(text):
            self.declare(match)

    def declare(self, match: re.Match[str]) -> None:
        """Note a variable; one without a size is the dynamic block of shared memory."""
        item = type_bits(match["type"]) // 8
        counts = [int(n) for n in re.findall(r"\d+", match["array"])]
        size = item * math.prod(counts) if counts or not match["array"] else 0
        values = b""
        if match["values"]:
            values = b"".join(_constant(v.strip(), item) for v in match["values"].strip("{} \n").split(","))
        align = max(int(match["align"] or 1), item)
        self.variables[match["name"]] = (match["space"], align, size, values)

    def read(self, text: str, start: int, end: int) -> None:
        position, source = start, ""
        newlines = [m.start() for m in re.finditer("\n", text)]
        blank = re.compile(r"\s*")
        token = re.compile(
            r"\s*(?:\.loc\s+(\d+)\s+(\d+)[^\n;]*|(\{)|(\})|([$\w]+):(?!:)|([^;{]*(?:\{[^}]*\}[^;{]*)*);)"
        )
        while not blank.fullmatch(text, position, end):
            match = token.match(text, position, end)
            if not match:
                raise ParseError(
                    f"line {text.count(chr(10), 0, position) + 1}: {text[position : position + 80]!r}"
                )
            if match[1]:
                source = f"{self.files.get(match[1], '?')}:{match[2]}"
            elif match[3]:
                self.scopes.append({})
                self.scope_starts.append(len(self.instructions))
            elif match[4]:
                self._leave_scope()
            elif match[5]:
                label = match[5]
                if len(self.scopes) > 1:
                    self.scopes[-1][label] = f"{label}@{len(self.instructions)}"
                self.labels[self._resolve(label)] = len(self.instructions)
            elif match[6].strip():
                self._statement(match[6].strip(), bisect.bisect_left(newlines, match.end()) + 1, source)
            position = match.end()

    def _statement(self, statement: str, line: int, source: str) -> None:
        if statement.startswith("."):
            directive = statement.split()[0]
            if directive == ".reg":
                self._registers(statement)
            elif directive in (".shared", ".local"):
                declaration = _DECLARATION.match(statement + ";")
                if not declaration:
                    raise ParseError(f"line {line}: {statement}")
                self.declare(declaration)
            elif directive == ".branchtargets":
                table = next(
                    name for name, at in reversed(self.labels.items()) if at == len(self.instructions)
                )
                self.branch_tables[table] = [t.strip() for t in statement.split(None, 1)[1].split(",")]
            return  # .pragma, .section and others say nothing about meaning
        parsed = _STATEMENT.fullmatch(statement)
        if not parsed:
            raise ParseError(f"line {line}: {statement}")
        negated, guard, mnemonic, rest = parsed.groups()
        opcode, *modifiers = mnemonic.split(".")
        operands = tuple(self._rename(o.strip()) for o in _OPERAND.findall(rest))
        self.instructions.append(
            Instruction(
                index=len(self.instructions),
                line=line - statement.count("\n"),
                text=" ".join(statement.split()),
                source=source,
                opcode=opcode,
                modifiers=tuple(modifiers),
                types=tuple(m for m in modifiers if _is_type(m)),
                operands=operands,
                guard=self._resolve(guard) if guard else None,
                negated=negated == "!",
            )
        )

    def _registers(self, statement: str) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
        if not match:
            raise ParseError(statement)
        for item in match[2].split(","):
            name = re.sub(r"<\d+>", "<>", item.strip())
            if len(self.scopes) > 1:
                self.scopes[-1][name] = f"{name}@{len(self.instructions)}"
            self.widths[self._resolve(name)] = type_bits(match[1])

    def _resolve(self, name: str) -> str:
        """The unique name of a register or label here."""
        if len(self.scopes) == 1:
            return name
        family, digits = re.fullmatch(r"(.*?)(\d*)", name).groups()
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
            if digits and f"{family}<>" in scope:
                return scope[f"{family}<>"].replace("<>", digits)
        return name

    def _rename(self, operand: str) -> str:
        if len(self.scopes) == 1:
            return operand
        return re.sub(r"[%$A-Za-z_][$\w]*", lambda m: self._resolve(m[0]), operand)

    def _leave_scope(self) -> None:
        if len(self.scopes) == 1:
            raise ParseError("unbalanced braces")
        scope, start = self.scopes.pop(), self.scope_starts.pop()
        for i, ins in enumerate(self.instructions[start:], start):
            if ins.opcode == "bra" and ins.operands[0] in scope:  # to a label further down in the scope
                self.instructions[i] = dataclasses.replace(ins, operands=(scope[ins.operands[0]],))


def _place(
    variables: dict[str, tuple[str, int, int, bytes]], instructions: list[Instruction]
) -> tuple[dict[str, Symbol], dict[str, int]]:
    """Offsets of the variables that the instructions use, and the sizes of shared and local memory."""
    used = {
        name for ins in instructions for operand in ins.operands for name in re.findall(r"[$\w]+", operand)
    }
    symbols, sizes = {}, {"shared": 0, "local": 0}
    for name, (space, align, size, values) in variables.items():
        if name not in used:
            continue
        offset = 0
        if space in sizes:
            offset = -(-sizes[space] // align) * align if size else -1
            sizes[space] = max(sizes[space], offset + size)
        symbols[name] = Symbol(name, space, offset, size, values)
    return symbols, sizes


def _constant(text: str, size: int) -> bytes:
    if re.match(r"0[fFdD]", text):
        return int(text[2:], 16).to_bytes(size, "little")
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)", text):
        raise ParseError(f"initial value {text!r}: addresses of other variables are not read")
    return (int(text, 0) & (1 << 8 * size) - 1).to_bytes(size, "little")


def _assign_slots(program: Program, widths: dict[str, int]) -> None:
    def width(name: str) -> int | None:
        return widths.get(name) or widths.get(re.sub(r"\d+(?=@|$)", "<>", name, count=1))

    for ins in program.instructions:
        for name in re.findall(r"[%$A-Za-z_][$\w@]*", " ".join((ins.guard or "", *ins.operands))):
            bits = None if name in program.registers else width(name)
            if bits:
                bits = max(bits, 16) if bits > 1 else 1  # an 8-bit register lives in a 16-bit slot
                program.registers[name] = (bits, program.slots.get(bits, 0))
                program.slots[bits] = program.slots.get(bits, 0) + 1
