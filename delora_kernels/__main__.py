"""The command line: `python -m delora_kernels` describes the environment, `python -m delora_kernels check` tests it."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from delora_kernels import backends, dispatch
from delora_kernels.diagnostics.check import DTYPES, Row, jobs, run_job
from delora_kernels.diagnostics.environment import as_text, environment

_COLUMNS = "{:<25} {:<11} {:<16} {:<7} {:>8} {:>8}  {}"
_HEADER = _COLUMNS.format("method", "what", "dtype", "backend", "error", "limit", "ok")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `python -m delora_kernels`; None: the process's own.

    Returns:
        The exit status: 0; 1 if a check failed; 2 if what was asked for can't run here.

    Raises:
        SystemExit: argparse's, with status 2 for arguments it does not know.
    """
    options = _parser().parse_args(arguments)
    if options.command is None:
        print(as_text(environment()))
        return 0
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    reason = _why_not(device, options.backend)
    if reason is not None:
        return _refuse(reason)
    start = time.perf_counter()
    rows = _run(device, options)
    seconds = time.perf_counter() - start
    if all(row.status == "skipped" for row in rows):
        return _refuse(f"nothing to check: {rows[0].note}")
    failed = [row for row in rows if row.status == "FAIL"]
    if options.json:
        report = {"environment": environment(), "device": device, "seed": options.seed, "seconds": round(seconds, 3)}
        print(json.dumps(report | {"ok": not failed, "rows": [_plain(row) for row in rows]}, indent=1, allow_nan=False))
    else:
        print(_summary(rows, failed, seconds))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m delora_kernels",
        description="Print the environment report: versions, devices, backends and why each can or can't run.",
    )
    check = parser.add_subparsers(dest="command", metavar="check").add_parser(
        "check",
        help="check every op and every method on this machine",
        description="Check every op and method against the float64 oracle. The exit status is 1 if one fails.",
    )
    check.add_argument("--device", help="cpu, cuda or cuda:<index>; default: cuda if there is one")
    check.add_argument("--backend", choices=backends.NAMES, help="default: the one that each call would take")
    check.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default: all of them")
    check.add_argument("--seed", type=_seed, default=0, help="of every input; default: 0")
    check.add_argument("--json", action="store_true", help="print JSON in place of the table")
    check.add_argument("--verbose", action="store_true", help="print every result, not the tightest one of each kind")
    return parser


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 1 << 32):
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2³² − 1, got {text!r}")
    return int(text)


def _why_not(device: str, backend: str | None) -> str | None:
    """Why nothing can be checked on this device with this backend, or None."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        return f"--device must be cpu, cuda or cuda:<index>, got {device!r}"
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        return f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices"
    try:
        backend = backend or dispatch.requested()
    except ValueError as error:
        return str(error)
    reason = None if backend is None else backends.unavailable(backend)
    return None if reason is None else f"the backend {backend!r} can't run: {reason}"


def _refuse(reason: str) -> int:
    print(f"python -m delora_kernels check: {reason}", file=sys.stderr)
    return 2


def _run(device: str, options: argparse.Namespace) -> list[Row]:
    """Every row; the table is printed as it grows, with a progress bar behind it where a person watches."""
    rows: list[Row] = []
    if not options.json:
        print(f"device {device}, seed {options.seed}\n{_HEADER}", flush=True)
    with _one_thread(), nullcontext() if options.backend is None else dispatch.use_backend(options.backend):
        todo = list(jobs(device, options.dtype or list(DTYPES), options.seed))
        for done, job in enumerate(todo):
            _progress(done, len(todo), f"{job.method} {job.dtype}")
            new = run_job(job)
            rows += new
            _progress()
            if not options.json:
                shown = new if options.verbose else _worth_showing(new)
                print("\n".join(_line(row) for row in shown), flush=True)
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the CPU's work on one thread: the problems are tiny, and on a busy machine threads would wait for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _progress(done: int = 0, total: int = 0, what: str = "") -> None:
    """Draw the bar on a terminal's standard error; without arguments: wipe it."""
    if sys.stderr.isatty():
        bar = f"[{'#' * (30 * done // total):<30}] {done}/{total} {what}" if total else ""
        print(f"\r\033[K{bar}", end="", file=sys.stderr, flush=True)


def _worth_showing(rows: list[Row]) -> list[Row]:
    """The rows that failed, or else the one nearest to its limit."""
    return [row for row in rows if row.status == "FAIL"] or [max(rows, key=lambda row: row.share)]


def _line(row: Row) -> str:
    error, limit = ("-" if value is None else f"{value:.1e}" for value in (row.error, row.limit))
    verdict = f"{row.status}: {row.note}" if row.note else row.status
    return _COLUMNS.format(row.method, row.what, row.dtype, row.backend, error, limit, verdict)


def _summary(rows: list[Row], failed: list[Row], seconds: float) -> str:
    checked = [row for row in rows if row.status != "skipped"]
    names = {row.method for row in checked}
    scope = f"{sum(name.startswith('op ') for name in names)} ops, {sum(' ' not in name for name in names)} methods"
    if failed:
        verdict = f"{len(failed)} FAILED: {', '.join(dict.fromkeys(row.method for row in failed))}"
    else:
        verdict = "all within their limits"
    return f"{len(checked)} results ({scope}) in {seconds:.1f} s, {verdict}"


def _plain(row: Row) -> dict[str, Any]:
    """The row as JSON has it: there are no infinite numbers, so null stands for them (`note` says why)."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(row).items()
    }


def _run_as_program() -> int:
    """main(), quiet when the reader of its output goes away, as `| head -1` does."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes when it exits
        return 141  # 128 + SIGPIPE, what a shell reports of any program that is stopped this way
    return status


if __name__ == "__main__":
    sys.exit(_run_as_program())
