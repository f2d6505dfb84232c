"""One warp walks a kernel: when each instruction issues, what it waits for, what is in flight then.

All warps of a program are taken to be alike, and all branches to be taken as on the way to the main
loop: a model, not an emulator. It knows the stalls and scoreboards that the assembler wrote into
the instructions, and from device.py how long loads take; arithmetic has its issue slots, barriers
wait for the slots of all warps, matrix instructions share the tensor cores.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.codegen import device
from benchmarks.codegen.sass import FREE, Instruction

TAKES = {"LDS": 30, "LDSM": 33, "SHFL": 24, "MUFU": 24, "S2R": 30, "S2UR": 30, "LDC": 40, "MEMBAR": 30}
"""Cycles of what is neither arithmetic nor a load from device memory (arXiv 2402.13499)."""
OTHERS, BARRIER, MATRIX_DRAIN = 24, 24, 16
"""Cycles: of an unknown result; of a barrier that nobody is late for; from the last multiplication
of a matrix instruction to its result."""
LATE = 100
"""Cycles of waiting from which a load counts as waited for."""


class Load(NamedTuple):
    """A load on its way.

    Args:
        at: Index of the instruction.
        arrives: When, in cycles.
        step: Of the main loop, when it was issued.
        bytes: For the whole program, of a large tensor; 0 of others.
    """

    at: int
    arrives: float
    step: int
    bytes: int


@dataclass
class Walk:
    """What a walk found.

    Args:
        before, step, after: Cycles until the main loop begins, of one turn of it, after it.
        issued: Instructions before, in a turn, after.
        in_flight: The most bytes from device memory that were on their way when the warp waited.
        same_step: Loads (indices) that are waited for in the turn that issued them.
    """

    before: float = 0.0
    step: float = 0.0
    after: float = 0.0
    issued: tuple[float, float, float] = (0.0, 0.0, 0.0)
    in_flight: int = 0
    same_step: set[int] = field(default_factory=set)


class Warp:
    """A walk through `code`.

    Args:
        code: The kernel.
        main: (first, last) of the main loop, or None.
        large: Index of each load from, and store to, device memory → its bytes for the program.
        warps: Of a program.
        sharing: Programs that share the bandwidth of the device at a time: on all multiprocessors.
    """

    def __init__(
        self, code: list[Instruction], main: tuple[int, int] | None, large: dict[int, int], warps: int, sharing: int
    ) -> None:
        self.code, self.main, self.large = code, main, large
        at = {instruction.address: i for i, instruction in enumerate(code)}
        self.targets = [None if each.target is None else at.get(each.target) for each in code]
        self.each_issue, self.groups = max(1.0, warps / 4), max(1, warps // 4)
        self.rate = min(64.0, device.BANDWIDTH / device.CLOCK / sharing)  # bytes a cycle
        self.time = self.memory = self.matrix = self.since = 0.0
        self.issued = self.step = 0
        self.boards: list[list[tuple[float, tuple[Load, ...]]]] = [[] for _ in range(6)]
        self.copies: list[Load] = []
        self.products: list[float] = []
        self.coming: list[Load] = []
        self.walk = Walk()

    def run(self, turns: int = 24) -> Walk:
        """Walk from the entry through `turns` turns of the main loop to the end."""
        at, walk, starts, count, counts = 0, self.walk, list[float](), 0, list[int]()
        for _ in range(len(self.code) * (turns + 1)):
            if at >= len(self.code):
                break
            if self.main and at == self.main[0]:
                starts.append(self.time)
                counts.append(count)
                self.step += 1
            instruction = self.code[at]
            self._issue(at, instruction)
            count += 1
            if self.main and at == self.main[1]:
                if self.step < turns:
                    at = self.main[0]
                    continue
                starts.append(self.time)
                counts.append(count)
                self.step += 1
            if instruction.base == "EXIT" and not instruction.predicate:
                break
            at = self._next(at, instruction)
        end = max([self.time, *(load.arrives for load in self.coming if load.bytes)])
        if len(starts) > 1:
            half = len(starts) // 2
            walk.before, walk.step = starts[0], (starts[-1] - starts[half]) / (len(starts) - 1 - half)
            walk.after = end - starts[-1]
            walk.issued = counts[0], (counts[-1] - counts[0]) / (len(counts) - 1), count - counts[-1]
        else:
            walk.before, walk.issued = end, (count, 0, 0)
        return walk

    def _next(self, at: int, instruction: Instruction) -> int:
        target = self.targets[at]
        if target is None or target <= at:
            return at + 1
        if not instruction.predicate:
            return target
        if self.main and at < self.main[0] and not self._leads(at + 1) and self._leads(target):
            return target
        return at + 1

    def _leads(self, at: int) -> bool:
        """Whether the main loop is reached from here, where no condition holds."""
        assert self.main is not None
        seen = set[int]()
        while at < len(self.code) and at not in seen:
            if at == self.main[0]:
                return True
            seen.add(at)
            instruction = self.code[at]
            if instruction.base == "EXIT" and not instruction.predicate:
                return False
            target = self.targets[at]
            at = at + 1 if target is None or instruction.predicate else target
        return False

    def _issue(self, at: int, instruction: Instruction) -> None:
        for board in range(6):
            if instruction.waits >> board & 1:
                self._wait(self.boards[board])
                self.boards[board] = []
        base, name = instruction.base, instruction.name
        if base == "DEPBAR":
            board, keep = numbers(instruction, "SB")
            held = self.boards[board]
            self._wait(held[: len(held) - keep])
            self.boards[board] = held[len(held) - keep :] if keep else []
        elif name.startswith("WARPGROUP.DEPBAR"):
            keep = numbers(instruction, "gsb")[1]
            done = self.products[: len(self.products) - keep]
            self.time = max([self.time, *done])
            self.products = self.products[len(self.products) - keep :] if keep else []
        elif base == "BAR":
            # the last warp comes when all of them have had their slots
            self.time = max(self.time, self.since + self.issued * self.each_issue) + BARRIER
            self.since, self.issued = self.time, 0
        result, loads = self._result(at, instruction)
        if instruction.sets != FREE:
            self.boards[instruction.sets].append((result, loads))
        if instruction.reads != FREE:
            self.boards[instruction.reads].append((self.time + OTHERS, ()))
        self.time += max(1, instruction.stall)
        self.issued += 1

    def _result(self, at: int, instruction: Instruction) -> tuple[float, tuple[Load, ...]]:
        base = instruction.base
        if instruction.loads:
            size = self.large.get(at, 0)
            self.memory = max(self.memory, self.time) + size / self.rate if size else self.memory
            arrives = self.memory + device.LATENCY * device.CLOCK if size else self.time + device.CACHED
            load = Load(at, arrives, self.step, size)
            self.coming.append(load)
            if base == "LDGSTS":
                self.copies.append(load)
            return arrives, (load,)
        if base == "STG":
            self.memory = max(self.memory, self.time) + self.large.get(at, 0) / self.rate
        if base == "LDGDEPBAR":
            loads, self.copies = tuple(self.copies), []
            return max([self.time, *(load.arrives for load in loads)]), loads
        if base == "HGMMA":
            self.matrix = max(self.matrix, self.time) + matrix_cycles(instruction) * self.groups
            if any(word.startswith("gsb") for word in instruction.operands):
                self.products.append(self.matrix + MATRIX_DRAIN)
        return self.time + TAKES.get(base, OTHERS), ()

    def _wait(self, held: list[tuple[float, tuple[Load, ...]]]) -> None:
        until = max((done for done, _ in held), default=0.0)
        loads = [load for _, group in held for load in group]
        if self.step or self.main is None:
            self.walk.same_step |= {load.at for load in loads if load.step == self.step}
        if until > self.time:
            if until > self.time + LATE:
                on_the_way = sum(load.bytes for load in self.coming if load.arrives > self.time)
                if self.main is None or 0 < self.step:
                    self.walk.in_flight = max(self.walk.in_flight, on_the_way)
            self.time = until
        self.coming = [load for load in self.coming if load.arrives > self.time]


def matrix_cycles(instruction: Instruction) -> float:
    """Return the cycles that an instruction of one warp or warpgroup keeps the tensor cores busy:
    its multiplications at their rate, or its operands out of shared memory at 128 bytes a cycle.
    """
    if instruction.base == "HGMMA":  # 64 x N x 16, N / 2 cycles; A is 2 KB, unless it lies in registers
        N = int(instruction.name.split(".")[1].split("x")[1])
        left = 0 if instruction.operands[1].startswith("R") else 16
        return max(N / 2, left + N / 4)
    return 8.0 if instruction.base == "HMMA" else 0.0  # mma.sync has half of wgmma's rate


def numbers(instruction: Instruction, prefix: str) -> tuple[int, int]:
    """Return the scoreboard and how many may be left, of a wait written as `SB0, 0x2`."""
    words = instruction.operands
    board = next((int(word.removeprefix(prefix)) for word in words if word.startswith(prefix)), 0)
    return board, int(words[-1], 16) if words[-1].startswith("0x") else 0
