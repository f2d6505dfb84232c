"""Several adapted linears of one x, run as one call where nothing is in the way."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.bases.plain import any_module_has_hooks, why_not_plain
from delora_kernels.functional import CALLS
from delora_kernels.functional.common import run_linears
from delora_kernels.nn.base import AdapterLinear, MergeableLinear


def adapted_linears(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Apply several modules to one x, such as the query, key and value projections.

        y_i = module_i(x)

    to rounding; but x is read once for all A of LoRALinear, DoRALinear and DeLoRALinear, and its
    gradient is one buffer. An output without a gradient costs nothing in backward, and leaves the
    gradients of its own factors None. Any other module, one that is merged and one that has hooks
    runs alone, as `module(x)`.

    Args:
        x: Input, `[..., K]`.
        modules: Modules of x.

    Returns:
        y_i, `[..., N_i]` each, as the modules return them.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
    """
    name = "adapted_linears"
    if not isinstance(modules, Sequence | nn.ModuleList) or not all([isinstance(m, nn.Module) for m in modules]):  # noqa: C419
        raise checks.fail(TypeError, name, "modules", "a list of modules", type(modules).__name__, "pass [q, k, v]")
    if not len(modules):
        raise checks.fail(ValueError, name, "modules", "one module or more", "none", "pass [q, k, v]")
    calls = {i: _call(module, x) for i, module in enumerate(modules) if _shares(module)}
    shared = dict(zip(calls, run_linears(list(calls.values()), x.shape), strict=True)) if calls else {}
    return tuple([shared[i] if i in shared else module(x) for i, module in enumerate(modules)])


def _shares(module: Any) -> bool:
    """Whether calling `module` is one call of its method's function."""
    if not isinstance(module, AdapterLinear) or module.merged or any_module_has_hooks():
        return False
    kind = type(module)
    own = kind.forward is MergeableLinear.forward and kind._adapted is AdapterLinear._adapted
    return own and why_not_plain(module, kind.__name__) is None


def _call(module: Any, x: Tensor) -> Any:
    make = CALLS[type(module)._function.__name__]
    tensors, dropout_p = (x, module._call_weight(), module.A, module.B), module.dropout_p if module.training else 0.0
    return make(*tensors, bias=module.bias, dropout_p=dropout_p, **module._arguments())
