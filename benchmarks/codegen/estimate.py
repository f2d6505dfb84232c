"""How long a launched binary should take on an H200: an estimate from its disassembly, no
measurement.

    kernel_of(launch, compiled)     Estimate(bytes, flight, issue, matrix, chain), microseconds
    layer_of(steps, compiled, ...)  those of its kernels and GEMMs, and over the frozen linear

A kernel takes the largest of five times, and a launch:

    bytes     all its operands once, at the rate of a copy
    flight    its large loads at the rate that the bytes in flight allow: in flight / latency
    issue     its instructions, four a cycle and multiprocessor
    matrix    its matrix instructions on the tensor cores
    chain     its waves of programs, each as long as a warp's walk through it (warp.py)
"""

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.codegen import device
from benchmarks.codegen.compiling import Compiled
from benchmarks.codegen.measures import Body, body_of, large, running, walk_of
from benchmarks.codegen.recording import Gemm, Launch, Other
from benchmarks.codegen.warp import matrix_cycles


class Estimate(NamedTuple):
    """Microseconds of one launch.

    Args:
        kernel: Its name.
        bytes, flight, issue, matrix, chain: What each of them alone would take.
        waves, turns: Of programs on the multiprocessors; of the main loop in a program.
    """

    kernel: str
    bytes: float
    flight: float
    issue: float
    matrix: float
    chain: float
    waves: int
    turns: float

    @property
    def total(self) -> float:
        """The largest, and a launch."""
        return 1e6 * device.LAUNCH + max(self[1:6])

    @property
    def limit(self) -> str:
        """What the largest is."""
        return max(zip(self._fields[1:6], self[1:6], strict=True), key=lambda item: item[1])[0]


def kernel_of(launch: Launch, compiled: Compiled, turns: float | None = None) -> Estimate:
    """Estimate one launch; its turns of the main loop are `turns_of`, if they are not given."""
    body = body_of(launch, compiled, None if turns is None else 1)
    walk = walk_of(launch, compiled, body)
    warps, programs = compiled.threads // 32, launch.programs
    at_once, busiest = running(launch, compiled), -(-programs // device.SMS)
    waves, turns = -(-busiest // at_once), turns_of(launch, compiled, body) if turns is None else turns
    sizes = {operand.name: operand.bytes for operand in launch.operands}
    read = {body.origins[i] or "" for i in large(launch, compiled, body) if body.code[i].loads}
    in_flight = walk.in_flight * at_once * min(programs, device.SMS)
    issued = walk.issued[0] + turns * walk.issued[1] + walk.issued[2]
    products = [(i in body.step and body.main is not None, matrix_cycles(x)) for i, x in enumerate(body.code)]
    groups = max(1, warps // 4)
    matrix = sum(cycles * (turns if inner else 1) for inner, cycles in products) * groups
    cycles = 1e6 / device.CLOCK
    return Estimate(
        launch.binary.kernel.removesuffix("_kernel"),
        1e6 * sum(sizes.values()) / device.COPY,
        1e6 * sum(sizes[name] for name in read) * device.LATENCY / in_flight if in_flight else 0.0,
        cycles * issued * warps * busiest / 4,
        cycles * matrix * busiest,
        cycles * waves * (walk.before + turns * walk.step + walk.after),
        waves,
        turns,
    )


def turns_of(launch: Launch, compiled: Compiled, body: Body) -> float:
    """How often a program goes through its main loop: so often that all programs together read, or
    write, its largest operand once (once for each tile of ranks, where the grid has several).
    """
    if body.main is None:
        return 0.0
    sizes = {operand.name: operand.bytes for operand in launch.operands}
    moved: dict[str, int] = {}
    for i in body.step:
        name = body.origins.get(i)
        if name in sizes:
            moved[name] = moved.get(name, 0) + body.code[i].width * compiled.threads
    loads = {body.origins[i] for i in body.step if body.code[i].loads}
    name = max(moved, key=lambda name: (sizes[name] >= device.LARGE, name in loads, sizes[name]))
    return _rank_tiles(launch) * sizes[name] / (moved[name] * launch.programs)


def _rank_tiles(launch: Launch) -> int:
    """How many programs read the same tile, each for other ranks."""
    names = list(launch.binary.signature)
    constants = {names[at[0]]: value for at, value in launch.binary.constants.items()}
    if "BR" not in constants or "R" not in launch.integers:
        return 1
    tiles = -(-launch.integers["R"] // constants["BR"])
    return tiles if tiles in launch.grid[1:] else 1


class LayerEstimate(NamedTuple):
    """Microseconds of a layer, forward and backward.

    Args:
        kernels: Each launch of ours.
        adding: What its GEMMs take for adding to their outputs (beta = 1).
        others: Casts, fills and concatenations of torch.
        gemms: The GEMMs themselves.
        frozen: The frozen linear's, or the products of siblings alone.
        summed: What autograd takes besides, to add up the dx of frozen siblings.
    """

    kernels: list[Estimate]
    adding: float
    others: float
    gemms: float
    frozen: float
    summed: float = 0.0

    @property
    def total(self) -> float:
        """Of the layer."""
        return sum(kernel.total for kernel in self.kernels) + self.adding + self.others + self.gemms

    @property
    def ratio(self) -> float:
        """Over the frozen linear's forward and backward; of siblings, over their products alone."""
        return self.total / self.frozen

    @property
    def ratio_to_layers(self) -> float:
        """The same over frozen siblings as they run one by one: autograd adds up their dx."""
        return self.total / (self.frozen + self.summed)


def layer_of(
    steps: list[Launch | Gemm | Other], compiled: Mapping[str, Compiled], T: int, K: int, N: int, siblings: int = 0
) -> LayerEstimate:
    """Estimate what a forward and backward pass of one layer launches, or of one with siblings, all
    their outputs together N wide.
    """
    kernels = [kernel_of(step, compiled[step.binary.key]) for step in steps if isinstance(step, Launch)]
    gemms = [step for step in steps if isinstance(step, Gemm)]
    others = [step for step in steps if isinstance(step, Other)]
    return LayerEstimate(
        kernels,
        1e6 * device.ADDING * sum(gemm.M * gemm.N for gemm in gemms if gemm.adds),
        sum(1e6 * (device.LAUNCH + other.bytes / device.COPY) for other in others),
        sum(2e6 * gemm.M * gemm.K * gemm.N / device.GEMM for gemm in gemms),
        2 * 2e6 * T * K * N / device.GEMM,
        siblings * 1e6 * (device.LAUNCH + 3 * 2 * T * K / device.COPY),
    )
