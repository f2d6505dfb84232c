"""Compile what a command will launch, before it begins, in parallel: into Triton's cache on disk.

A device waits for nothing but kernels: the variants are those that the calls ask for in front of
the stand-in (benchmarks/codegen/recording.py), each once.
"""

import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import NamedTuple

from benchmarks.codegen.calls import Layer, steps_of
from benchmarks.codegen.compiling import cached
from benchmarks.codegen.recording import Binary, Launch


class Ready(NamedTuple):
    """What was compiled: how many variants, seconds until the last was there, seconds of all
    processes together; what did not compile.
    """

    variants: int
    seconds: float
    work: float
    failed: list[str]

    def says(self) -> str:
        """In a line."""
        bad = f", FAILED: {', '.join(self.failed)}" if self.failed else ""
        return f"{self.variants} variants compiled in {self.seconds:.0f} s ({self.work:.0f} s of work){bad}"


def binaries_of(layers: Iterable[Layer], capability: tuple[int, int] = (9, 0)) -> list[Binary]:
    """Return what these layers launch, each binary once."""
    found: dict[str, Binary] = {}
    for layer in layers:
        for step in steps_of(layer, capability):
            if isinstance(step, Launch):
                found[step.binary.key] = step.binary
    return list(found.values())


def compile_ahead(binaries: list[Binary], capability: tuple[int, int] = (9, 0), workers: int | None = None) -> Ready:
    """Compile them all, on all cores."""
    began, work, failed = time.perf_counter(), 0.0, []
    at = capability[0] * 10 + capability[1]
    # processes of their own: a forked one can't use a CUDA device that its parent has begun to
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        jobs = {pool.submit(cached, binary, at): binary for binary in binaries}
        for job in as_completed(jobs):
            if job.exception() is None:
                work += job.result()
            else:
                failed.append(f"{jobs[job].kernel} {jobs[job].key}: {job.exception()}")
    return Ready(len(binaries), time.perf_counter() - began, work, failed)
