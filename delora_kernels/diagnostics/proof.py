"""Kernels prove themselves on a device before an automatic choice takes them there: run once,
judged in float64.

A verdict holds for what makes other kernels (`Case`). It is found by accelerate() and warmup(), or
at the first such call, y and every gradient against the limits of `testing`, and kept for the
process. This happens in a thread of its own, where the caller's autocast, hooks, modes and streams
are not, and other threads' calls see nothing of it. Who asks for a backend (`use_backend`,
DELORA_KERNELS_BACKEND) gets it unproved.

A call's forward pass, its recomputation by checkpointing and its backward pass must run on one
backend: their dropout masks and what they keep differ. So what could not be found out for want of
memory is not asked again between them, but by the next warmup() alone; and where a verdict changes
(a rank's kernels fail, and all ranks leave them alone), what runs again in a backward pass still
gets the answer that it had.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from delora_kernels.backends import tape
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


class NoMemory(Unproved):
    """There was no memory for it: warmup() may ask again."""


_LATER = "its kernels are not proved yet: "


class Proof(NamedTuple):
    """What the kernels of one case gave.

    Args:
        backend, function, device: As in `Case`.
        dtypes: Of a call, in words.
        reason: Why they are not used, or None: they are right.
        seconds: What finding it out took.
    """

    backend: str
    function: str
    dtypes: str
    device: str
    reason: str | None
    seconds: float

    def __str__(self) -> str:
        of = f"the {self.backend} kernels of {self.function} in {self.dtypes} on {self.device}"
        return of if self.reason is None else f"{of}: {self.reason}"


_verdicts: dict[Case, str | None] = {}
_put_off: dict[Case, str] = {}
"""Cases that found no memory, and what they said: not asked again in the midst of training."""
_before: dict[Case, str | None] = {}
"""Cases whose verdict has changed → what it was, for passes that began before."""
_seconds: dict[Case, float] = {}
_one_at_a_time = threading.Lock()


def why_not(backend: str, call: AnyCall) -> str | None:
    """Why an automatic choice does not take `backend` for such calls on their device, or None if it
    is right there.
    """
    return _verdict(backend, *_facts(call))


def kind_of(call: AnyCall) -> tuple[Any, ...]:
    """Return what calls have in common that the same kernels run."""
    return _facts(call)


def known_reason(backend: str, call: AnyCall) -> str | None:
    """Say why `backend` is known not to be taken for such calls; None: it is right, or not proved
    yet.
    """
    case = _case(backend, *_facts(call))
    return _put_off.get(case, _verdicts.get(case))


def proof_of(backend: str, call: AnyCall) -> Proof:
    """Prove what `backend` would run for such a call, and return what came of it, now or before."""
    facts = _facts(call)
    reason, case = _verdict(backend, *facts), _case(backend, *facts)
    return Proof(backend, case.function, _dtypes(case), case.device, reason, _seconds.get(case, 0.0))


def _facts(call: AnyCall) -> tuple[str, bool, bool, torch.dtype, torch.dtype, int, str]:
    o, drops = call.options, getattr(call, "seed", None) is not None
    rank = next((limit for limit in RANKS if _rank(call) <= limit), RANKS[-1])
    return o.method, drops, call.bias is not None, o.compute_dtype, o.rank_dtype, rank, str(call.x.device)


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
    case = _case(backend, function, drops, bias, compute_dtype, rank_dtype, rank, device)
    if case in _before:
        if _in_backward():
            return _before[case]
        del _before[case]
    if case not in _verdicts and case not in _put_off:
        try:
            _refuse_the_moment(device)
            with _one_at_a_time:
                if case not in _verdicts:
                    _verdicts[case] = _find(case)
        except Unproved as reason:
            if isinstance(reason, NoMemory):
                _put_off[case] = f"{_LATER}{reason}"
                logger.warning("not using %s: %s. warmup(model) asks again.", _in_words(case), _put_off[case])
            return f"{_LATER}{reason}"
    return _put_off[case] if case in _put_off else _verdicts[case]


def _case(
    backend: str,
    function: str,
    drops: bool,
    bias: bool,
    compute_dtype: torch.dtype,
    rank_dtype: torch.dtype,
    rank: int,
    device: str,
) -> Case:
    tf32 = compute_dtype == torch.float32 and allow_tf32()
    return Case(backend, function, drops, bias, compute_dtype, rank_dtype, tf32, rank, device)


# What torch.compile takes as a constant, it does not trace.
_verdict._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_the_moment(device: str) -> None:
    """Refuse where a graph is captured, which must not hold the proof, and in a backward pass,
    whose thread can't wait for another one's.
    """
    if device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
        raise Unproved("a CUDA graph is being captured")
    if _in_backward():
        raise Unproved("this is a backward pass")


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _find(case: Case) -> str | None:
    what = _in_words(case)
    logger.info("running %s once, to see whether they are right there", what)
    began = time.perf_counter()
    reason = _alone(lambda: prove(case))
    _seconds[case] = time.perf_counter() - began
    if reason is None:
        logger.info("%s are right (%.1f s)", what, _seconds[case])
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
        NoMemory: there was none for it.
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
        raise NoMemory(f"OutOfMemoryError: {error}") from None
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if chosen else "nothing to prove them with"


def ask_again() -> None:
    """Let the cases that found no memory be asked again."""
    _put_off.clear()


def agree() -> None:
    """Let every rank of a distributed run take the weakest result of all for each case; where none
    is under way, do nothing. Every rank must come here.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    everyones: list[Any] = [None] * distributed.get_world_size()
    own = _verdicts | _put_off
    said = {_anywhere(case): reason for case, reason in own.items() if reason is not None}
    distributed.all_gather_object(everyones, said)
    for case, reason in own.items():
        for rank, theirs in enumerate(everyones):
            if reason is None and _anywhere(case) in theirs:
                reason = theirs[_anywhere(case)]
                what = _LATER if reason.startswith(_LATER) else "its kernels failed on "
                _change(case, f"{what}rank {rank}: {reason.partition(': ')[2]}")


def _anywhere(case: Case) -> Case:
    return case._replace(device=case.device.partition(":")[0])


def _change(case: Case, reason: str) -> None:
    """Give another answer for a case from now on; what is planned on its kernels is forgotten."""
    logger.warning("not using %s: %s", _in_words(case), reason)
    _before[case] = _verdicts[case]
    answers: dict[Case, Any] = _put_off if reason.startswith(_LATER) else _verdicts
    answers[case] = reason
    tape.calls.clear()


def _in_words(case: Case) -> str:
    return f"the {case.backend} kernels of {case.function} in {_dtypes(case)} on {case.device}"


def _dtypes(case: Case) -> str:
    names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (case.compute_dtype, case.rank_dtype))
    return " and ".join(names) + (" (tf32)" if case.tf32 else "")
