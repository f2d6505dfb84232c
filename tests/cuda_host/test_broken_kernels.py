"""Kernels broken on purpose: without one of their barriers, or with a wrong index, their results
change.

Each barrier of csrc/ is left out in turn, by a number in a library that has a switch before each.
Right kernels give the same bits in whatever order threads run; a broken one must differ from them,
or fail, for one of a few orders. The switches change how products are rounded into sums: what is
right is found with them, and none off.
"""

import ctypes
import faulthandler
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import host_build
import pytest
import torch
from host_backend import LIBRARY, SANITIZED, shuffle_threads
from torch import Tensor

from delora_kernels.backends.cuda import dropout_mask, launch
from delora_kernels.backends.cuda.kernels import token_sums
from delora_kernels.backends.cuda.route import route
from delora_kernels.backends.dropout import MaskGroup
from delora_kernels.op_arguments import Gating
from delora_kernels.testing.ops.problems import op_problems

CSRC = Path(__file__).parents[2] / "csrc"

BARRIER = re.compile(r"__(?:syncthreads|syncwarp|pipeline_wait_prior)\([^)]*\);")
OPS_OF = {
    "add_parts": ("expand_backward", "fold_backward"),
    "dropout": ("project", "expand"),
    "dy_sums": ("expand_backward",),
    "fold": ("fold", "fold_backward"),
    "gating": ("project_route",),
    "rank_update": ("expand", "input_backward", "grouped_linear"),
    "reflect": ("reflect", "reflect_backward"),
    "route": ("project_route",),
    "route_backward": ("expand_route_backward",),
    "row_norm": ("row_norm",),
    "stack_factors": ("stack_factors",),
    "times_small": ("project", "project_route", "grouped_linear"),
    "token_sums": ("expand_backward", "input_backward", "grouped_backward"),
}
SIZES = {
    "dy_sums": ((170, 5, 252, 20), (200, 5, 264, 3)),
    "rank_update": ((90, 80, 140, 20), (90, 72, 136, 35)),
    "reflect": ((40, 60, 5, 20), (40, 60, 5, 3)),
    "route_backward": ((70, 9, 300, 40), (90, 9, 60, 3)),
    "row_norm": ((5, 900, 40, 20), (5, 1160, 40, 35)),
}
"""Other tokens, in- and out-features, ranks: for dy_sums every tile that a block has, of rows that
16 bytes divide; for
row_norm more tiles than are on their way; for route_backward more columns than a warp has at a
time."""

SPLIT = {"route": (1, 528), "gating": (1, 528), "route_backward": (1, 528)}
"""Blocks that sums are split for, where it is not 1: a block then walks through more tiles than it
holds at a time.
"""

ENDLESS = 120.0
"""Seconds after which a process has gone wrong: a right one takes a tenth of that."""

ORDERS = 40
"""A first that differs ends the search: a broken kernel may look right in several."""

