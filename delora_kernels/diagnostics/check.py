"""The self-test behind `python -m delora_kernels check`: every op and every method on this machine,
judged in float64.

op fold … dropout_mask    against its formula (testing.naive_ops)
each method               y and every gradient against the reference; in float64 finite differences
                          too
base nf4 … float8         stored bases of the installed libraries (stored_forms.py)
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.autograd.gradcheck import GradcheckError

from delora_kernels import backends, dispatch, functional, ops
from delora_kernels.diagnostics import stored_forms
from delora_kernels.testing import (
    METHODS,
    OPS,
    Measurement,
    Method,
    gradcheck,
    measure_dropout_mask,
    op_problems,
)
from delora_kernels.testing.finite_differences import RTOL
from delora_kernels.testing.problem import judged

DTYPES = {
    "float64": ((torch.float64, torch.float64),),
    "float32": ((torch.float32, torch.float32),),
    "bfloat16": ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)),
    "float16": ((torch.float16, torch.float16), (torch.float16, torch.float32)),
}
"""Name → pairs of dtypes of base and adapters; float32 adapters on a narrower base are what PEFT
makes.
"""

SIZES = ((7, 19, 13, 3), (1, 8, 5, 1))
"""T, K, N, r of every problem: odd, and a single token."""

GPU_SIZES = (*SIZES, (193, 264, 136, 20))
"""On a GPU also one with several tiles and partial ones in every direction."""

GRADCHECK_SIZES = (3, 4, 3, 2)


@dataclass(frozen=True)
class Row:
    """One result of one op or method.

    Args:
        method: Name in `METHODS`, `op <name>` or `base <name>`.
        what: Which result: y, a gradient, an output of the op, `gradcheck`; `raised` if there is
            none.
        dtype: Of the base, and after a + of the adapters where it differs.
        backend: What ran it.
        error: The one nearest to its limit, over all sizes and variants; None where there is no
            number.
        limit: The largest error that passes; None where there is no number.
        eager: The error of eager PyTorch on the same inputs; None where there is no number.
        status: `ok`, `FAIL`, or `skipped` where the requested backend does not take such calls, a
            library is not installed, or its bases run their own forward.
        note: What is wrong, or why it was skipped.
    """

    method: str
    what: str
    dtype: str
    backend: str
    error: float | None
    limit: float | None
    eager: float | None
    status: str
    note: str = ""

    @property
    def share(self) -> float:
        """How much of the limit the error takes; infinite for a failure without numbers."""
        if self.error is None or not self.limit:
            return math.inf if self.status == "FAIL" else 0.0
        return self.error / self.limit


Judged = Iterable[list[Measurement]]


class Job(NamedTuple):
    """The rows that come together: one method, one pair of dtypes.

    Args:
        method: As in `Row`.
        dtype: As in `Row`.
        backend: Finds the backend that such calls take and, if it was requested but can't take
            them, why not.
        run: Measures one problem after the other, given that backend's name; each by limits that
            grow, the last of which are right (`judged`).
    """

    method: str
    dtype: str
    backend: Callable[[], tuple[str, str | None]]
    run: Callable[[str], Iterable[Judged]]


def jobs(device: str, dtypes: Iterable[str], seed: int) -> Iterator[Job]:
    """Everything there is to check, in the order of the table.

    Args:
        device: "cpu", "cuda" or "cuda:<index>".
        dtypes: Keys of `DTYPES`.
        seed: Of all inputs.
    """
    sizes = GPU_SIZES if device.startswith("cuda") else SIZES
    pairs = [pair for name in dtypes for pair in DTYPES[name]]
    for name in ops.NAMES:
        for dtype, adapter_dtype in pairs[:1] if name == "dropout_mask" else pairs:
            backend = partial(_backend, METHODS["lora"], device, dtype, adapter_dtype)
            run = partial(_check_op, name, sizes, dtype, adapter_dtype, device, seed)
            label = "bool" if name == "dropout_mask" else _label(dtype, adapter_dtype)
            yield Job(f"op {name}", label, backend, run)
    for method in METHODS.values():
        for dtype, adapter_dtype in pairs:
            backend = partial(_backend, method, device, dtype, adapter_dtype)
            run = partial(_check_method, method, sizes, dtype, adapter_dtype, device, seed)
            yield Job(method.name, _label(dtype, adapter_dtype), backend, run)
            if dtype == torch.float64:
                yield Job(method.name, "float64", backend, partial(_check_gradients, method, device, seed))
    yield from _stored_jobs(device, [pairs_of[0][0] for pairs_of in map(DTYPES.__getitem__, dtypes)], seed)
    for function in sorted(functional.CALLS.keys() - {method.function for method in METHODS.values()}):
        yield Job(function, "", lambda: ("", None), partial(_no_check, function))


def _stored_jobs(device: str, dtypes: Iterable[torch.dtype], seed: int) -> Iterator[Job]:
    """One for each form and dtype; one alone of a form that is not here. No form has float64."""
    narrow = [dtype for dtype in dtypes if dtype != torch.float64]
    for name in stored_forms.FORMS:
        missing = stored_forms.why_not(name)
        for dtype in narrow[: None if missing is None else 1]:

            def backend(dtype: torch.dtype = dtype, missing: str | None = missing) -> tuple[str, str | None]:
                return ("", missing) if missing else _backend(METHODS["lora"], device, dtype, torch.float32)

            def run(_: str, name: str = name, dtype: torch.dtype = dtype) -> Iterator[Judged]:
                return stored_forms.check(name, device, dtype, seed)

            yield Job(f"base {name}", "" if missing else _label(dtype, dtype), backend, run)


def run_job(job: Job) -> list[Row]:
    """Run one job and return its rows of one job: one for each result; an exception is a row that
    fails.
    """
    worst: dict[str, Row] = {}
    backend = ""
    try:
        backend, why_not = job.backend()
        if why_not is not None:
            return [Row(job.method, "", job.dtype, backend, None, None, None, "skipped", why_not)]
        with dispatch.use_backend(backend) if backend else nullcontext():
            for problem in job.run(backend):
                for row in _worse(job, backend, problem, worst):
                    if _is_worse(row, worst):
                        worst[row.what] = row
    except stored_forms.NotFused as reason:
        return [Row(job.method, "", job.dtype, backend, None, None, None, "skipped", str(reason))]
    except Exception as error:
        note = f"{type(error).__name__}: {' '.join(str(error).split())}"
        worst["raised"] = Row(job.method, "raised", job.dtype, backend, None, None, None, "FAIL", note)
    return list(worst.values())


def _worse(job: Job, backend: str, problem: Judged, worst: dict[str, Row]) -> list[Row]:
    """Return a problem's rows that are nearer to their limits than those there are.

    With a larger limit a row is further from it: once none is nearer, none will be.
    """
    worse: list[Row] = []
    for measurements in problem:
        states = ((m, "ok" if m.ok else "FAIL") for m in measurements)
        rows = [Row(job.method, m.what, job.dtype, backend, m.error, m.limit, m.eager, s, m.note) for m, s in states]
        worse = [row for row in rows if _is_worse(row, worst)]
        if not worse:
            break
    return worse


def _is_worse(row: Row, worst: dict[str, Row]) -> bool:
    return row.what not in worst or row.share > worst[row.what].share


def _check_op(
    name: str,
    sizes: tuple[tuple[int, int, int, int], ...],
    dtype: torch.dtype,
    rank_dtype: torch.dtype,
    device: str,
    seed: int,
    backend: str,
) -> Iterator[Judged]:
    if name == "dropout_mask":
        yield [measure_dropout_mask(61, 103, backend=backend, device=device, seed=seed)]
    elif name not in OPS:
        raise NotImplementedError(f"{name} has no entry in delora_kernels.testing.OPS")
    else:
        for size in sizes:
            for problem in op_problems(
                name, *size, backend=backend, dtype=dtype, rank_dtype=rank_dtype, device=device, seed=seed
            ):
                yield judged(problem)


def _check_method(
    method: Method,
    sizes: tuple[tuple[int, int, int, int], ...],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: str,
    seed: int,
    backend: str,
) -> Iterator[Judged]:
    for size in sizes:
        bias = size[0] > 1
        problem = method.problem(*size, dtype=dtype, adapter_dtype=adapter_dtype, device=device, seed=seed, bias=bias)
        yield judged(problem)


def _check_gradients(method: Method, device: str, seed: int, backend: str) -> Iterator[Judged]:
    try:
        measured = Measurement("gradcheck", gradcheck(method, *GRADCHECK_SIZES, device=device, seed=seed), RTOL)
    except GradcheckError as error:
        measured = Measurement("gradcheck", math.inf, RTOL, note=str(error).splitlines()[0])
    yield [[measured]]


def _no_check(function: str, backend: str) -> Iterator[Judged]:
    raise NotImplementedError(f"{function} has no entry in delora_kernels.testing.METHODS")


def _backend(method: Method, device: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[str, str | None]:
    """Return the backend to check, and if it was requested but can't take such calls: why not.

    Nobody asked for one: the first that can take them, whether or not it is right, which is what is
    to be found out.
    """
    with dispatch.use_backend("eager"):  # takes every call, so it can be looked at
        call = method.call(method.draw(*SIZES[0], dtype=dtype, adapter_dtype=adapter_dtype, device=device))
    requested = dispatch.requested()
    if requested is not None:
        return requested, dispatch.reason_against(requested, call)
    here = backends.NAMES if call.x.device.type != "cpu" else ("eager",)
    return next(name for name in here if dispatch.reason_against(name, call) is None), None


def _label(dtype: torch.dtype, adapter_dtype: torch.dtype) -> str:
    names = [str(each).removeprefix("torch.") for each in (dtype, adapter_dtype)]
    return names[0] if dtype == adapter_dtype else "+".join(names)
