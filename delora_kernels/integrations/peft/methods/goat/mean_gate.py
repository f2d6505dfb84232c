"""merge_mean_gate: a mixture merged as if every token gave every expert the gate 1/E, and how far
off that is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.integrations.peft.methods.goat.layer import PeftGoatLinear


@dataclass(frozen=True)
class MeanGateReport:
    """What merging the mean gate changed, on the inputs it was given; y are the model's outputs in
    evaluation mode.

    Args:
        difference: ‖y_merged − y‖ / ‖y‖.
        of_effect: ‖y_merged − y‖ / ‖y − y_base‖, y_base without adapters: at 1 the merged model is
            as far from the adapted one as the base model is.
        layers: For each layer, ‖ΔW̄ x − Δy‖ / ‖Δy‖ on its own inputs, Δy what the mixture adds
            there.
    """

    difference: float
    of_effect: float
    layers: Mapping[str, float]

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda name: self.layers[name])
        return (
            f"merged the mean gate of {len(self.layers)} layers, an approximation: outputs differ by "
            f"{self.difference:.2g} of their size, {self.of_effect:.2g} of what the adapter does; "
            f"worst layer {worst}: {self.layers[worst]:.2g}"
        )


@torch.no_grad()
def merge_mean_gate(model: nn.Module, inputs: Any) -> MeanGateReport:
    """Merge the active GOAT adapters approximately, in place, and measure the approximation.

        W̄ = W + Σ_e s_e B_e A_e / E − γ Σ_e s_e B⁰_e A⁰_e,  with `use_dora` m ⊙ W̄ / ‖W̄‖ by rows

    A mixture has no single weight; this one is right where the router is undecided, and W itself at
    GOAT's start. `unmerge_adapter()` gives the weights back bit for bit, `merge_and_unload()`
    afterwards returns the plain model.

    Args:
        model: A PeftModel, or any module with GOAT layers.
        inputs: What the model is called with to measure: a dictionary of keyword arguments, a
            tuple, or one tensor.

    Returns:
        The measured difference.

    Raises:
        ValueError: `model` has no unmerged GOAT layer with an active adapter, or the merged weight
            is not finite.
    """
    layers = {name: _active(layer) for name, layer in model.named_modules() if isinstance(layer, PeftGoatLinear)}
    modules = {name: model.get_submodule(name) for name, adapters in layers.items() if adapters}
    if not modules:
        got = f"a {type(model).__name__} without any"
        remedy = "adapt it with GoatConfig, unmerge it or enable its adapters"
        raise checks.fail(ValueError, "merge_mean_gate", "model", "one with active GOAT layers", got, remedy)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    errors: dict[str, float] = {}

    def measure(name: str) -> Any:
        def hook(layer: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
            exact, mean = _changes(layer, args[0], layers[name])
            errors[name] = _relative(mean - exact, exact)

        return hook

    hooks = [module.register_forward_hook(measure(name)) for name, module in modules.items()]
    try:
        exact = _output(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for module in modules.values():
        module._disable_adapters = True  # type: ignore[assignment]  # PEFT's own switch would touch requires_grad
    base = _output(model, inputs)
    for module in modules.values():
        module._disable_adapters = False  # type: ignore[assignment]
    for name, module in modules.items():
        module.merge_mean_gate(layers[name], safe_merge=True)  # type: ignore[operator]
    merged = _output(model, inputs)
    for module in was_training:
        module.training = True
    return MeanGateReport(_relative(merged - exact, exact), _relative(merged - exact, exact - base), errors)


def _active(layer: PeftGoatLinear) -> list[str]:
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.goat_A]


def _changes(layer: Any, x: Tensor, adapters: list[str]) -> tuple[Tensor, Tensor]:
    """Return what the adapters of a layer add to W x, and what their mean gates do."""
    linear = nn.functional.linear
    if layer.additive:
        exact = sum(layer._mixed(adapter, x, None, None) for adapter in adapters)
        mean = sum(layer.mean_update(adapter) for adapter in adapters)
        return exact, linear(x.to(mean.dtype), mean)
    weight = layer._base_weight()
    merged = layer._merged(weight, adapters)
    before = y = linear(x.to(merged.dtype), weight.to(merged.dtype))
    for adapter in adapters:
        y = layer.beside(adapter, x, y, None)
    return y - before, linear(x.to(merged.dtype), merged) - before


def _relative(difference: Tensor, size: Tensor) -> float:
    return float(difference.double().norm() / size.double().norm().clamp(min=torch.finfo(torch.float64).tiny))


def _output(model: nn.Module, inputs: Any) -> Tensor:
    """Return the model's output, or of a structure of them its logits or first."""
    if isinstance(inputs, Mapping):
        found = model(**inputs)
    else:
        found = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    if isinstance(found, Tensor):
        return found
    first: Tensor = found.logits if hasattr(found, "logits") else found[0]
    return first
