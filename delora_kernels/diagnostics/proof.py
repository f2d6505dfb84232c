"""Kernels prove themselves on a device before an automatic choice takes them there: run once,
judged in float64.

A verdict holds for what makes other kernels (`Case`). It is found at the first such call, y and
every gradient against the limits of `testing`, and kept for the process. This happens in a thread
of its own, where the caller's autocast, hooks, modes and streams are not, and other threads' calls
see nothing of it. Who asks for a backend (`use_backend`, DELORA_KERNELS_BACKEND) gets it unproved.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from delora_kernels.call import AnyCall, Call, GroupedCall, MoECall
from delora_kernels.dispatch import proving
from delora_kernels.dtypes import allow_tf32

logger = logging.getLogger(__name__)

SIZES = ((193, 272, 144), (40, 64, 48))
"""T, K, N: several tiles and partial ones, whose sums are split among programs; and one tile, whose
sums are not. Rows
that 16 bytes divide, as those of models."""

RANKS = (16, 32, 64, 128)
"""Up to each of them, kernels have tiles of their own; what is above takes several of the last."""

EXPERTS = 4
"""Of the mixtures that stand for all: their ranks are the class's by this."""


class Case(NamedTuple):
    """What a verdict holds for.

    Args:
        backend: Name of the backend.
        function: Of functional/.
        drops: Whether there is dropout.
        bias: Whether there is a bias.
        compute_dtype, rank_dtype: As in the call's options.
        tf32: Whether float32 operands are multiplied as tf32.
        rank: One of `RANKS`; a mixture's experts have it together.
        device: "cuda:0", ...
    """

    backend: str
    function: str
    drops: bool
    bias: bool
    compute_dtype: torch.dtype
    rank_dtype: torch.dtype
    tf32: bool
    rank: int
    device: str


class Unproved(Exception):
    """Nothing was found out: another call may ask again."""


_verdicts: dict[Case, str | None] = {}
_one_at_a_time = threading.Lock()


def why_not(backend: str, call: AnyCall) -> str | None:
    """Why an automatic choice does not take `backend` for such calls on their device, or None if it
    is right there.
    """
    o, drops = call.options, getattr(call, "seed", None) is not None
    rank = next((limit for limit in RANKS if _rank(call) <= limit), RANKS[-1])
    dtypes, device = (o.compute_dtype, o.rank_dtype), str(call.x.device)
    return _verdict(backend, o.method, drops, call.bias is not None, *dtypes, rank, device)


def _rank(call: AnyCall) -> int:
    if isinstance(call, Call):
        return call.A.shape[0]
    if isinstance(call, GroupedCall):
        return 0 if call.A is None else call.A.shape[1]
    return call.B.shape[0] * call.B.shape[2] if isinstance(call, MoECall) else 0


def _verdict(
    backend: str,
    function: str,
    drops: bool,
    bias: bool,
    compute_dtype: torch.dtype,
    rank_dtype: torch.dtype,
    rank: int,
    device: str,
) -> str | None:
    tf32 = compute_dtype == torch.float32 and allow_tf32()
    case = Case(backend, function, drops, bias, compute_dtype, rank_dtype, tf32, rank, device)
    if case not in _verdicts:
        try:
            _refuse_the_moment(device)
            with _one_at_a_time:
                if case not in _verdicts:
                    _verdicts[case] = _find(case)
        except Unproved as reason:
            return f"its kernels are not proved yet: {reason}"
    return _verdicts[case]


# What torch.compile takes as a constant, it does not trace.
_verdict._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_the_moment(device: str) -> None:
    """Refuse where a graph is captured, which must not hold the proof, and in a backward pass,
    whose thread can't wait for another one's.
    """
    if device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
        raise Unproved("a CUDA graph is being captured")
    if torch._C._current_graph_task_id() != -1:
        raise Unproved("this is a backward pass")


def _find(case: Case) -> str | None:
    what = f"the {case.backend} kernels of {case.function} in {_dtypes(case)} on {case.device}"
    logger.info("running %s once, to see whether they are right there", what)
    began = time.perf_counter()
    reason = _alone(lambda: prove(case))
    if reason is None:
        logger.info("%s are right (%.1f s)", what, time.perf_counter() - began)
        return None
    logger.warning("not using %s: %s. Please report it with the output of `python -m delora_kernels`.", what, reason)
    return f"its kernels failed on {case.device}: {reason}"


def _alone(run: Callable[[], str | None]) -> str | None:
    """Return what `run` returns or raises in a thread of its own."""
    results: list[str | None] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(run())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="delora_kernels-proof")
    try:
        thread.start()
    except RuntimeError as error:  # the interpreter ends
        raise Unproved(str(error)) from None
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def prove(case: Case) -> str | None:
    """Run a case and compare with float64: None, or what is wrong.

    Raises:
        Unproved: there was no memory for it.
    """
    from delora_kernels.testing import METHODS, failures  # most processes prove nothing: theirs is not to be imported

    chosen = [m for m in METHODS.values() if m.function == case.function and bool(m.dropout_p) == case.drops]
    rank = case.rank // EXPERTS if case.function == "moe_lora_linear" else case.rank
    options: dict[str, Any] = {"dtype": case.compute_dtype, "adapter_dtype": case.rank_dtype}
    try:
        with proving(case.backend):
            for method in chosen:
                for sizes in SIZES:
                    problem = method.problem(*sizes, rank, device=case.device, bias=case.bias, **options)
                    for m in failures(problem, poison=False):
                        wrong = m.note or f"error {m.error:.1e}, limit {m.limit:.1e}"
                        return f"{m.what} of {method.name}: {wrong}"
    except torch.OutOfMemoryError as error:
        raise Unproved(f"OutOfMemoryError: {error}") from None
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if chosen else "nothing to prove them with"


def _dtypes(case: Case) -> str:
    names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (case.compute_dtype, case.rank_dtype))
    return " and ".join(names) + (" (tf32)" if case.tf32 else "")
