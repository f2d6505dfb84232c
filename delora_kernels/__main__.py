"""The command line: `python -m delora_kernels` describes the environment.

`check` tests every op and method there, `compare` measures a model with PEFT's and with fused
adapters, `build-cuda` compiles the CUDA kernels for its GPUs.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from delora_kernels import backends, dispatch
from delora_kernels.backends.cuda import build as cuda_build
from delora_kernels.backends.cuda import library as cuda_library
from delora_kernels.diagnostics.check import DTYPES, Row, jobs, run_job
from delora_kernels.diagnostics.environment import as_text, environment
from delora_kernels.version import __version__

_COLUMNS = "{:<25} {:<11} {:<16} {:<7} {:>8} {:>8} {:>5}  {}"
_HEADER = _COLUMNS.format("method", "what", "dtype", "backend", "error", "limit", "part", "ok")


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
    run = {"build-cuda": _build_cuda, "compare": _compare, "check": _check}[options.command]
    return run(options)


def _build_cuda(options: argparse.Namespace) -> int:
    """Compile the CUDA kernels to where the package finds them; the exit status."""
    try:
        cuda_build.build(cuda_library.new_path(), os.environ, partial(print, flush=True), " ".join(options.arch or []))
    except cuda_build.BuildError as error:
        print(
            "\n".join(filter(None, (error.details, f"python -m delora_kernels build-cuda: {error}"))), file=sys.stderr
        )
        return 1
    cuda_library.load.cache_clear()
    try:
        cuda_library.load()
    except cuda_library.LibraryError as error:
        print(f"python -m delora_kernels build-cuda: {error}", file=sys.stderr)
        return 1
    return 0


def _compare(options: argparse.Namespace) -> int:
    """Measure a model; the exit status."""
    options.device = _of_this_rank(options.device)
    reason = _why_no_device(options.device)
    if reason is not None:
        return _refuse(reason, "compare")
    try:
        from delora_kernels.integrations.peft.compare import command  # it imports PEFT and Transformers
    except ImportError as error:
        return _refuse(f"needs PEFT and Transformers: pip install 'delora-kernels[peft]' ({error})", "compare")
    fields = {name: value for name, value in vars(options).items() if name in command.Wanted._fields}
    try:
        comparison = command.run(command.Wanted(**fields))
    except (OSError, ValueError) as error:
        return _refuse(str(error), "compare")
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(comparison.to_dict(), indent=1) if options.json else comparison)
    return 130 if comparison.interrupted else 0  # 128 + SIGINT, as a shell reports it


def _of_this_rank(device: str) -> str:
    """Return the device that a launcher means this process to use, where "cuda" leaves it open."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def _check(options: argparse.Namespace) -> int:
    """Run the checks that are asked for; the exit status."""
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
    parser.add_argument("--version", action="version", version=f"delora-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="check | compare | build-cuda")
    build = commands.add_parser(
        "build-cuda",
        help="compile the CUDA kernels (needs nvcc)",
        description="Compile the CUDA kernels for this machine's GPUs, into the package or the user's cache.",
    )
    build.add_argument(
        "--arch",
        nargs="+",
        metavar="8.0",
        help="compute capabilities, as in TORCH_CUDA_ARCH_LIST; all: every one; default: the GPUs of this machine",
    )
    check = commands.add_parser(
        "check",
        help="check every op and every method on this machine",
        description="Check every op and method against the float64 oracle. The exit status is 1 if one fails. "
        "In the table, part is what the error takes of its limit.",
    )
    check.add_argument("--device", help="cpu, cuda or cuda:<index>; default: cuda if there is one")
    check.add_argument("--backend", choices=backends.NAMES, help="default: the one that each call would take")
    check.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default: all of them")
    check.add_argument("--seed", type=_seed, default=0, help="of every input; default: 0")
    check.add_argument("--json", action="store_true", help="print JSON in place of the table")
    check.add_argument("--verbose", action="store_true", help="print every result, not the tightest one of each kind")
    _add_compare(commands)
    return parser


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="measure a model without adapters, with PEFT's and with fused ones",
        description="Time forward and backward of a causal language model on random tokens: without adapters, with "
        "PEFT's layers, and accelerated. Nothing is trained or written.",
    )
    compare.add_argument("--model", required=True, help="a hub's name or a folder; one with config.json alone will do")
    compare.add_argument("--adapter", help="a saved adapter, in place of a new one")
    compare.add_argument("--method", choices=("lora", "rslora", "dora", "delora"), default="lora", help="default: lora")
    compare.add_argument("--rank", type=_positive, default=16, help="default: 16")
    compare.add_argument("--batch", dest="sequences", type=_positive, default=2, help="sequences; default: 2")
    compare.add_argument("--seq-len", dest="tokens", type=_positive, default=512, help="default: 512")
    compare.add_argument("--steps", type=_positive, default=5, help="timed passes of each form; default: 5")
    compare.add_argument(
        "--seconds",
        type=_positive,
        default=110,
        help="fewer passes rather than longer than this; default: 110",
    )
    compare.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    compare.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    compare.add_argument("--autocast", action="store_true", help="run under bfloat16 autocast")
    compare.add_argument("--checkpointing", action="store_true", help="checkpoint the model's blocks")
    compare.add_argument("--json", action="store_true", help="print JSON in place of the table")


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 1 << 32):
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2³² − 1, got {text!r}")
    return int(text)


