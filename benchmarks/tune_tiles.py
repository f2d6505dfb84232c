"""Time tile sizes of the kernels that have a table: the second half of `python -m benchmarks.tune`.

For every kernel and class of ranks each candidate runs in turn, caches cold, on products of real
layers. The least geometric mean wins, if it beats the shipped tiles by more than MARGIN and its
every variant passes what `benchmarks.codegen` demands; a candidate that does not launch is out.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.codegen import configurations
from benchmarks.codegen.recording import Binary, recording
from benchmarks.codegen.variants import variants
from benchmarks.gpu.ready import compile_ahead
from benchmarks.timing import Budget, Clock, interleaved
from benchmarks.tune_state import State
from delora_kernels.backends.dropout import MaskGroup
from delora_kernels.backends.triton import launch, tables
from delora_kernels.backends.triton.dy_sums import dy_sums
from delora_kernels.backends.triton.planes import planes
from delora_kernels.backends.triton.rank_gemm import DESCRIPTORS_FROM, rank_gemm
from delora_kernels.backends.triton.rank_update import rank_update
from delora_kernels.backends.triton.row_norm import row_norm
from delora_kernels.backends.triton.times_small import FEWEST_RANKS, times_planes, times_small
from delora_kernels.backends.triton.token_sums import token_sums

MARGIN = 0.02
"""A shipped entry is not replaced for less: times of the same code differ by about as much."""
SIZES = ((1024, 4096), (8192, 4096), (8192, 14336))
"""(tokens or rows, columns) of the products."""
TOKENS, COLUMNS, LAUNCHES = (32, 64, 128), (32, 64, 128, 256), ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3), (8, 4))
GEMM_SIDES, GEMM_INNER, GEMM_LAUNCHES = ((64, 256), (128, 128), (128, 256)), (32, 64), ((4, 3), (4, 4), (8, 3), (8, 4))
GEMM_RANK = 16

Capability = tuple[int, int]
Entry = tuple[int, ...]
Table = dict[tuple[Capability, str], dict[str, Entry]]


def timed() -> list[str]:
    """Return the names in TABLES that are timed: not those of experts' kernels, which run beside
    the experts' GEMMs.
    """
    return [name for name in tables.TABLES if not name.startswith("grouped_")]


def jobs(capability: Capability) -> list[tuple[str, str]]:
    """Return every name in the tables with each of its classes of ranks, our GEMM's way to load;
    what a step in 16 bits launches first.
    """
    way = "descriptors" if capability >= DESCRIPTORS_FROM else "pointers"
    found = [(name, limit) for name in timed() for limit in tables.TABLES[name]]
    kinds = ["", "scaled", "dropped", "planes", "mixed", "fp32"]
    found.sort(key=lambda job: kinds.index(job[0].partition(" ")[2]))  # which keeps the order of equals
    return [*found, (tables.GEMM, way)]


def tuned(capability: Capability, device: str, clock: Clock, budget: Budget, state: State | None = None) -> Table:
    """(capability, kernel) → rank class, or for our GEMM the way it loads → the tiles that beat the
    shipped ones; of what was done before, and until the time is over, as the state says.
    """
    found: Table = {}
    state = State() if state is None else state
    for name, limit in tqdm(jobs(capability), desc="tiles"):
        key = f"{name} {limit}"
        if key not in state.done:
            if state.late():
                continue
            if device.startswith("cuda"):
                compile_ahead(candidates_of(capability, name, limit), capability)
            state.keep(key, _fastest(capability, name, limit, device, clock, budget))
        entry = state.done[key]
        if entry is not None:
            found.setdefault((capability, name), {})[limit] = tuple(entry)
    return found


def candidates_of(capability: Capability, name: str, limit: str) -> list[Binary]:
    """Return what Triton would be asked to compile for every candidate, each once."""
    rank, (rows, columns) = int(limit) if name != tables.GEMM else GEMM_RANK, SIZES[0]
    found: dict[str, Binary] = {}
    shipped = tuple(tables.GEMMS[limit] if name == tables.GEMM else tables.TABLES[name][limit])
    with recording(capability) as seen:
        run = _launch(name, rank, rows, columns, "cpu")
        for entry in (shipped, *_candidates(name)):
            with _using(capability, name, limit, entry):
                run()
    for launched in seen.launches:
        found[launched.binary.key] = launched.binary
    return list(found.values())


def _fastest(capability: Capability, name: str, limit: str, device: str, clock: Clock, budget: Budget) -> Entry | None:
    logs: dict[Entry, float] = {}
    shipped = tuple(tables.GEMMS[limit] if name == tables.GEMM else tables.shipped(name, capability)[limit])
    tried = list(dict.fromkeys([shipped, *_candidates(name)]))
    for rows, columns in SIZES:
        run = _launch(name, int(limit) if name != tables.GEMM else GEMM_RANK, rows, columns, device)
        passes = {str(entry): _in_tiles(capability, name, limit, entry, run) for entry in tried}
        times = interleaved(passes, clock, budget, lambda *failure: None)
        tried = [entry for entry in tried if str(entry) in times]
        for entry in tried:
            logs[entry] = logs.get(entry, 0.0) + math.log(times[str(entry)].median_ms)
    if shipped not in tried:
        raise RuntimeError(f"the shipped tiles {shipped} of {name} do not run here")
    for entry in sorted(tried, key=logs.__getitem__):
        if math.exp((logs[entry] - logs[shipped]) / len(SIZES)) > 1 - MARGIN:
            return None
        if _compiles(capability, name, limit, entry):
            return entry
    return None


def _candidates(name: str) -> Iterator[Entry]:
    if name == tables.GEMM:
        for sides, inner, launch in itertools.product(GEMM_SIDES, GEMM_INNER, GEMM_LAUNCHES):
            for programs in (0, 128):
                yield (*sides, inner, *launch, programs)
    else:
        for tokens, columns, launch in itertools.product(TOKENS, COLUMNS, LAUNCHES):
            yield (tokens, columns, *launch)


@contextmanager
def _using(capability: Capability, name: str, limit: str, entry: Entry) -> Iterator[None]:
    before = tables.TILES.get((capability, name))
    tables.TILES[capability, name] = (before or {}) | {limit: entry}
    launch.forget()
    try:
        yield
    finally:
        launch.forget()
        if before is None:
            del tables.TILES[capability, name]
        else:
            tables.TILES[capability, name] = before


def _in_tiles(
    capability: Capability, name: str, limit: str, entry: Entry, run: Callable[[], Any]
) -> Callable[[], None]:
    def forced() -> None:
        with _using(capability, name, limit, entry):
            run()

    return forced


def _launch(name: str, R: int, rows: int, columns: int, device: str) -> Callable[[], Any]:
    """One call of the kernel's launcher on random tensors, in the dtypes whose table this is."""
    kernel, _, kinds = name.partition(" ")
    big = torch.float32 if kinds == "fp32" else torch.bfloat16
    small = torch.float32 if kinds in ("mixed", "fp32", "planes") else big

    def normal(*shape: int, dtype: torch.dtype = big) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, h, S = normal(rows, columns), normal(rows, R, dtype=small), normal(columns, R, dtype=small)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    mask = MaskGroup(slice(0, R), 0.1, seed)
    if kernel == "times_small":
        if kinds == "planes":
            parts = planes(S, small)
            return lambda: times_planes(x, parts, small)
        # without a mask wide factors of so many ranks come as planes
        masked = kinds == "dropped" or (kinds == "mixed" and R > FEWEST_RANKS)
        return lambda: times_small(x, S, small, mask if masked else None)
    if kernel == "token_sums":
        return lambda: token_sums(x, h, transposed=True, group=mask if kinds == "dropped" else None)
    if kernel == "dy_sums":
        y, c = (x, torch.ones(columns, device=device)) if kinds == "scaled" else (None, None)
        return lambda: dy_sums(x, S, h, 1.0, False, y, c)
    if kernel == "rank_update":
        out = torch.empty_like(x)
        return lambda: rank_update(None, h, S.t(), 1.0, out)
    if kernel == "row_norm":
        return lambda: row_norm(x, S.t(), h, 1.0, None, False)
    W, back, dy = normal(columns, columns), normal(rows, R), normal(rows, columns)
    return lambda: (rank_gemm(x, W.t(), h, S.t(), 1.0), rank_gemm(dy, W, back, S.t(), 1.0))


def _compiles(capability: Capability, name: str, limit: str, entry: Entry) -> bool:
    """Whether `make codegen` will take the entry; nothing is compiled for the CPU of the
    interpreter.
    """
    if capability < (8, 0):
        return True
    arch, wanted = "sm_{}{}".format(*capability), limit if name == tables.GEMM else f"R={limit}"
    with _using(capability, name, limit, entry):
        chosen = [v for v in variants(capability) if v.kernel == name.split()[0] and wanted in v.config.split()]
        return all(configurations.why_not(configurations.compile_variant(variant, arch)) is None for variant in chosen)
