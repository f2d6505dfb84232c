"""Mixtures of experts: random ones, and what they are compared with.

    lora            ours, without experts, of the mixture's whole rank E r: what gating costs; not
                    judged by the gate
    goat-eager      the authors' loop over experts (benchmarks.goat_loop), GOAT's start folded into
                    the weight as there
    dense           every expert on every token, two einsums; dense-compile: through torch.compile

The routers are sure of themselves: a token's logits are apart, so that no rounding changes which
experts it takes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.cases import Case
from benchmarks.goat_loop import goat_loop
from delora_kernels import functional

RIVALS = ("lora", "goat-eager", "dense")
SCALE = 2.0
APART = 1.2
"""Between two logits of a token, about."""

Inputs = dict[str, Any]


def experts(case: Case, normal: Callable[..., Tensor], made: Inputs) -> Inputs:
    """Return a [E, r, K], B [E, N, r], a router [E, K], and x [T, K] such that x Gᵀ has each
    token's experts in an order.
    """
    E, r, K, N = case.E or 1, case.r, case.K, case.N
    wide, x = made["A"].dtype, made["x"]
    Q = torch.linalg.qr(normal(K, E)).Q
    order = normal(case.T, E).argsort(1).argsort(1) - (E - 1) / 2
    logits = APART * order + 0.1 * normal(case.T, E)
    wanted = logits - x.float() @ Q
    drawn = {"A": normal(E, r, K) / K**0.5, "B": normal(E, N, r) / K**0.5, "router": Q.T.contiguous()}
    made = {name: tensor.to(wide) for name, tensor in drawn.items()}
    return made | {"x": torch.addmm(x.float(), wanted, Q.T).to(x.dtype), "top_k": case.k, "scale": SCALE}


def goat(case: Case, normal: Callable[..., Tensor], made: Inputs) -> Inputs:
    """Return the same near a start that is subtracted, a scale for each expert."""
    made = experts(case, normal, made)
    E, A, B = case.E or 1, made["A"], made["B"]
    start = {"frozen_A": A + 0.1 * normal(*A.shape).to(A) / case.K**0.5, "frozen_B": B.clone()}
    scale = A.new_full((E,), SCALE)
    return made | start | {"scale": scale, "residual": scale / E}


class MixtureRivals:
    """The rivals of one mixture.

    Args:
        inputs: As benchmarks.layer.methods.inputs.
        dropout_p: The loop's own dropout; the others have none.
    """

    def __init__(self, inputs: Inputs, dropout_p: float) -> None:
        self.inputs, self.dropout_p = inputs, dropout_p
        self.weight = inputs["weight"]
        if "residual" in inputs:
            start = torch.einsum("e,enr,erk->nk", inputs["residual"], inputs["frozen_B"], inputs["frozen_A"])
            self.weight = (self.weight.float() - start.detach().float()).to(self.weight.dtype)
        A, B = inputs["A"].detach(), inputs["B"].detach()
        self.lora = {"A": A.flatten(0, 1).clone(), "B": B.transpose(0, 1).flatten(1)}

    @property
    def tensors(self) -> list[Tensor]:
        """What is held beside the inputs."""
        return [self.weight, *self.lora.values()]

    def forward(self, name: str) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
        """Compute the forward pass of a rival, and its leaves beside x."""
        x, leaves = self.inputs["x"], {each: self.inputs[each] for each in ("A", "B", "router")}
        if name == "lora":
            held = {each: tensor.requires_grad_() for each, tensor in self.lora.items()}
            return partial(functional.lora_linear, x, self.inputs["weight"], **held, scale=SCALE), held
        if name == "goat-eager":
            return self._loop, leaves
        if name == "dense-compile":
            torch._dynamo.reset()
            return torch.compile(self._dense), leaves
        return self._dense, leaves

    def _loop(self) -> Tensor:
        made = self.inputs
        A, B = list(made["A"].unbind(0)), list(made["B"].unbind(0))
        return goat_loop(made["x"], self.weight, A, B, made["router"], made["top_k"], SCALE, self.dropout_p)[0]

    def _dense(self) -> Tensor:
        x, A, B = self.inputs["x"], self.inputs["A"], self.inputs["B"]
        tokens = x.to(A.dtype)
        probabilities = linear(tokens, self.inputs["router"]).float().softmax(1)
        values, chosen = probabilities.topk(self.inputs["top_k"], dim=1)
        w = torch.zeros_like(probabilities).scatter(1, chosen, values / values.sum(1, keepdim=True))
        h = torch.einsum("tk,erk->ter", tokens, A) * (SCALE * w).unsqueeze(2).to(tokens.dtype)
        return linear(x, self.weight) + torch.einsum("ter,enr->tn", h, B).to(x.dtype)
