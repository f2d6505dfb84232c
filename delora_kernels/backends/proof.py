"""Kernels prove themselves on a device before an automatic choice takes them there: run once, judged in float64.

A verdict holds for what makes other kernels: a function of functional.py, with dropout or without, its pair of dtypes
and a class of ranks. It is found at the first such call, y and every gradient against the limits of `testing`, and kept
for the process. This happens in a thread of its own, where the caller's autocast, hooks, modes and streams are not. Who
asks for a backend (`use_backend`, DELORA_KERNELS_BACKEND) gets it unproved.
"""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from delora_kernels.call import AnyCall, Call, MoECall

logger = logging.getLogger(__name__)

SIZES = (193, 272, 144)
"""T, K, N: several tiles and partial ones, rows that 16 bytes divide, as those of models."""

RANKS = (16, 32, 64)
"""Up to each of them, kernels have tiles of their own; what is above takes several of the last."""


class Case(NamedTuple):
    """What a verdict holds for.

    Args:
        backend: Name of the backend.
        function: Of functional.py.
        drops: Whether there is dropout.
        compute_dtype, rank_dtype: As in the call's options.
        rank: One of `RANKS`.
        device: "cuda:0", ...
    """

    backend: str
    function: str
    drops: bool
    compute_dtype: torch.dtype
    rank_dtype: torch.dtype
    rank: int
    device: str


_verdicts: dict[Case, str | None] = {}
_one_at_a_time = threading.Lock()


def why_not(backend: str, call: AnyCall) -> str | None:
    """Why an automatic choice does not take `backend` for such calls on their device, or None if it is right there."""
    o, rank = call.options, 0
    if isinstance(call, Call):
        rank = call.A.shape[0]
    elif isinstance(call, MoECall):
        rank = call.B.shape[2]
    drops = getattr(call, "seed", None) is not None
    return _verdict(backend, o.method, drops, o.compute_dtype, o.rank_dtype, _class(rank), str(call.x.device))


def _class(rank: int) -> int:
    return next((limit for limit in RANKS if rank <= limit), RANKS[-1])


def _verdict(*case: Any) -> str | None:
    case = Case(*case)
    if case not in _verdicts:
        if case.device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
            return "its kernels were not proved before a CUDA graph was captured"
        with _one_at_a_time:
            if case not in _verdicts:
                _verdicts[case] = _find(case)
    return _verdicts[case]


# What torch.compile takes as a constant, it does not trace.
_verdict._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find(case: Case) -> str | None:
    import delora_kernels.testing  # noqa: F401  a thread must not wait for an import that its caller is in

    what = f"the {case.backend} kernels of {case.function} in {_dtypes(case)} on {case.device}"
    logger.info("running %s once, to see whether they are right there", what)
    began = time.perf_counter()
    with ThreadPoolExecutor(1, thread_name_prefix="delora_kernels-proof") as alone:
        reason = alone.submit(prove, case).result()
    if reason is None:
        logger.info("%s are right (%.1f s)", what, time.perf_counter() - began)
        return None
    logger.warning("not using %s: %s. Please report it with the output of `python -m delora_kernels`.", what, reason)
    return f"its kernels failed on {case.device}: {reason}"


def prove(case: Case) -> str | None:
    """Run a case and compare with float64: None, or what is wrong."""
    from delora_kernels import backends
    from delora_kernels.testing import METHODS, measure

    chosen = [m for m in METHODS.values() if m.function == case.function and bool(m.dropout_p) == case.drops]
    dtypes: dict[str, Any] = {"dtype": case.compute_dtype, "adapter_dtype": case.rank_dtype}
    try:
        with backends.proving(case.backend):
            for method in chosen:
                for m in measure(method.problem(*SIZES, case.rank, device=case.device, **dtypes)):
                    if not m.ok:
                        return f"{m.what} of {method.name}: " + (m.note or f"error {m.error:.1e}, limit {m.limit:.1e}")
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if chosen else "nothing to prove them with"


def _dtypes(case: Case) -> str:
    names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (case.compute_dtype, case.rank_dtype))
    return " and ".join(names)
