"""Adapters of other libraries in a model, found by their parts: kohya-ss's and LyCORIS's, which put
a forward of theirs over a layer's; modules that hold a pair of low-rank factors, such as diffusers'
former attention processors, torchtune's, loralib's and parametrizations.

Nothing of them is fused; the report names them, so that a model is not called without adapters.
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from delora_kernels.integrations.peft.fused.plan import class_name
from delora_kernels.nn import AdapterLinear

_PAIRS = (
    ("lora_A", "lora_B"),
    ("lora_a", "lora_b"),
    ("lora_down", "lora_up"),
    ("lora_mid", "lora_up"),
    ("hada_w1_a", "hada_w1_b"),
    ("lokr_w1", "lokr_w2"),
    ("lokr_w1", "lokr_w2_a"),
    ("lokr_w1_a", "lokr_w2_a"),
)
"""Names of two factors, parameters or modules."""


def other_adapters(model: nn.Module) -> list[tuple[str, str]]:
    """Return (name, class of the adapter) of each layer that another library's adapter computes; of
    an adapter that is none of the model's layers' its own name.
    """
    found: dict[int, tuple[str, str]] = {}
    skipped: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in skipped:
            continue
        if isinstance(module, BaseTunerLayer | AdapterLinear):
            skipped |= _inside(module)
            continue
        owner = _owner_of_forward(module)
        if owner is not None:
            found.pop(id(owner), None)  # known by the layer that it computes
            skipped |= _inside(owner)
            found[id(module)] = name, class_name(type(owner))
        elif _holds_factors(module):
            skipped |= _inside(module)
            found[id(module)] = name, class_name(type(module))
    return list(found.values())


def _inside(module: Any) -> set[int]:
    return {id(inner) for inner in module.modules()}


def _owner_of_forward(module: nn.Module) -> nn.Module | None:
    """Return the other module whose method stands in the place of this one's forward, if that has
    parameters of its own and holds factors or is of a class of its own: not torch's, nor this one's
    (layers may share a forward).
    """
    owner: Any = getattr(vars(module).get("forward"), "__self__", None)
    if not isinstance(owner, nn.Module) or owner is module:
        return None
    ordinary = type(owner) is type(module) or type(owner).__module__.partition(".")[0] == "torch"
    if ordinary and not _holds_factors(owner):
        return None
    own = {id(parameter) for parameter in module.parameters()}
    return owner if any(id(parameter) not in own for parameter in owner.parameters()) else None


def _holds_factors(module: nn.Module) -> bool:
    held = {name for name, part in (*module._parameters.items(), *module._modules.items()) if part is not None}
    if any(held.issuperset(pair) for pair in _PAIRS):
        return True
    return held.issuperset(("down", "up")) and "lora" in type(module).__name__.lower()
