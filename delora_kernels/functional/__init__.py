"""The public functions: check the arguments, choose dtypes, seed and backend, run the
family's autograd Function.

Every `_linear` takes x `[..., K]`, a frozen weight `[N, K]` in nn.Linear's layout (grouped ones x
`[T, K]` and a weight for each expert) and small factors in any float dtype. Each gradient has the
dtype of its tensor. Without autocast x and weight share one dtype; factors may be wider (PEFT's
float32 adapters on a bf16 base), the low-rank branch then runs in the wider dtype. Under
torch.autocast x and weight are cast as nn.Linear casts them and the branch runs in autocast's
dtype. Outputs are deterministic; second derivatives and torch.func transforms are refused:
`delora_kernels.reference` has the linear functions in plain torch for those.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from delora_kernels.call import AnyCall
from delora_kernels.functional.delora import delora_call, delora_factors, delora_linear
from delora_kernels.functional.dora import dora_call, dora_linear
from delora_kernels.functional.ether import ether_call, ether_linear, ether_plus_linear
from delora_kernels.functional.grouped import grouped_lora_call, grouped_lora_linear
from delora_kernels.functional.grouped_delora import grouped_delora_call, grouped_delora_linear
from delora_kernels.functional.grouped_dora import grouped_dora_call, grouped_dora_linear
from delora_kernels.functional.lora import lora_call, lora_linear, lora_linears
from delora_kernels.functional.lora_by_sample import lora_linear_by_sample
from delora_kernels.functional.moe import moe_lora_linear
from delora_kernels.functional.moe_arguments import moe_lora_call
from delora_kernels.functional.router_stats import RouterStats

__all__ = [
    "RouterStats",
    "delora_factors",
    "delora_linear",
    "dora_linear",
    "ether_linear",
    "ether_plus_linear",
    "grouped_delora_linear",
    "grouped_dora_linear",
    "grouped_lora_linear",
    "lora_linear",
    "lora_linear_by_sample",
    "lora_linears",
    "moe_lora_linear",
]

CALLS: dict[str, Callable[..., AnyCall]] = {
    "lora_linear": lora_call,
    "dora_linear": dora_call,
    "delora_linear": delora_call,
    "moe_lora_linear": moe_lora_call,
    "ether_linear": partial(ether_call, "ether_linear"),
    "ether_plus_linear": partial(ether_call, "ether_plus_linear"),
    "grouped_lora_linear": grouped_lora_call,
    "grouped_dora_linear": grouped_dora_call,
    "grouped_delora_linear": grouped_delora_call,
}
"""Public function name → what checks its arguments, by name, and makes its call: see `call_of`."""


def call_of(function: str, *args: Any, **kwargs: Any) -> AnyCall:
    """Make the call of a public function without running it.

    Args:
        function: Its name, one of `CALLS`.
        *args, **kwargs: As the function takes them; what is left out has the function's default.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
    """
    given = inspect.signature(globals()[function]).bind(*args, **kwargs)
    given.apply_defaults()
    return CALLS[function](**given.arguments)
