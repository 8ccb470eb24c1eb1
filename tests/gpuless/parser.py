"""PTX text -> Program.

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

import numpy as np

from gpuless.parameters import fold_addresses
from gpuless.program import Instruction, ParseError, Program, Symbol, is_type, type_bits

_STATEMENT = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\](?:\s*\|\s*\w+)?|\([^)]*\)|[^,{}\[\]\s][^,{}\[\]]*")
_DECLARATION = re.compile(
    r"\.(?P<space>shared|local|global|const)\b(?:\s+\.(?:attribute\([^)]*\)|managed))*(?:\s+\.align\s+(?P<align>\d+))?"
    r"\s+\.(?P<type>\w+)\s+(?P<name>[$\w]+)\s*(?P<array>(?:\[\s*\d*\s*\])*)(?:\s*=\s*(?P<values>[^;]*))?;"
)


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
    fold_addresses(program)
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
                types=tuple(m for m in modifiers if is_type(m)),
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
