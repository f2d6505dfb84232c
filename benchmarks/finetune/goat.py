"""GOAT in the demo: its adapters, and the same layers as their authors run them, a loop over
experts.
"""

from typing import Any

import peft
import torch
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.finetune.config import Config, Problem
from benchmarks.goat_loop import goat_loop
from delora_kernels.integrations.peft.methods.goat import PeftGoatLinear

EXPERTS = 8
FULL_TUNING_LR = 2e-5
"""What one would fine-tune all weights with: η of the theoretical scale is this over the adapters'
learning rate.
"""


def goat_config(config: Config) -> peft.PeftConfig:
    """GOAT with `config.rank` as the rank of all experts together: 8 of them, or as many as there
    are ranks.

    With the scaling "alpha/r", alpha is twice that rank, as in the authors' scripts.

    Raises:
        Problem: the rank can't be shared out.
    """
    experts = min(EXPERTS, config.rank)
    if config.rank % experts:
        raise Problem(f"--rank {config.rank} can't be shared out among {experts} experts: give a multiple of {EXPERTS}")
    return dk.GoatConfig(
        r=config.rank // experts,
        num_experts=experts,
        top_k=min(2, experts),
        scaling=config.scaling,
        alpha=2 * config.rank,
        eta=FULL_TUNING_LR / config.lr,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


class LoopLinear(PeftGoatLinear):
    """The layer as its authors run it: the start folded into the weight, then the loop, its balance
    loss added.
    """

    def _mixed(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        A, B, options = self.goat_A[name], self.goat_B[name], self.options[name]
        scale = float(self.goat_scale[name][0])  # the same for all experts
        rows = x.flatten(0, -2)
        y, balance = goat_loop(rows, self.folded, list(A), list(B), self.goat_router[name], options.chosen, scale)
        y = y if bias is None else y + bias
        coefficient = self._losses(options.balance_coef, 0.0, options.balance, options.chosen).get("balance_coef", 0.0)
        y = _WithLoss.apply(y, balance * coefficient)
        return y.unflatten(0, x.shape[:-1])

    def fold(self, name: str) -> None:
        """Subtract the start from the weight, rounded to its dtype, as the authors' code does."""
        delta = torch.einsum(
            "e,enr,erk->nk", self.goat_scale[name], self.goat_start_B[name], self.goat_start_A[name].float()
        )
        self.folded = (self._base_weight().float() - self.options[name].residual * delta).to(self._base_weight().dtype)


class _WithLoss(torch.autograd.Function):
    """y, in whose backward pass `loss` gets the gradient 1: the authors' trainer adds the losses of
    all layers.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy.new_ones((), dtype=torch.float32)


def as_loop(model: nn.Module) -> nn.Module:
    """Make every GOAT layer of `model` run as its authors run it, in place."""
    for layer in model.modules():
        if isinstance(layer, PeftGoatLinear):
            layer.__class__ = LoopLinear
            LoopLinear.fold(layer, "default")  # type: ignore[arg-type]
    return model
