"""Read a disassembly of sm_90: instructions with what the encoding says of waiting, loops, and
which parameter of the kernel a load's address comes from.

    code = parse(text)          what `cuobjdump -sass` printed
    loops(code)                 [(first, last), ...] indices, inner loops first
    origin(code, i, {0x210: "X"})

Every instruction carries, above its operation, the cycles until the next may issue, the scoreboards
that it sets when its result (or its sources' reading) is done, and those that it waits for: the
format is that of Volta and its successors, as published by Jia et al., arXiv 1804.06826, §2.
"""

import re
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/", re.DOTALL)
_PREDICATE = re.compile(r"@(!?U?P\w+)\s+")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b")
_PARAMETER = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
FREE = 7
"""In a field for a scoreboard: none."""


class Instruction(NamedTuple):
    """One instruction.

    Args:
        address: In the function.
        predicate: "P0", "!P0", ... or "".
        name: "LDG.E.128", ...
        operands: As they are written.
        stall: Cycles until the next one may issue.
        sets: The scoreboard that is counted up now and down when the result is there; or FREE.
        reads: The same, down when the sources have been read.
        waits: Bit i: waits until scoreboard i is 0.
    """

    address: int
    predicate: str
    name: str
    operands: tuple[str, ...]
    stall: int
    sets: int
    reads: int
    waits: int

    @property
    def base(self) -> str:
        """The name before its first dot."""
        return self.name.split(".", 1)[0]

    @property
    def width(self) -> int:
        """Bytes that a load or store moves for each thread."""
        for word, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
            if word in self.name:
                return size
        return 4

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands[-1]) if self.base == "BRA" and self.operands else None
        return None if found is None else int(found.group(1), 16)

    @property
    def loads(self) -> bool:
        """Whether it reads device memory: into registers, or (`LDGSTS`) into shared memory."""
        return self.base in ("LDG", "LDGSTS")


def parse(text: str) -> list[Instruction]:
    """Return the instructions of the one function in a disassembly."""
    code = []
    for address, body, high in _LINE.findall(text):
        found = _PREDICATE.match(body)
        body = body[found.end() :] if found else body
        name, _, operands = body.strip().partition(" ")
        control = int(high, 16) >> 41
        code.append(
            Instruction(
                int(address, 16), found.group(1) if found else "", name,
                tuple(word.strip() for word in operands.split(",")) if operands.strip() else (),
                control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63,
            )
        )  # fmt: skip
    return code


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """Return (first, last) of every loop, the last a branch back to the first; the inner ones
    before those around them.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    found = []
    for i, instruction in enumerate(code):
        target = at.get(instruction.target) if instruction.target is not None else None
        if target is not None and target < i:  # the last instruction of all branches to itself
            found.append((target, i))
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def pointers(signature: dict[str, str]) -> dict[int, str]:
    """Return offset in the constant bank → name, of the pointers that a launch of sm_90 passes."""
    found, at = {}, 0x210
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        size = 8 if kind[0] == "*" or kind in ("i64", "u64", "fp64") else 4
        at = -(-at // size) * size
        if kind[0] == "*":
            found[at] = name
        at += size
    return found


_WIDE = (".64", ".WIDE", "CS2R", "I2F.F64")
_NO_RESULT = ("STG", "STS", "BRA", "EXIT", "BAR", "LDGSTS", "LDGDEPBAR", "DEPBAR", "WARPSYNC", "STSM", "RED")


def origin(code: list[Instruction], i: int, names: dict[int, str]) -> str | None:
    """Return the parameter that the address of load or store i comes from: back from it, what set
    its registers, what set theirs, up to a pointer; None: not found.
    """
    address = next((word for word in code[i].operands if "desc[" in word), None)
    if address is None:
        return None
    wanted = _registers(address.split("]", 1)[1], 2)
    for instruction in reversed(code[:i]):
        found, others = _sources(instruction, wanted)
        if found is None:
            continue
        wanted = (wanted - found if not instruction.predicate else wanted) | others
        for word in instruction.operands[1:]:
            for offset in _PARAMETER.findall(word):
                name = names.get(int(offset, 16)) or names.get(int(offset, 16) - 4)
                if name is not None:
                    return name
    return None


def _registers(text: str, count: int) -> set[str]:
    """Every register in an operand, and the `count` - 1 behind each."""
    return {f"{kind}{int(number) + k}" for kind, number in _REGISTER.findall(text) for k in range(count)}


def _sources(instruction: Instruction, wanted: set[str]) -> tuple[set[str] | None, set[str]]:
    """If an instruction sets a wanted register: what it sets, and the registers that it reads."""
    if instruction.base in _NO_RESULT or not instruction.operands:
        return None, set()
    wide = any(word in instruction.name for word in _WIDE)
    first = 0 if _REGISTER.fullmatch(instruction.operands[0].split(".")[0]) else None
    if first is None:
        return None, set()
    size = instruction.width // 4 if instruction.base in ("LDG", "LDS", "LDSM") else 2 if wide else 1
    sets = _registers(instruction.operands[0], max(1, size))
    if not sets & wanted or instruction.base in ("LDG", "LDS", "LDSM", "SHFL"):
        return (sets if sets & wanted else None), set()
    reads: set[str] = set()
    for word in instruction.operands[1:]:
        reads |= _registers(word, 2 if wide and word is instruction.operands[-1] else 1)
    return sets, reads
