"""What a mixture's router did to a batch, and the losses that are made of it."""

from typing import NamedTuple

from torch import Tensor

from delora_kernels import checks

CONVENTIONS = ("code", "paper")


class RouterStats(NamedTuple):
    """What `functional.moe_lora_linear` returns beside y; sums over the tokens that count.

    Args:
        fraction: f `[E]`, the share of tokens that chose expert e (given gates: whose gate is not
            0); a constant.
        probability: P `[E]`, the mean of the softmax over all experts (given gates: of the gates);
            differentiable.
        z: The mean of logsumexp(logits)², 0-d, the router z-loss; differentiable. 0 where there are
            no logits.
        top_k: Experts that a token chooses.
    """

    fraction: Tensor
    probability: Tensor
    z: Tensor
    top_k: int

    def detach(self) -> "RouterStats":
        """Return the same numbers without their graph, for logging."""
        return RouterStats(self.fraction.detach(), self.probability.detach(), self.z.detach(), self.top_k)

    def balance_loss(self, convention: str = "code") -> Tensor:
        """Return the Switch-style loss that is least where all experts are used alike.

            ℓ = E Σ_e f_e P_e

        Args:
            convention: "code": as the authors' code computes it, k at perfect balance. "paper":
                divided by k, 1 there.

        Returns:
            ℓ, 0-d, differentiable through P; 0 if no token counts.

        Raises:
            ValueError: `convention` is neither.

        Source: Fan et al. (arXiv:2502.16894), equations 26-28; Facico/GOAT-PEFT,
        `goat/peta/src/goat/layer.py`.
        """
        checks.option("balance_loss", "convention", convention, CONVENTIONS)
        loss = self.fraction.shape[0] * (self.fraction * self.probability).sum()
        return loss / self.top_k if convention == "paper" else loss
