"""Which backend a call takes, in which dtypes, and why the other backends do not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from delora_kernels import backends, dispatch
from delora_kernels.call import AnyCall
from delora_kernels.functional import CALLS, call_of


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` of it is the text for people.

    Args:
        function: Name of the public function.
        backend: Name of the backend that takes the call.
        reasons: Every other backend → why it does not take the call.
        compute_dtype: Dtype of x, weight and y inside the call.
        rank_dtype: Dtype of the low-rank branch, or of the reflections' vectors.
    """

    function: str
    backend: str
    reasons: dict[str, str]
    compute_dtype: torch.dtype
    rank_dtype: torch.dtype

    def __str__(self) -> str:
        small = "reflections" if self.function.startswith("ether") else "low-rank branch"
        dtypes = f"GEMMs in {_short(self.compute_dtype)}, {small} in {_short(self.rank_dtype)}"
        lines = [f"{self.function} runs on the {self.backend} backend ({dtypes})"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.reasons.items()])


def explain(function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend a call takes, and why, without running it: on a GPU kernels prove
    themselves first, as ever.

    Args:
        function: A function of delora_kernels.functional, or its name.
        *args, **kwargs: What the function would be called with; checked as the function checks
            them.

    Raises:
        ValueError: `function` is not a function of delora_kernels.functional.
        RuntimeError: a backend was requested that can't take the call.
    """
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    if name not in CALLS:
        got = repr(name) if name else f"a {type(function).__name__}"
        remedy = "pass one or its name"
        if isinstance(function, torch.nn.Module):
            remedy += "; print the report of accelerate(model) for what each layer of a model runs"
        raise ValueError(f"explain: function must be one of {', '.join(CALLS)}, got {got}; {remedy}")
    if kwargs.get("dropout_p") and kwargs.get("seed") is None:
        kwargs = kwargs | {"seed": 0}  # or the call would draw one from torch's generator
    call = call_of(name, *args, **kwargs)
    chosen = dispatch.choose(call)
    reasons = {other: _why_not(other, chosen, call) for other in backends.NAMES if other != chosen}
    return Explanation(name, chosen, reasons, call.options.compute_dtype, call.options.rank_dtype)


def _why_not(name: str, chosen: str, call: AnyCall) -> str:
    if dispatch.requested():
        return f"{chosen} was requested"
    reason = dispatch.reason_against(name, call)
    if reason is None and backends.NAMES.index(name) < backends.NAMES.index(chosen):
        reason = dispatch.reason_unasked(name, call)
    return reason or f"{chosen} comes first"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