WRONG = (
    ("times_small.cu", "x, t0, k + AHEAD * BK, T, last)", "x, t0, k, T, last)"),
    ("token_sums.cu", "vectors.load(y, t + BT, c0, last, C)", "vectors.load(y, t, c0, last, C)"),
    ("token_sums.cu", "mask.drop(value, t + i, c0 + k * TERM + c)", "mask.drop(value, t + i, c0 + c)"),
    ("token_sums.cu", "in.h[0][1][0], in.small[0][0] + k * TERM", "in.h[0][0][0], in.small[0][0] + k * TERM"),
    ("times_small.cu", "somebodys ? tile.expert : 0), Mask", "0), Mask"),
    ("token_sums.cu", "product + tile.expert * R * C", "product"),
    ("rank_update.cu", "+ tile.expert * bias.row_stride", "+ 0 * bias.row_stride"),
    ("rank_update.cu", "in.h[side][0][0], in.small[side][1][0]", "in.h[side][0][0], in.small[side][0][0]"),
    ("row_norm.cu", "r == 0 ? k + AHEAD * BC : K", "r == 0 ? k + BC : K"),
    ("add_parts.cu", "total(in, i, parts, size)", "total(in, i, parts - 1, size)"),
    ("dy_sums.cu", "small, in.small[(j + 1) % 2]", "small, in.small[j % 2]"),
    ("dy_sums.cu", "c ? c + next : c", "c ? c + n0 : c"),
    ("fold.cu", "along[j] = live ?", "along[j] = !live ?"),
    ("dropout.cu", "t = i / across, group = i % across", "t = i / across, group = i / across"),
    ("reflect.cu", "if (t0 > first) {", "if (t0 > first + TOKENS) {"),
    ("gating.cuh", "other == best && other_at < at", "other == best && other_at > at"),
    ("route.cu", "store(g.h, t, column, sum)", "store(g.h, t, 0, sum)"),
    ("stack_factors.cu", "load(B, c / r * N + n, c % r)", "load(B, n, c % r)"),
    ("route_backward.cu", "j0 += most", "j0 += most + 1"),
)
"""File, what stands there, what to write in its place: wrong, but inside its tensors."""


SWITCH = 'extern "C" { inline __attribute__((visibility("default"))) int dk_left_out = -1; }\n'

BARRIERS = {file.name: len(BARRIER.findall(file.read_text(encoding="utf-8"))) for file in sorted(CSRC.glob("*.cu*"))}


def _with_switches(text: str) -> str:
    """The text with each of its barriers left out where `dk_left_out` is its number."""
    numbers = itertools.count()
    return SWITCH + BARRIER.sub(lambda found: f"{{ if (dk_left_out != {next(numbers)}) {found[0]} }}", text)


def _results(file: str, order: int) -> list[Tensor]:
    """What the ops that run the kernels of a file find for the same inputs."""
    shuffle_threads(order)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for target in SPLIT.get(Path(file).stem, (1,)):
            patch.setattr(launch, "SPLIT_TARGET", target)
            results += _results_of_ops(Path(file).stem)
    if file == "gating.cuh":  # equal logits
        results += route(torch.zeros(1, 5, 24), torch.float32, None, 4, Gating(8, 2, True, False, torch.ones(8)))
    if file == "token_sums.cu":  # the vectors, beside a masked product
        x, y = torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(1))
        results += token_sums(x, x[:, :5], sums=True, y=y, group=MaskGroup(slice(0, 5), 0.5, torch.tensor(7)))[1:]
    if file == "dropout.cu":
        results.append(dropout_mask(13, 37, 0.4, torch.tensor(7)))
    return results


def _results_of_ops(stem: str) -> list[Tensor]:
    results: list[Tensor] = []
    sizes = SIZES.get(stem, ((170, 300, 70, 20), (200, 330, 90, 3)))
    for name in OPS_OF[stem]:
        for (T, K, N, R), wide in zip(sizes, (torch.float32, torch.bfloat16), strict=True):
            narrow = torch.float32 if R == 20 else torch.bfloat16
            for rank in {wide, torch.float32}:
                for problem in op_problems(name, T, K, N, R, backend="cuda", dtype=narrow, rank_dtype=rank, seed=1):
                    results += problem.run(problem.inputs).values()
    return results


@pytest.fixture(autouse=True)
def _sums_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a block walks through more tiles than it holds at a time."""
    monkeypatch.setattr(launch, "SPLIT_TARGET", 1)


@cache
def _right(file: str) -> list[Tensor]:
    return _results(file, 0)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Puts another library in the place of the right one, until the end of the test."""
    yield monkeypatch
    monkeypatch.undo()
    launch.library.cache_clear()


def _built(file: str, text: str) -> ctypes.CDLL:
    """The library with another text in the place of a file's."""
    return ctypes.CDLL(str(host_build.build(replaced={file: text})))


