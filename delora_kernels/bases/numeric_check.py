"""Whether a module's own forward is x Wᵀ + bias of the W that its form reads, found out once.

The module multiplies unit-normal tokens one column of which is large: whoever quantises activations
rounds the other columns away. Of others it is as large as LLM.int8() takes a column along and does
not leave it out as an outlier. Of both kinds its error against float64 may be twice that of torch's
linear with dense(W) in the same dtype.
"""

import copy
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from delora_kernels.bases.stored import StoredBase

TOKENS, ROWS, LARGE = 8, 256, (5.0, 50.0)
"""Tokens of a kind, rows of W whose products are compared, and what stands in the large column of a
kind.
"""

_found: dict[tuple[Any, ...], str | None] = {}
"""Key of a base → why it is not taken, or None."""


def why_not_linear(module: nn.Module, base: StoredBase) -> str | None:
    """Say why `module`'s forward is not that of its `base`, or None; the first base of its key is
    compared, never while a program is traced or captured.
    """
    key = (type(module), type(base), base.key, base.compute_dtype, base.device)
    if key not in _found:
        if _is_traced():
            return "it was not compared with its dense form before it was traced: call accelerate(model) before"
        _found[key] = _difference(module, base)
    return _found[key]


def _is_traced() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _difference(module: nn.Module, base: StoredBase) -> str | None:
    try:
        theirs, ours = errors(module, base)
    except Exception as error:
        return f"comparing its forward with its dense form raised {type(error).__name__}: {error}"
    if theirs <= 2 * ours:
        return None
    return (
        f"its forward is not x Wᵀ + bias of its dense form: it is off by {theirs:.0e} where torch's linear is off "
        f"by {ours:.0e} (it may quantise its input)"
    )


def errors(module: nn.Module, base: StoredBase) -> tuple[float, float]:
    """Return how far the module's own output and torch's linear are off the float64 product,
    relative to its norm: of the kind of tokens where they differ most.
    """
    with ExitStack() as stack:
        for context in (
            torch.inference_mode(False),
            torch.enable_grad(),  # without, a forward may pack its weight for inference
            torch.autocast(base.device.type, enabled=False),
        ):
            stack.enter_context(context)
        x = _tokens(base)
        y = _apart(module)(x).detach()
        x = x.detach()
        if y.shape != (2 * TOKENS, base.shape[0]):
            raise ValueError(f"its output is {list(y.shape)}")
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = slice(0, ROWS)
        bias = None if base.bias is None else base.bias.detach()[rows]
        exact = linear(x.double(), base.dense(wide)[rows].double(), None if bias is None else bias.double())
        own = linear(x, base.dense(x.dtype)[rows], None if bias is None else bias.to(x.dtype))
        kinds = [
            [float((each.double() - exact)[kind].norm() / exact[kind].norm()) for each in (y[:, rows], own)]
            for kind in (slice(0, TOKENS), slice(TOKENS, None))
        ]
        theirs, ours = max(kinds, key=lambda pair: pair[0] / max(pair[1], 1e-30))
        return theirs, ours


def _tokens(base: StoredBase) -> Tensor:
    """Draw the tokens, in the dtype in which the module multiplies."""
    generator = torch.Generator(base.device).manual_seed(0)
    x = torch.randn(2 * TOKENS, base.shape[1], generator=generator, device=base.device)
    column = torch.tensor(LARGE, device=base.device).repeat_interleave(TOKENS)
    x[:, base.shape[1] // 2] = column.copysign(x[:, 0])
    return x.to(base.dtype).requires_grad_()


def _apart(module: nn.Module) -> nn.Module:
    """Copy `module`, in training and with the same weight: what its forward settles there does not
    reach the module.
    """
    apart = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        apart.__dict__[name] = dict(module.__dict__[name])
    apart.__dict__.pop("forward", None)  # a device hook's, bound to the module
    bias = getattr(module, "bias", None)
    if bias is not None:
        apart.bias = type(bias)(bias.detach().clone()) if isinstance(bias, nn.Parameter) else bias.detach().clone()
    apart.__dict__["training"] = True
    return apart
