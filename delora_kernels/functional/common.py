"""What the functions do alike with checked arguments: choose dtypes and the seed, make a low-rank
call, run a call.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from delora_kernels import checks, dispatch
from delora_kernels.autograd import function, replayed, shared_replayed
from delora_kernels.autograd.low_rank import AdaptedLinear
from delora_kernels.autograd.shared_input import run_shared
from delora_kernels.call import AnyCall, Call, Options
from delora_kernels.dispatch import choose
from delora_kernels.functional import planned
from delora_kernels.op_arguments import Start, Strength

plain_torch: Any = None
"""functional/plain_torch.py, which brings the reference with it: there once a program is exported,
for importing the package is to cost little.
"""


def exporting() -> bool:
    """Tell whether a program is being made that must run without this library.

    That is under torch.export, strict or not, torch.onnx.export and torch.jit.trace; torch.compile
    runs in this process and keeps the ops. Everything that is to be plain torch in such a program
    asks here.
    """
    global plain_torch
    if torch.compiler.is_dynamo_compiling():  # by itself: after a graph break, which no export has
        return False
    # torch 2.7 does not say so while Dynamo reads a strict export, whose translator knows
    dynamo = sys.modules.get("torch._dynamo.symbolic_convert")
    found = torch.compiler.is_exporting() or torch.jit.is_tracing()
    found = found or (dynamo is not None and getattr(getattr(dynamo.tls, "current_tx", None), "export", False))
    if found and plain_torch is None:
        plain_torch = importlib.import_module("delora_kernels.functional.plain_torch")
    return found


# A constant of what torch.compile traces: traced, some of these say True of torch.compile as well.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(family: Any, call: AnyCall, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Run a call on the backend that takes it, or in plain torch where a program is exported.

    Args:
        family: The autograd Function of the call.
        call: The call.
        shape: Of x as it came, [..., K].
    """
    on_a_cpu = dispatch._requested is None and call.x.is_cpu  # where nothing is replayed
    key = None if on_a_cpu else planned.key_of(family, call[:-1], call.options)
    outputs = None if key is None else replayed.run(key, call[:-1])
    if outputs is not None:
        y = outputs[0]  # of call.x, whose rows may be those of an x of other leading dimensions
        return outputs if y.dim() == len(shape) else (function.in_shape(y, shape), *outputs[1:])
    if exporting():
        outputs = plain_torch.run(call, shape)
    else:
        backend = choose(call)
        outputs = function.run(family, call, backend, shape)
        if key is not None:
            replayed.learn(key, family, call, backend)
    if call.weight is not None and not isinstance(call.weight, Tensor):
        return call.weight.output(outputs[0], call.x), *outputs[1:]
    return outputs


def run_linears(calls: Sequence[Call], shape: Sequence[int], key: Any = None) -> tuple[Tensor, ...]:
    """Run calls of low-rank methods of one x as one, or in plain torch where a program is exported.

    Args:
        calls: The calls.
        shape: Of x as it came, [..., K].
        key: What `linears_at_a_glance` returned: by which they are found from now on, if they are
            planned.
    """
    if exporting():
        return tuple(plain_torch.run(call, shape)[0] for call in calls)
    chosen = [choose(call) for call in calls]
    if any(name != chosen[0] for name in chosen):  # a rank that only one of them takes
        return tuple(run(AdaptedLinear, call, shape)[0] for call in calls)
    outputs = run_shared(calls, chosen[0])
    if key is not None:
        shared_replayed.learn(key, calls, chosen[0])
    bases: list[Any] = [call.weight for call in calls]
    x = calls[0].x
    found = [y if isinstance(of, Tensor) else of.output(y, x) for of, y in zip(bases, outputs, strict=True)]
    return tuple(y if len(shape) > 1 else y[0] for y in found)


def seeds(name: str, seed: Any, x: Tensor, masks: int = 0) -> Tensor | None:
    """Return the checked seeds of `masks` masks; None where a program is exported, which draws with
    torch's dropout.
    """
    if not exporting():
        return checks.seed(name, seed, x, masks)
    if seed is not None:
        remedy = "leave it out: the program's masks come from torch's generator"
        raise checks.fail(ValueError, name, "seed", "None in a program that is exported", seed, remedy)
    return None


def dtypes(x: Tensor, weight: Any, *factors: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """compute_dtype and rank_dtype of a call: autocast's, or x's (a stored base's own) and the
    widest of that and the factors'.
    """
    device, own = x.device.type, x.dtype
    if not isinstance(weight, Tensor):
        own = weight.computes_in(x)
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(device)
        return dtype, dtype
    rank_dtype = own
    for factor in factors:
        if factor.dtype != rank_dtype:
            rank_dtype = torch.promote_types(rank_dtype, factor.dtype)
    return own, rank_dtype


def as_rows(x: Tensor) -> Tensor:
    """x `[..., K]` as `[T, K]`."""
    return x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


def low_rank_call(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    dropout_p: tuple[float, ...],
    seed: int | Tensor | None,
    ranks: tuple[int, ...] = (),
    scale: float = 1.0,
    magnitude: Tensor | None = None,
    strength: Strength | None = None,
    start: Start | None = None,
    two_term: bool = False,
    save_output: bool = False,
) -> Call:
    """Make the call of a low-rank method: arguments checked but for the seed, as in `Call` and
    `Options`.
    """
    lam, weight_norm, eps = strength or (None, None, 0.0)
    frozen_A, frozen_B, frozen_lam = start or (None, None, None)
    frozen_rank = 0 if frozen_A is None else frozen_A.shape[0]
    seed = seeds(name, seed, x, len(ranks)) if any(dropout_p) else None
    options = Options(name, scale, eps, ranks, dropout_p, two_term, save_output, frozen_rank, *dtypes(x, weight, A, B))
    rest = (magnitude, lam, weight_norm, frozen_A, frozen_B, frozen_lam, seed, options)
    return Call(x if x.dim() > 1 else x.unsqueeze(0), weight, bias, A, B, *rest)