def _take(library: ctypes.CDLL, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("delora_kernels.backends.cuda.library.load", lambda functions=(): library)
    launch.library.cache_clear()


def _differs(file: str, right: list[Tensor], seed: int, orders: int = ORDERS) -> bool:
    """Whether the library that has been taken gives other results than the right ones."""
    child = os.fork()  # a wild address ends a process, which shows too
    if child == 0:
        found = 2
        try:
            faulthandler.disable()
            torch.set_num_threads(1)
            found = int(any(_shows(file, seed + order, right) for order in range(orders)))
        finally:
            os._exit(found)
    found = _end_of(child)
    assert found != 2, "the test itself failed"
    return found != 0


def _end_of(child: int) -> int:
    """The exit status of a process; one that does not end is killed, which shows too."""
    until = time.monotonic() + ENDLESS
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            until = math.inf
        time.sleep(0.01)


def _shows(file: str, order: int, right: list[Tensor]) -> bool:
    try:
        results = _results(file, order)
    except RuntimeError:  # a guard zone, or threads that wait for ever
        return True
    return not all(torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) for a, b in zip(results, right, strict=True))


@pytest.mark.skipif(SANITIZED, reason="the plain build does it faster")
@pytest.mark.parametrize("file", [file for file, count in BARRIERS.items() if count])
def test_a_missing_barrier_shows(file: str, seed: int, broken: pytest.MonkeyPatch) -> None:
    text = (CSRC / file).read_text(encoding="utf-8")
    library = _built(file, _with_switches(text))
    left_out = ctypes.c_int.in_dll(library, "dk_left_out")
    left_out.value = -1  # inline variables are one for all libraries of a process
    _take(library, broken)
    right = _results(file, 0)
    assert not _differs(file, right, seed, orders=1), "none is missing"
    for which, found in enumerate(BARRIER.finditer(text)):
        left_out.value = which
        assert _differs(file, right, seed), text[found.start() - 200 : found.end()]


@pytest.mark.skipif(SANITIZED, reason="the plain build does it faster")
@pytest.mark.parametrize(("file", "right", "wrong"), WRONG, ids=[file for file, *_ in WRONG])
def test_a_wrong_index_shows(file: str, right: str, wrong: str, seed: int, broken: pytest.MonkeyPatch) -> None:
    text = (CSRC / file).read_text(encoding="utf-8")
    assert text.count(right) == 1
    expected = _right(file)
    _take(_built(file, text.replace(right, wrong)), broken)
    assert _differs(file, expected, seed)


@pytest.mark.skipif(SANITIZED, reason="a process forked under AddressSanitizer may wait for ever for its locks")
def test_right_kernels_do_not_differ(seed: int, broken: pytest.MonkeyPatch) -> None:
    text = (CSRC / "token_sums.cu").read_text(encoding="utf-8")
    expected = _right("token_sums.cu")
    _take(_built("token_sums.cu", text), broken)
    assert not _differs("token_sums.cu", expected, seed)


@pytest.mark.skipif(not SANITIZED, reason="needs AddressSanitizer")
def test_a_read_outside_a_tensor_ends_the_process() -> None:
    text = (CSRC / "times_small.cu").read_text(encoding="utf-8")
    wrong = text.replace("x, t0, first + stage * BK, T, last)", "x, t0, first + stage * BK, T + 1, last)")
    assert wrong != text
    library = host_build.build(sanitize=True, replaced={"times_small.cu": wrong})
    code = "import torch; from delora_kernels.backends.cuda.kernels import times_small; "
    code += "times_small(torch.ones(5, 8), torch.ones(8, 3), torch.float32)"
    for path, ends in ((LIBRARY, False), (str(library), True)):
        environment = os.environ | {"DELORA_KERNELS_CUDA_LIBRARY": str(path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == ends, done.stderr
        assert ("AddressSanitizer: heap-buffer-overflow" in done.stderr) == ends, done.stderr
