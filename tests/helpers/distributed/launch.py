"""Run functions in two processes of one gloo group, and show the traceback of the one that fails.

The processes are kept from one call to the next, so that what a first pass sets up is set up once;
where one fails both end, and the next call starts two others.
"""

import gc
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from forked import context

WORLD = 2
_running: list[tuple[Any, Any]] = []
"""The process of each rank, and the pipe to it."""
_meeting: list[Any] = []
"""The folder of the file where they meet, and meet again for each group that a case makes."""


def on_two_processes(work: Callable[..., Any], *cases: tuple[Any, ...], seconds: float = 120) -> list[list[Any]]:
    """For rank 0 and rank 1: what `work(rank, *case)` returns for each case, one after another.

    Args:
        work: A function of a module, which the processes import.
        cases: Arguments that pickle can carry.
        seconds: After this the processes are killed.

    Raises:
        AssertionError: A process raised (the text is the case and its traceback), died, or took too
            long.
    """
    last = time.monotonic() + seconds
    try:
        if not _running:
            _start()
            _collect([pipe for _, pipe in _running], last)
        for _, pipe in _running:
            pipe.send((work, cases))
        return _collect([pipe for _, pipe in _running], last)
    except BaseException:
        end()
        raise


def _start() -> None:
    processes_of = context()
    _meeting.append(tempfile.TemporaryDirectory())
    for rank in range(WORLD):
        ours, theirs = processes_of.Pipe()
        process = processes_of.Process(target=_main, args=(theirs, rank, _meeting[0].name), daemon=True)
        process.start()
        theirs.close()
        _running.append((process, ours))


def end() -> None:
    """End the processes that are kept."""
    while _running:
        process, pipe = _running.pop()
        process.kill()
        process.join()
        pipe.close()
    while _meeting:
        _meeting.pop().cleanup()


def _collect(pipes: list[Any], end: float) -> list[list[Any]]:
    results: dict[int, Any] = {}
    while len(results) < WORLD:
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready: list[Any] = wait(waiting, max(0.0, end - time.monotonic()))
        assert ready, f"rank {sorted(set(range(WORLD)) - set(results))} did not finish in time"
        errors = []
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                error, results[rank] = pipe.recv()
            except EOFError:
                error = "died without a word"
            if error is not None:
                errors.append(f"rank {rank}: {error}")
        assert not errors, "\n".join(errors)
    return [results[rank] for rank in range(WORLD)]


def _main(pipe: Any, rank: int, folder: str) -> None:
    """Join the group, then answer each request until one fails or nobody asks any more."""
    import torch

    gc.freeze()  # what the server has imported
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not resolve
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # accelerate wants to see them; nobody binds
    warnings.simplefilter("ignore")  # PEFT's and FSDP's words on what the cases do on purpose
    answer = _answered(_meet, [(rank, folder)])
    while answer[0] is None:
        pipe.send(answer)
        try:
            work, cases = pipe.recv()
        except EOFError:
            os._exit(0)
        answer = _answered(work, [(rank, *case) for case in cases])
    pipe.send(answer)
    os._exit(0)  # what a failed rank leaves behind (threads, half a collective) must not hold up its end


def _meet(rank: int, folder: str) -> None:
    from torch import distributed

    store = f"file://{Path(folder) / 'store'}"
    distributed.init_process_group("gloo", store, timedelta(seconds=60), world_size=WORLD, rank=rank)


def _answered(work: Callable[..., Any], calls: list[tuple[Any, ...]]) -> tuple[str | None, list[Any]]:
    """What goes wrong, if anything does, and the results until then; both ranks get there."""
    from torch import distributed

    error, results, call = None, [], None
    try:
        for call in calls:
            results.append(work(*call))
        distributed.barrier()
    except BaseException:
        error = f"{work.__module__}.{work.__name__}, case {call}\n{traceback.format_exc()}"
    return error, results
