"""The mixtures as modules, made and trained at random, and what the reference says they compute."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from delora_kernels import reference
from delora_kernels.nn import DeLoRAMoELinear, GoatLinear, MoELoRALinear

KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "moe": (MoELoRALinear, {}),
    "dense": (MoELoRALinear, {"top_k": None, "alpha": 3.0}),
    "goat": (GoatLinear, {}),
    "goat-folded": (GoatLinear, {"residual": "folded", "scaling": "goat-s", "init_cof": 0.3}),
    "delora": (DeLoRAMoELinear, {"lam": 2.0}),
    "goat-dora": (GoatLinear, {"dora": True}),
}


def make(kind: str, dtype: torch.dtype = torch.float64, trained: bool = True, **options: Any) -> tuple[Any, nn.Linear]:
    """A module of a kind, moved away from its start if `trained`, and the linear it was made
    from.
    """
    cls, own = KINDS[kind]
    linear = nn.Linear(16, 12, dtype=dtype)
    module = cls.from_linear(linear, **{"r": 2, "experts": 4} | own | options)
    if trained:
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return module, linear


def leaves_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained parameters that require grad."""
    named = module.named_parameters()
    return {name: each.detach().clone().requires_grad_() for name, each in named if each.requires_grad}


def expected(module: Any, leaves: dict[str, Tensor], x: Tensor) -> Any:
    """What the reference makes of the module's tensors."""
    state = {name: value.detach() for name, value in module.state_dict().items()} | leaves
    arguments: dict[str, Any] = {name: state[name] for name in ("A", "B", "router", "weight", "bias")}
    if isinstance(module, GoatLinear):
        arguments["scale"] = state["expert_scale"]
        if module.residual == "stacked":
            residual = module.init_cof * state["expert_scale"]
            arguments |= {"frozen_A": state["frozen_A"], "frozen_B": state["frozen_B"], "residual": residual}
        else:
            arguments["weight"] = state["residual_weight"]
    elif isinstance(module, DeLoRAMoELinear):
        A, B = arguments["A"], arguments["B"]
        arguments["A"] = A / A.norm(dim=2, keepdim=True).clamp(min=1e-4) * state["weight"].norm(dim=0)
        arguments["B"] = B / B.norm(dim=1, keepdim=True).clamp(min=1e-4)
        arguments["scale"] = state["lam"] / 2
    else:
        arguments["scale"] = module.alpha / 2
    return reference.moe_lora_linear(x, top_k=module.top_k, magnitude=state.get("magnitude"), **arguments)


COEF = 0.7


class Stack(nn.Module):
    """A mixture of each kind, and two whose routers do not run or hardly, [..., 16] → [..., 16],
    normalised in between.

    Args:
        reentrant: The kind of checkpointing that every layer is under; None: none.
    """

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        kinds: list[tuple[str, dict[str, Any]]] = [(kind, {}) for kind in KINDS]
        kinds += [("moe", {"experts": 1, "top_k": 1}), ("moe", {"top_k": 1})]
        self.layers = nn.ModuleList(make(kind, balance_coef=COEF, **options)[0] for kind, options in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            checkpointed = None if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
            x = _joined(x, layer(x) if checkpointed is None else checkpointed)
        return x


def _joined(x: Tensor, y: Tensor) -> Tensor:
    """The next layer's input, about 1: the balance losses weigh as much as the loss does."""
    return nn.functional.layer_norm(x + nn.functional.pad(y, (0, 4)), (16,))


def loss_of(y: Tensor) -> Tensor:
    """What is trained on beside the balance losses."""
    return y.pow(3).mean()


def expected_loss(stack: Stack, leaves: dict[str, Tensor], x: Tensor, coef: float = COEF) -> Tensor:
    """The loss of a Stack by the reference, with every layer's balance loss added."""
    balance = x.new_zeros(())
    for number, layer in enumerate(stack.layers):
        start = f"layers.{number}."
        own = {name.removeprefix(start): leaf for name, leaf in leaves.items() if name.startswith(start)}
        y, stats = expected(layer, own, x)
        balance = balance + coef * stats.balance_loss()
        x = _joined(x, y)
    return loss_of(x) + balance
