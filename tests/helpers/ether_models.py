"""Small PEFT models with ETHER and ETHER+ adapters, and what the reference makes of one of their
layers.
"""

import copy
from typing import Any

import peft
from goat_models import TARGETS, move, small
from torch import Tensor, nn

from delora_kernels import reference
from delora_kernels.integrations.peft.methods.ether import (
    EtherConfig,
    EtherPlusConfig,
    PeftEtherLinear,
    PeftEtherPlusLinear,
)

KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "ether": (False, {}),
    "ether out": (False, {"side": "output"}),
    "ether both": (False, {"side": "both", "n_blocks": 1}),
    "ether official": (False, {"side": "both", "blocks": "official"}),
    "ether+": (True, {}),
    "ether+ in": (True, {"side": "input", "n_blocks": 1}),
    "ether+ official": (True, {"blocks": "official"}),
}
"""Whether it is ETHER+, and the options."""


def config(kind: str, **options: Any) -> Any:
    """A config of two blocks on the first two layers of `Small`; `third`'s 9 outputs can't be
    halved.
    """
    plus, of_kind = KINDS[kind]
    options = {"n_blocks": 2, "target_modules": TARGETS[:2]} | of_kind | options
    return EtherPlusConfig(**options) if plus else EtherConfig(**options)


def model(base: nn.Module, kind: str, moved: bool = True, **options: Any) -> Any:
    """A PeftModel on a copy of `base`, its vectors away from their start if `moved`."""
    made = peft.get_peft_model(copy.deepcopy(base), config(kind, **options))
    if moved:
        move(made)
    return made


def layers(made: nn.Module) -> dict[str, Any]:
    """The layers of reflections by name."""
    kinds = (PeftEtherLinear, PeftEtherPlusLinear)
    return {name: layer for name, layer in made.named_modules() if isinstance(layer, kinds)}


def weight_of(base: Any) -> Tensor:
    """W [N, K] of an nn.Linear or a Conv1D."""
    weight: Tensor = base.weight.detach()
    return weight.t() if type(base).__name__ == "Conv1D" else weight


def arguments(layer: Any, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of an adapter's vectors, by the functions' argument names, which want gradients."""
    found = {}
    for name, parameter in layer.named_parameters():
        if name.startswith("ether") and name.endswith(f".{adapter}"):
            found[name.split(".")[0].split("_", 1)[1]] = parameter.detach().clone().requires_grad_()
    return found


def expected_weight(kind: str, weight: Tensor, vectors: dict[str, Tensor], blocks: str) -> Tensor:
    """W' of the reference."""
    function = reference.ether_plus_weight if KINDS[kind][0] else reference.ether_weight
    return function(weight, **vectors, blocks=blocks)


__all__ = ["KINDS", "TARGETS", "arguments", "config", "expected_weight", "layers", "model", "move", "small"]