def _why_not(device: str, backend: str | None) -> str | None:
    """Why nothing can be checked on this device with this backend, or None."""
    reason = _why_no_device(device)
    if reason is not None:
        return reason
    try:
        backend = backend or dispatch.requested()
    except ValueError as error:
        return str(error)
    reason = None if backend is None else backends.unavailable(backend)
    return None if reason is None else f"the backend {backend!r} can't run: {reason}"


def _why_no_device(device: str) -> str | None:
    """Why this device can't be used, or None."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        return f"--device must be cpu, cuda or cuda:<index>, got {device!r}"
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        return f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices"
    return None


def _refuse(reason: str, command: str = "check") -> int:
    print(f"python -m delora_kernels {command}: {reason}", file=sys.stderr)
    return 2


def _run(device: str, options: argparse.Namespace) -> list[Row]:
    """Every row; the table is printed as it grows, with a progress bar behind it where a person
    watches.
    """
    rows: list[Row] = []
    if not options.json:
        print(f"device {device}, seed {options.seed}\n{_HEADER}", flush=True)
    with _one_thread(), nullcontext() if options.backend is None else dispatch.use_backend(options.backend):
        todo = list(jobs(device, options.dtype or list(DTYPES), options.seed))
        bar = tqdm(todo, leave=False, mininterval=0, disable=None)  # None: where nobody watches
        for job in bar:
            bar.set_description(f"{job.method} {job.dtype}")
            new = run_job(job)
            rows += new
            if not options.json:
                shown = new if options.verbose else _worth_showing(new)
                with bar.external_write_mode(sys.stdout):
                    print("\n".join(_line(row) for row in shown), flush=True)
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the CPU's work on one thread: the problems are tiny, and on a busy machine threads would
    wait for others.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _worth_showing(rows: list[Row]) -> list[Row]:
    """Return the rows that failed, or else the one nearest to its limit."""
    return [row for row in rows if row.status == "FAIL"] or [max(rows, key=lambda row: row.share)]


def _line(row: Row) -> str:
    error, limit = ("-" if value is None else f"{value:.1e}" for value in (row.error, row.limit))
    verdict = f"{row.status}: {row.note}" if row.note else row.status
    part = "-" if row.error is None or not row.limit else f"{row.share:.0%}"
    return _COLUMNS.format(row.method, row.what, row.dtype, row.backend, error, limit, part, verdict)


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
    """Return the row as JSON has it: there are no infinite numbers, so null stands for them (`note`
    says why).
    """
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(row).items()
    }


def _run_as_program() -> int:
    """Run main(), quiet when the reader of its output goes away, as `| head -1` does."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes when it exits
        return 141  # 128 + SIGPIPE, what a shell reports of any program that is stopped this way
    return status


if __name__ == "__main__":
    sys.exit(_run_as_program())
