"""MoELoRALinear: a frozen linear plus low-rank experts that a router weighs for every token."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from delora_kernels import checks, functional, ops
from delora_kernels.autograd.mixture import mean_gate
from delora_kernels.bases.plain import dense
from delora_kernels.functional.common import exporting
from delora_kernels.functional.moe_arguments import moe_lora_call
from delora_kernels.functional.router_stats import CONVENTIONS, RouterStats
from delora_kernels.nn.base import AdapterLinear, BaseOptions


class Routed:
    """A layer with routed experts, whose losses backward adds of itself.

    Args:
        loss_scale: What the loss is multiplied by before backward: `set_loss_scale` tells every
            layer.
    """

    loss_scale: float | Tensor = 1.0

    def _losses(self, balance_coef: float, z_coef: float, balance: str, chosen: int) -> dict[str, Any]:
        """Return the op's coefficients, whose balance loss is the code's, while training; `chosen`:
        experts of a token.
        """
        if not self.training:  # type: ignore[attr-defined]
            return {}
        convention = 1 if balance == "code" else 1 / chosen
        return {
            "balance_coef": balance_coef * convention * self.loss_scale if balance_coef else 0.0,
            "z_coef": z_coef * self.loss_scale if z_coef else 0.0,
        }


class MoELoRALinear(Routed, AdapterLinear):
    """A frozen linear with a mixture of low-rank experts, weighed for every token by a router.

        y_t = W x_t + Σ_e w_te · s · B_e A_e drop(x_t) + bias,
        w = top-k of softmax(G x), s = alpha / r

    With `dora`, all but the bias is multiplied by c = m / ‖W + Σ_e s · B_e A_e / E‖ by rows, the
    norm detached: DoRA over the mixture's mean gate. `magnitude` m `[N]` starts at that norm.

    A starts random (Kaiming uniform, a = √5), B at 0: y is exactly the frozen linear's. The router
    G is nn.Linear's. A mixture has no single W': `merge` raises. `enabled = False` gives the frozen
    linear's output exactly.

    `balance_coef` and `z_coef` are the losses' coefficients: in training mode backward adds their
    gradients of itself, once for each pass through the module, so nothing has to be collected, and
    checkpointing of both kinds, compiling and DDP (which averages it like every gradient) work as
    they do without. What multiplies the loss before backward is not seen there: with GradScaler, or
    a loss divided by the accumulation steps, tell `set_loss_scale`. The detached value of the last
    forward pass is `balance_loss`, its statistics `stats`.

    Args:
        in_features: K.
        out_features: N.
        r: Rank of each expert, ≥ 1.
        experts: E, ≥ 1.
        top_k: Experts a token chooses; None: all (dense softmax).
        alpha: Numerator of the scale s.
        renormalize: Divide the chosen probabilities by their sum.
        bias: Give the base a bias.
        balance_coef: Coefficient of the balance loss.
        z_coef: Coefficient of the router z-loss, the mean of logsumexp(logits)².
        balance: "code" or "paper": the balance loss's convention, see `RouterStats.balance_loss`.
        dropout_p: Probability of dropping an element of the experts' input, in [0, 1); only in
            training mode.
        dropout: "shared" or "independent" masks, as in `functional.moe_lora_linear`.
        dora: Train a magnitude of each output over the mixture.
        adapter_dtype: Dtype of A, B and the router. None: float32 for a float16 or bfloat16 base,
            else the base's.
        device: Device of every tensor.
        dtype: Dtype of the base, which is initialised as nn.Linear's and frozen.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Fan et al. (arXiv:2502.16894), equation 10, without its initialisation.
    """

    magnitude: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 4,
        experts: int = 8,
        top_k: int | None = 2,
        alpha: float = 16.0,
        *,
        renormalize: bool = True,
        balance_coef: float = 0.0,
        z_coef: float = 0.0,
        balance: str = "code",
        dropout: str = "shared",
        dora: bool = False,
        **base: Unpack[BaseOptions],
    ) -> None:
        self._prepare(experts, top_k)
        super().__init__(in_features, out_features, r, experts=experts, **base)
        kind = type(self).__name__
        self.experts, self.top_k, self.renormalize = experts, top_k, renormalize
        self.alpha = checks.number(kind, "alpha", alpha)
        self.balance_coef = checks.not_negative(kind, "balance_coef", balance_coef)
        self.z_coef = checks.not_negative(kind, "z_coef", z_coef)
        self.balance = checks.option(kind, "balance", balance, CONVENTIONS)
        self.dropout = checks.option(kind, "dropout", dropout, ("shared", "independent"))
        self.router = nn.Parameter(self.A.new_empty(experts, in_features))
        magnitude = self.A.new_empty(out_features, dtype=self._vector_dtype) if dora else None
        self.register_parameter("magnitude", None if magnitude is None else nn.Parameter(magnitude))
        self.enabled = True
        self.stats: RouterStats | None = None
        self._make()
        self.reset_parameters()

    def _prepare(self, experts: Any, top_k: Any) -> None:
        kind = type(self).__name__
        if isinstance(experts, bool) or not isinstance(experts, int):
            raise checks.fail(TypeError, kind, "experts", "an int", type(experts).__name__, "pass how many")
        if experts < 1:
            raise checks.fail(ValueError, kind, "experts", "≥ 1", experts, "use nn.Linear for a layer without experts")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= experts):
            raise checks.fail(
                ValueError, kind, "top_k", f"from 1 to experts = {experts}, or None", top_k, "pass an int"
            )

    def _make(self) -> None:
        """Make the tensors that a subclass has beside A, B and the router."""

    def reset_parameters(self) -> None:
        """Start the adapter anew; a magnitude starts at the norms that it is divided by."""
        super().reset_parameters()
        if self.magnitude is None or self.magnitude.is_meta:
            return
        with torch.no_grad():
            mixture = self._mixture()
            dtype = getattr(mixture["weight"], "dtype", torch.float32)
            call = moe_lora_call(self.A.new_empty((0, self.in_features), dtype=dtype), **mixture)
            norm = ops.row_norm(dense(call.weight, dtype), *mean_gate(call), 1.0, None, False, "eager")[0]
            self.magnitude.copy_(norm)

    @property
    def balance_loss(self) -> Tensor | None:
        """The detached balance loss of the last forward pass, in the module's convention, for
        logging; None before.
        """
        return None if self.stats is None else self.stats.balance_loss(self.balance)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Compute the adapted output, `[..., K]` → `[..., N]`, differentiable once.

        Args:
            x: `[..., K]`.
            token_mask: `[...]`, bool: the tokens that the losses count; None: all.
        """
        if not self.enabled:
            return nn.functional.linear(x, self.weight, self.bias) if self.stored is None else self.stored(x)
        y, stats = functional.moe_lora_linear(
            x,
            bias=self.bias,
            token_mask=token_mask,
            top_k=self.top_k,
            renormalize=self.renormalize,
            dropout_p=self.dropout_p if self.training else 0.0,
            dropout=self.dropout,
            magnitude=self.magnitude,
            **self._losses(self.balance_coef, self.z_coef, self.balance, self.top_k or self.experts),
            **self._mixture(),
        )
        if not exporting():
            self.stats = stats.detach()
        return y

    def counted_tokens(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor | None:
        """Of the arguments of `forward` the mask of the tokens that count; None: all."""
        return token_mask

    def merge(self, *, check_finite: bool = True, keep_weight: bool = True) -> None:
        """Refused: every token has a W' of its own.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"{type(self).__name__}.merge: a mixture weighs its experts anew for every token, so there is no single "
            "weight to merge into; keep the module, or set enabled = False for the frozen linear"
        )

    def extra_repr(self) -> str:
        """Show the arguments that made the module, as nn.Linear prints its own."""
        dora = "" if self.magnitude is None else ", dora=True"
        return f"{super().extra_repr()}, experts={self.experts}, top_k={self.top_k}{dora}"

    def _mixture(self) -> dict[str, Any]:
        """Return the tensors of the call."""
        factors = {"A": self.A, "B": self.B, "router": self.router}
        return {"weight": self._call_weight(), **factors, "scale": self.alpha / self.r}

    @torch.no_grad()
    def _reset_adapter(self) -> None:
        for expert in self.A:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))


def set_loss_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Tell every mixture in `model` (of `nn`, or of PEFT's GOAT) what its loss is multiplied by
    before backward.

        # each step, before the forward pass
        set_loss_scale(model, scaler.get_scale() / accumulation_steps)

    Args:
        model: Any module.
        scale: GradScaler's scale, over the steps that a loss is divided by; a number, or a 0-d
            tensor.
    """
    for module in model.modules():
        if isinstance(module, Routed):
            module.loss_scale = scale
