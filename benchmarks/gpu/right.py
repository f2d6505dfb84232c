"""Every op and method once against float64 on the device, tests of tests/gpu, and compute-sanitizer
on a handful.

The time goes into compiling kernels for many small shapes, so that each op or method in each dtype
is a job of its own, as many at a time as there are cores. What is not done in time is named.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.rows import Rows

ROOT = Path(__file__).parents[2]
DTYPES = ("bfloat16", "float16", "float32")
TESTS = ("automatic_choice", "the_same_bits", "cuda_graph", "another_stream", "more_elements")
SANITIZED = ("-m", "pytest", "-q", "tests/gpu", "-k", "test_op and sizes0 and bfloat16")


class Job(NamedTuple):
    """What one process does: the check of this number among those of a backend, or a command."""

    name: str
    backend: str = ""
    number: int = -1
    command: tuple[str, ...] = ()


class Setting(NamedTuple):
    """What all checks share: the device, the seed of their numbers and odd shapes, their dtypes."""

    device: str
    seed: int
    dtypes: tuple[str, ...] = DTYPES


def jobs(backends: list[str], setting: Setting) -> list[Job]:
    """Return the sanitizer's, which take longest, then the tests, then every check."""
    from delora_kernels.diagnostics import check

    found = []
    tool = shutil.which("compute-sanitizer")
    for kind in ("memcheck", "racecheck") if tool else ():
        command = (str(tool), "--tool", kind, "--error-exitcode", "1", sys.executable, *SANITIZED)
        found.append(Job(f"compute-sanitizer {kind}", command=command))
    pytest = (sys.executable, "-m", "pytest", "-q", "-x", "tests/gpu", "-k")
    found += [Job(f"tests/gpu, {name}", command=(*pytest, f"test_{name}")) for name in TESTS]
    for backend in backends:
        for number, job in enumerate(check.jobs(setting.device, setting.dtypes, setting.seed)):
            found.append(Job(f"{backend}: {job.method} {job.dtype}".strip(), backend, number))
    return found


def done(job: Job, setting: Setting, seconds: float) -> tuple[str, str, float]:
    """Do a job in this process → "ok", "FAILED" or "skipped", what is to be said, seconds."""
    began = time.perf_counter()
    if job.command:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        try:
            run = subprocess.run(
                job.command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1.0, seconds)
            )
        except subprocess.TimeoutExpired:
            return "not done in time", "", time.perf_counter() - began
        said = (run.stdout + run.stderr).strip().splitlines()
        says = "\n".join(said[-1:] if run.returncode == 0 else said[-12:])
        return "ok" if run.returncode == 0 else "FAILED", says, time.perf_counter() - began
    from delora_kernels import use_backend
    from delora_kernels.diagnostics import check

    with use_backend(job.backend):
        rows = check.run_job(list(check.jobs(setting.device, setting.dtypes, setting.seed))[job.number])
    bad = [row for row in rows if row.status == "FAIL"]
    if bad:
        says = "; ".join(f"{row.what}: {row.error} of {row.limit} {row.note}" for row in bad)
        return "FAILED", says, time.perf_counter() - began
    worst = max(rows, key=lambda row: row.share, default=None)
    says = "" if worst is None else worst.note or f"{worst.what} takes {worst.share:.2f} of its limit"
    skipped = all(row.status == "skipped" for row in rows)
    return "skipped" if skipped else "ok", says, time.perf_counter() - began


def run(found: list[Job], setting: Setting, table: Rows, seconds: float, workers: int | None = None) -> int:
    """Do the jobs until the time is over; each gives a row. 0: nothing failed, 1: something did, 3:
    not all were done.
    """
    until = time.monotonic() + seconds
    pool = ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), get_context("spawn"))
    going: dict[Future[tuple[str, str, float]], Job] = {}
    for job in found:
        going[pool.submit(done, job, setting, seconds - 5)] = job
    processes = list((pool._processes or {}).values())
    try:
        for future in as_completed(list(going), timeout=max(0.1, until - time.monotonic())):
            job, problem = going.pop(future), future.exception()
            status, says, took = ("FAILED", repr(problem), 0.0) if problem else future.result()
            table.add({"job": job.name, "status": status, "seconds": took, "says": says})
    except TimeoutError:
        for job in going.values():
            table.add({"job": job.name, "status": "not done in time"})
    pool.shutdown(wait=not going, cancel_futures=True)
    for process in processes if going else ():
        process.terminate()
    statuses = {row["status"] for row in table.rows}
    return 1 if "FAILED" in statuses else 3 if "not done in time" in statuses else 0
