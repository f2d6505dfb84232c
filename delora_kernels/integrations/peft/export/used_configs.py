"""The configs of the PEFT adapters that are exported, checked for what no layer shows."""

from collections.abc import Mapping
from typing import Any

from delora_kernels import checks
from delora_kernels.integrations.peft.export.low_rank_terms import Survey, adapters_of
from delora_kernels.integrations.peft.export.refusal import FUNCTION, MERGE
from delora_kernels.nn import AdapterLinear

_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""PEFT's LoRA starts that leave the base weight as it is."""


def check_adapter(models: Mapping[str, Survey], adapter: str | None) -> None:
    """Raise unless one of the models has an adapter of this name; "" is the name of one alone."""
    if adapter is None or any(adapter in _used(found, adapter) for found in models.values()):
        return
    names = {model: sorted({name for name, _ in found.configs}) for model, found in models.items()}
    expected = ", ".join(f"{listed} of {model}" if model else str(listed) for model, listed in names.items())
    remedy = "pass the name of an adapter of the PEFT model"
    raise checks.fail(ValueError, FUNCTION, "adapter", f"None or one of {expected}", repr(adapter), remedy)


def used_configs(found: Survey, adapter: str | None) -> list[Any]:
    """Return the configs of the adapters that are exported, checked for what no layer shows."""
    used = _used(found, adapter)
    configs = [(name, config) for name, config in found.configs if name in used or not found.layers]
    for name, config in configs:
        reason = _why_not_config(config)
        if reason is not None:
            raise checks.fail(ValueError, FUNCTION, f"adapter {name!r}", "a low-rank term", reason, MERGE)
    return [config for _, config in configs]


def _used(found: Survey, adapter: str | None) -> set[str]:
    """Return the names of PEFT's adapters that are exported."""
    layers = [(name, layer) for name, layers in found.layers.items() for layer in layers]
    holders = [(name, layer) for name, layer in layers if not isinstance(layer, AdapterLinear)]
    holders += list(found.savers.items())
    return {one for name, layer in holders for one in adapters_of(name, layer, adapter)}


def _why_not_config(config: Any) -> str | None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in ("LORA", "DELORA"):
        return f"one of method {kind}"
    init = getattr(config, "init_lora_weights", True)
    if init not in _INITS:
        return f"one whose start changed the base weight (init_lora_weights={init!r})"
    if getattr(config, "layer_replication", None):
        return "one that replicates layers of its base (layer_replication)"
    return None
