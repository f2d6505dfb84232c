"""The base inside any module: a plain one, or that of a registered form."""

from torch import nn

from delora_kernels.bases.numeric_check import why_not_linear
from delora_kernels.bases.plain import PlainBase, parameter, why_not_any_module, why_not_plain
from delora_kernels.bases.stored import StoredBase, dotted_name, form_of
from delora_kernels.checks import PLAIN


def base_in(module: nn.Module) -> PlainBase | StoredBase | str:
    """Read the base inside `module`, or say why it can't be read."""
    form = stored_form(module)
    if form is None:
        reason = PlainBase.why_not(module)
        if reason is None:
            return PlainBase.of(module)
        if dotted_name(type(getattr(module, "weight", None))).startswith("torchao."):
            return str(reason)  # not that of a shard, which later may be whole
        return reason
    reason = why_not_plain(module, "base layer") or why_not_any_module() or form.why_not(module)
    if reason is not None:
        return reason
    base = form.of(module)
    return why_not_linear(module, base) or base


def stored_form(module: nn.Module) -> type[StoredBase] | None:
    """Return the form in which `module` stores its weight, or None: a dense tensor, or an unknown
    one.
    """
    kind = type(module)
    if kind is nn.Linear:
        kind = type(parameter(module, "weight"))
        if kind in PLAIN:
            return None
    return form_of(kind)
