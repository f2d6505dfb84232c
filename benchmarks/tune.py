"""Time tile sizes and the three forms of a frozen GEMM with a rank-R term on this GPU, and write
the tables.

    python -m benchmarks.tune      rewrites this device's entries of
                                   delora_kernels/backends/triton/tuned.py
    python -m benchmarks.tune --state FILE --seconds 300      goes on where it stopped

Tiles come first (benchmarks.tune_tiles): the forms are timed with them. For every class of shapes a
few products of real layers are timed in each form, in turn, caches cold; the form with the least
geometric mean over them becomes the entry. Offline: nothing is tuned at run time.
"""

import argparse
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import tune_tiles
from benchmarks.machine import machine_info
from benchmarks.timing import Budget, Clock, clock_of, interleaved
from benchmarks.tune_state import State
from delora_kernels.backends.triton import forms, launch, stages, tables, tuned
from delora_kernels.op_arguments import Branch, Frozen, Masks, RankTerm, Rescaling

DTYPES = (torch.bfloat16, torch.float16)
TOKENS = (512, 1024, 4096, 8192)
LAYERS = ((1024, 1024), (2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 2048))
"""(in-features, out-features) on both sides of every border between classes."""
RANK = 16

Entries = dict[str, str]
Forms = dict[tuple[tuple[int, int], torch.dtype, str], Entries]


def product(op: str, T: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """One call of the op with the rank-R term, as a training step makes it; dx comes with dÂ."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    left, h, small = normal(T, inner), normal(T, RANK), normal(columns, RANK)
    if op == "expand":
        W = normal(columns, inner)
        return lambda: stages.expand(left, W, None, RankTerm(h, small), Rescaling())
    W, x, A = normal(inner, columns), normal(T, columns), small.t().contiguous()
    return lambda: stages.input_backward(left, Frozen(W), Branch(h, A, x, RANK), Masks())


def _in_form(form: str, run: Callable[[], Any]) -> Callable[[], None]:
    def forced() -> None:
        default, table = forms.DEFAULT, forms.FORMS
        forms.DEFAULT, forms.FORMS = form, {}
        try:
            run()
        finally:
            forms.DEFAULT, forms.FORMS = default, table

    return forced


def fastest(op: str, dtype: torch.dtype, device: str, clock: Clock, budget: Budget) -> Entries:
    """Shape class → the form with the least geometric mean of times over the class's products."""
    logs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for T, (inner, columns) in tqdm(list(itertools.product(TOKENS, LAYERS)), desc=f"{op} {dtype}", leave=False):
        run = product(op, T, inner, columns, dtype, device)
        passes = {form: _in_form(form, run) for form in (forms.UPDATE, forms.PREFILL, forms.OWN)}
        for form, times in interleaved(passes, clock, budget).items():
            logs[forms.shape_class(T, columns, inner)][form].append(math.log(times.median_ms))
    return {name: min(found, key=lambda form: sum(found[form])) for name, found in sorted(logs.items())}


def text(tiles: tune_tiles.Table, chosen: Forms) -> str:
    """Return the source of tuned.py: as it is, with these entries."""
    head = Path(tuned.__file__).read_text(encoding="utf-8").split("TILES: ")[0].rstrip()
    table = "dict[tuple[tuple[int, int], str], dict[str, tuple[int, ...]]]"
    lines = [head, "", *_source(f"TILES: {table}", tiles), ""]
    return "\n".join(
        [*lines, *_source("FORMS: dict[tuple[tuple[int, int], torch.dtype, str], dict[str, str]]", chosen), ""]
    )


def _source(name: str, table: Mapping[Any, Mapping[str, Any]]) -> Iterator[str]:
    """Return the lines of one table."""
    if not table:
        yield f"{name} = {{}}"
        return
    yield f"{name} = {{"
    for key, entries in sorted(table.items(), key=str):
        yield f"    ({', '.join(_written(part) for part in key)}): {{"
        yield from (f"        {_written(limit)}: {_written(entry)}," for limit, entry in entries.items())
        yield "    },"
    yield "}"


def _written(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def main(argv: list[str] | None = None, clock: Clock | None = None, budget: Budget | None = None) -> int:
    """Tune, print the entries, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--only", choices=("tiles", "forms"), help="default: both")
    parser.add_argument("--out", type=Path, default=Path(tuned.__file__), help="default: the library's own tuned.py")
    parser.add_argument("--state", type=Path, help="what was found so far: the same command goes on from it")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so long; exit status 3")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.tune needs a CUDA device, and there is none", file=sys.stderr)
        return 2
    clock, budget = clock or clock_of(options.device), budget or Budget(1.0, 7, 50)
    device = forms.capability(torch.device(options.device))
    state = State(options.state, dict(machine_info(options.device)) if options.state else None, options.seconds)
    if options.only != "forms":
        for kernel in [kernel for own, kernel in tables.TILES if own == device]:
            del tables.TILES[device, kernel]
        tables.TILES |= tune_tiles.tuned(device, options.device, clock, budget, state)
        launch.forget()
        print(*((name, entries) for (own, name), entries in tables.TILES.items() if own == device), sep="\n")
        options.out.write_text(text(tables.TILES, forms.FORMS), encoding="utf-8")
    if options.only == "tiles" or state.stopped:
        return 3 if state.stopped else 0
    table = dict(forms.FORMS)
    for op, dtype in itertools.product(("expand", "dx"), DTYPES):
        key = device, dtype, op
        name = f"{op} {dtype}"
        if name not in state.done:
            if state.late():
                continue
            state.keep(name, fastest(op, dtype, options.device, clock, budget))
        table[key] = state.done[name]
        print(*key, table[key])
    options.out.write_text(text(tables.TILES, table), encoding="utf-8")
    return 3 if state.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
