"""Every op and method once against float64 on the device, tests of tests/gpu, and compute-sanitizer
on a handful.

The time goes into compiling kernels for many small shapes, so that each op or method in each dtype
is a job of its own, as many at a time as there are cores, those in bfloat16 first. What is not done
in time is named, and stopped: nothing goes on beside what is measured next.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.codegen.recording import Binary, recording
from benchmarks.gpu.rows import Rows
from delora_kernels import use_backend

ROOT = Path(__file__).parents[2]
DTYPES = ("bfloat16", "float32", "float16")
TESTS = ("automatic_choice", "the_same_bits", "cuda_graph", "another_stream", "more_elements")
HANDFUL = "test_op and bfloat16-sizes0 and not route and (expand or project or input_backward or row_norm or reflect)"
"""Tests that run under the sanitizer: enough kernels for its minutes."""
SANITIZED = {"triton": "triton-update or triton-prefill", "cuda": "cuda"}
"""Backend → the ways of tests/gpu that are its own."""
AT_THE_END = 5.0
"""Seconds before the end at which commands are stopped."""


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

    found, checks = [], []
    tool, ways = shutil.which("compute-sanitizer"), " or ".join(SANITIZED.get(each, each) for each in backends)
    pytest = (sys.executable, "-m", "pytest", "-q", "-x", "tests/gpu", "-k")
    for kind in ("memcheck", "racecheck") if tool else ():
        command = (str(tool), "--tool", kind, "--error-exitcode", "1", *pytest, f"{HANDFUL} and ({ways})")
        found.append(Job(f"compute-sanitizer {kind}", command=command))
    found += [Job(f"tests/gpu, {name}", command=(*pytest, f"test_{name}")) for name in TESTS]
    for backend in backends:
        for number, job in enumerate(check.jobs(setting.device, setting.dtypes, setting.seed)):
            checks.append((_turn(job.dtype), Job(f"{backend}: {job.method} {job.dtype}".strip(), backend, number)))
    return found + [job for _, job in sorted(checks, key=lambda each: each[0])]


def _turn(dtype: str) -> int:
    """Return when a dtype's turn is: what people train in comes first."""
    return next((turn for turn, name in enumerate(DTYPES) if dtype.startswith(name)), 0)


def binaries(setting: Setting) -> list[Binary]:
    """Return what the checks of the Triton backend launch, each once: recorded in front of the
    stand-in, where nothing is computed and nothing judged.
    """
    from delora_kernels.diagnostics import check

    def launched(problem: Any, poison: bool = True) -> list[Any]:
        problem.run(problem.inputs)
        return []

    found: dict[str, Binary] = {}
    sizes = patch.object(check, "SIZES", check.GPU_SIZES)
    with patch.object(check, "judged", launched), sizes, recording() as seen, use_backend("triton"):
        for job in check.jobs("cpu", setting.dtypes, setting.seed):
            check.run_job(job)
            found |= {launch.binary.key: launch.binary for launch in seen.launches}
            seen.steps.clear()
    return list(found.values())


def done(job: Job, setting: Setting, until: float) -> tuple[str, str, float]:
    """Do a job in this process → "ok", "FAILED", "skipped" or "not done in time", what is to be
    said, seconds; a command is stopped at `until`, on time.monotonic, which all processes share.
    """
    began = time.perf_counter()
    if _LOST and not job.command:  # after an illegal access all that a process does on the device fails
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            return fresh.submit(done, job, setting, until).result()
    if job.command:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if "automatic" in job.name:
            environment.pop("DELORA_KERNELS_BACKEND", None)  # with it nothing is chosen
        # in a session of its own, so that what the command itself started is stopped with it
        with subprocess.Popen(
            job.command, cwd=ROOT, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as running:  # fmt: skip
            try:
                said, _ = running.communicate(timeout=max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                said, _ = running.communicate()
                last = "".join(said.strip().splitlines()[-1:])
                return "not done in time", last, time.perf_counter() - began
        lines = said.strip().splitlines()
        says = "\n".join(lines[-1:] if running.returncode == 0 else lines[-12:])
        return "ok" if running.returncode == 0 else "FAILED", says, time.perf_counter() - began
    from delora_kernels.diagnostics import check

    with use_backend(job.backend):
        rows = check.run_job(list(check.jobs(setting.device, setting.dtypes, setting.seed))[job.number])
    bad = [row for row in rows if row.status == "FAIL"]
    if bad:
        _LOST.extend(_errors(setting.device))
        says = "; ".join(f"{row.what}: {row.error} of {row.limit} {row.note}" for row in bad)
        return "FAILED", says, time.perf_counter() - began
    worst = max(rows, key=lambda row: row.share, default=None)
    says = "" if worst is None else worst.note or f"{worst.what} takes {worst.share:.2f} of its limit"
    skipped = all(row.status == "skipped" for row in rows)
    return "skipped" if skipped else "ok", says, time.perf_counter() - began


_LOST: list[str] = []
"""Why this process can't use the device any more."""


def _errors(device: str) -> list[str]:
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        return [str(error)]
    return []


def run(found: list[Job], setting: Setting, table: Rows, seconds: float, workers: int | None = None) -> int:
    """Do the jobs until the time is over; each gives a row. 0: nothing failed, 1: something did, 3:
    not all were done.
    """
    until = time.monotonic() + seconds
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process: eager PyTorch runs on the CPU in all of them
    pool = ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), get_context("spawn"))
    going: dict[Future[tuple[str, str, float]], Job] = {}
    for job in found:
        going[pool.submit(done, job, setting, until - AT_THE_END)] = job
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
