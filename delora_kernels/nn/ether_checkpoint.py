"""Checkpoints of ETHER's own training code (mwbini/ether, `ether-instruct`), read into a model of
nn.Linear layers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.nn.ether import EtherLinear, EtherPlusLinear

_NAME = "load_ether_checkpoint"
_NAMES = ("ether_R", "ether_R2", "ether_R3", "ether_R4")


def load_ether_checkpoint(model: nn.Module, state_dict: Mapping[str, Any], *, flip_side: bool = False) -> list[str]:
    """Put an EtherLinear or EtherPlusLinear in the place of every linear that the checkpoint
    adapts.

    `<layer>.ether_R` is u; with `ether_R2`, which is v, the layer is ETHER+'s; `ether_R3` and
    `ether_R4` are u and v of the output side. Every layer has blocks="official": it computes what
    their code computes, whatever it is called.

    Args:
        model: Its layers have the names of the checkpoint's; each one named there is a plain
            nn.Linear `[N, K]`.
        state_dict: The loaded file, or its entry "model"; vectors `[blocks, features / blocks]`.
        flip_side: Layers with one reflected side have it on the output (their option of this name).

    Returns:
        The names of the layers.

    Raises:
        ValueError, TypeError: a layer is not there, is no plain linear, does not fit, or is of a
            kind that has no module here (fused query-key-value layers, OFT); the text names it. The
            model is then as it was.

    Source: mwbini/ether at ddc1038, `ether-instruct/lit_gpt/ether.py`.
    """
    tensors = state_dict.get("model", state_dict)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, _, name = key.rpartition(".")
        if name.startswith("ether_"):
            layers.setdefault(layer, {})[name] = value
    if not layers:
        expected = "a checkpoint with keys like layer.ether_R"
        raise checks.fail(ValueError, _NAME, "state_dict", expected, f"{len(tensors)} others", "pass the loaded file")
    made = {layer: _module(model, layer, vectors, flip_side) for layer, vectors in layers.items()}
    for layer, module in made.items():
        parent, _, name = layer.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
    return list(made)


def _module(model: nn.Module, layer: str, vectors: dict[str, Tensor], flip_side: bool) -> nn.Module:
    """Return the module of one layer, its vectors loaded."""
    given = set(vectors)
    if given not in ({"ether_R"}, set(_NAMES[:2]), set(_NAMES)) or vectors["ether_R"].dim() != 2:
        expected = f"{', '.join(_NAMES)}: the first, two, or all, 2-D"
        found = ", ".join(f"{name} {list(value.shape)}" for name, value in vectors.items())
        remedy = "fused query-key-value layers (see reference.ether_qkv_linear) and OFT have no module here"
        raise checks.fail(ValueError, _NAME, f"{layer}'s vectors", expected, found, remedy)
    try:
        linear: Any = model.get_submodule(layer)
    except AttributeError:
        remedy = "rename the checkpoint's keys, or the layers"
        raise checks.fail(ValueError, _NAME, "model", f"one with a layer {layer}", "none", remedy) from None
    both, plus = "ether_R3" in given, "ether_R2" in given
    side = "both" if both else "output" if flip_side else "input"
    names = ("u", "v", "u_out", "v_out") if side != "output" else ("u_out", "v_out")
    cls = EtherPlusLinear if plus else EtherLinear
    module: Any = cls.from_linear(linear, len(vectors["ether_R"]), side=side, blocks="official")
    with torch.no_grad():
        for name, source in zip(names, sorted(given), strict=False):
            own, value = getattr(module, name), vectors[source]
            remedy = "flip_side says on which side a single reflection is"
            checks.shape(_NAME, f"{layer}.{source}", value, tuple(own.shape), "[blocks, features / blocks]", remedy)
            own.copy_(value)
    return module
