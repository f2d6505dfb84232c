"""Adapter layers that their parents compute past the layers' own forward: nn.MultiheadAttention
reads the weights of its projections, and Unsloth and axolotl give an attention or MLP module a
function that reads W, A and B of its linears itself.

Those functions are named apply_lora_*; what they put in their place where nothing is to be fused
(original_apply_*) calls the layers.
"""

from typing import Any

from torch import nn

_CALLS: dict[str, tuple[str, ...]] = {
    "forward": (),
    "apply_qkv": ("q_proj", "k_proj", "v_proj"),
    "apply_o": ("o_proj",),
    "apply_in_proj_fused": (),
}
"""What a module may have been given → the linears that it computes; (): all."""


MULTIHEAD_ATTENTION = (
    "nn.MultiheadAttention reads the weights of its projections and calls none of them: PEFT puts adapters of the "
    "whole module into them for each call"
)
"""Why adapters on it run PEFT's own forward, all of them."""


def why_bypassed(parent: nn.Module | None, name: str) -> str | None:
    """Say why the forward of the layer `name` is never called by its parent, or None."""
    if isinstance(parent, nn.MultiheadAttention):
        return MULTIHEAD_ATTENTION
    for attribute, linears in _CALLS.items() if parent is not None else ():
        given: Any = vars(parent).get(attribute)
        function = getattr(given, "__func__", given)
        if linears and name not in linears:
            continue
        if str(getattr(function, "__name__", "")).lstrip("_").startswith("apply_lora_"):
            by = f"{function.__module__.partition('.')[0]}'s {function.__name__}"
            return f"its parent's {attribute} is {by}, which computes it past its own forward"
    return None
