"""Whether a model computes with the factors of its experts as PEFT packs them: one token of each
expert, by the model and by the formula.

    W'_e = W_e + s · B_e A_e,    A_e = lora_A[e r : (e + 1) r],    B_e = lora_B[:, e :: E]

The factors that it computes with are drawn for the purpose, so that this shows before the first
step too, when B is 0; the model's own are not written to.
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from delora_kernels.bases.plain import why_not_local
from delora_kernels.bases.stored_experts import StoredExperts, is_stored, why_not_stored
from delora_kernels.integrations.peft.fused.experts import wrappers_of
from delora_kernels.integrations.peft.fused.experts_known import why_not_known

WRONG = 0.1
"""Part of the update's effect by which a model may differ from the formula: rounding in half
precision is far below, and another packing far above.
"""


@torch.no_grad()
def why_wrongly_packed(outer: Any) -> str | None:
    """Say by how much the experts under their outermost wrapper are off the formula, or None: they
    are not, or are none whose formula is known.
    """
    wrappers, experts = wrappers_of(outer)
    if why_not_known(experts) is not None or "parametrizations" in experts._modules:
        return None
    names = _projections(experts)
    weights = [getattr(experts, name) for name in names]
    if any(weight.dim() != 3 or _why_not_read(weight) for weight in weights):
        return None
    if any(wrapper.parameter_name not in names for wrapper in wrappers):
        return None
    E, generator = experts.num_experts, torch.Generator().manual_seed(0)
    weight, K = weights[0], weights[0].shape[1 if experts.is_transposed else 2]
    drawn: dict[str, Tensor] = {}
    for name, parameter in outer.named_parameters():
        if ".lora_" in f".{name}":
            random = torch.randn(parameter.shape, generator=generator) * K**-0.5
            drawn[name] = random.to(parameter.device, parameter.dtype)
    x = torch.randn(E, K, generator=generator).to(weight.device, weight.dtype)
    arguments = x, torch.arange(E, device=x.device)[:, None], torch.ones_like(x[:, :1])
    with torch.autocast(x.device.type, enabled=False):
        computed = functional_call(outer, drawn, arguments).float()
        with_factors = _by_formula(experts, wrappers, drawn, x, E)
        without = _by_formula(experts, [], {}, x, E)
    effect = float((with_factors - without).norm())
    off = float((computed - with_factors).norm())
    if off <= WRONG * effect:
        return None
    return f"its experts are off PEFT's packing by {off / effect:.0%} of the adapters' effect, on one token each"


def _by_formula(experts: Any, wrappers: list[Any], drawn: dict[str, Tensor], x: Tensor, E: int) -> Tensor:
    """Each expert's output on its token, from matrices made one at a time, in float32."""
    names = _projections(experts)
    outputs = []
    for e in range(E):
        value = x[e].float()
        for place, name in enumerate(names):
            W = getattr(experts, name)
            W = StoredExperts(W, False).dense(e, e + 1, torch.float32)[0] if is_stored(W) else W[e].float()
            W = W.T if experts.is_transposed else W
            for depth, wrapper in enumerate(wrappers):
                if wrapper.parameter_name == name and not (wrapper.disable_adapters or wrapper.merged):
                    W = W + _update(wrapper, "base_layer." * depth, drawn, e, E)
            value = W @ value
            if experts.has_bias:
                value = value + getattr(experts, f"{name}_bias")[e].float()
            if place == 0:
                value = experts._apply_gate(value[None])[0] if experts.has_gate else experts.act_fn(value)
        outputs.append(value)
    y = torch.stack(outputs)
    return experts.post_expert_norm(y).float() if experts.has_post_expert_norm else y


def _why_not_read(weight: Tensor) -> str | None:
    """Say why one expert's weight can't be read, or None."""
    return why_not_stored(weight, "weight") if is_stored(weight) else why_not_local(weight, "weight")


def _projections(experts: Any) -> tuple[str, str]:
    """Return the names of the two weights."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def _update(wrapper: Any, prefix: str, drawn: dict[str, Tensor], e: int, E: int) -> Tensor:
    """Σ s B_e A_e of a wrapper's active adapters, element by element of PEFT's packing."""
    update: Any = 0
    for name in wrapper.active_adapters:
        if name in wrapper.lora_A:
            A, B = (drawn[f"{prefix}lora_{role}.{name}.weight"].float() for role in "AB")
            r = A.shape[0] // E
            update = update + wrapper.scaling[name] * B[:, e::E] @ A[e * r : (e + 1) * r]
    return update
