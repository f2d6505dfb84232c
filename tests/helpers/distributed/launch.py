"""Run a function in two processes of one gloo group, and show the traceback of the one that
fails.
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
    processes_of = context()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(WORLD):
            receiver, sender = processes_of.Pipe(duplex=False)
            process = processes_of.Process(target=_main, args=(sender, rank, folder, work, cases), daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


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


def _main(sender: Any, rank: int, folder: str, work: Callable[..., Any], cases: tuple[tuple[Any, ...], ...]) -> None:
    import torch
    from torch import distributed

    gc.freeze()  # what the server has imported
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not resolve
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # accelerate wants to see them; nobody binds
    warnings.simplefilter("ignore")  # PEFT's and FSDP's words on what the cases do on purpose
    error, results, case = None, [], None
    try:
        distributed.init_process_group(
            "gloo", f"file://{Path(folder) / 'store'}", timedelta(seconds=60), world_size=WORLD, rank=rank
        )
        for case in cases:
            results.append(work(rank, *case))
        distributed.barrier()
    except BaseException:
        error = f"{work.__module__}.{work.__name__}, case {case}\n{traceback.format_exc()}"
    sender.send((error, results))
    sender.close()
    os._exit(0)  # what a failed rank leaves behind (threads, half a collective) must not hold up its end
