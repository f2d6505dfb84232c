"""GoatConfig: what a person who uses PEFT says about a mixture of low-rank experts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from delora_kernels import checks
from delora_kernels.functional.router_stats import CONVENTIONS
from delora_kernels.integrations.peft.methods import register
from delora_kernels.integrations.peft.methods.base import TargetedConfig
from delora_kernels.nn.goat_start import SCALINGS, STARTS

_NAME = "GoatConfig"


@dataclass
class GoatConfig(TargetedConfig):
    """GOAT, and its family of LoRA mixtures of experts, as a PEFT method.

        model = peft.get_peft_model(base_model, dk.GoatConfig(r=4, target_modules="all-linear"))

        y_t = W x_t + Σ_e w_te s_e B_e A_e drop(x_t) − γ Σ_e s_e B⁰_e A⁰_e x_t + bias,
        w = top-k of softmax(G x)

    With `use_dora` all but the bias is multiplied by c = m / ‖W̄‖ by rows, W̄ the mean gate's weight
    (`merge_mean_gate`), a constant but for the trained magnitude m.

    The defaults are GOAT as its paper has it: 8 experts, 2 of them for each token, which start on
    segments of W's singular values, and the theoretical scale. Other members: `init_weights="zero",
    scaling="alpha/r"` is MixLoRA's or MoLA's mixture; with `top_k=None` LoRAMoE's; with
    `shared_A=True` too, HydraLoRA's; `normalize=True` DeLoRA experts.

    Args:
        r: Rank of each expert; all experts together have num_experts · r, which is what GOAT's
            source calls r.
        num_experts: E.
        top_k: k, experts a token chooses; None: all (dense softmax).
        renormalize: Divide the chosen probabilities by their sum.
        shared_A: One A for all experts.
        normalize: Normalise each expert as DeLoRA does, with a trained strength λ_e; `scaling` is
            then without effect.
        goat_lambda: λ at the start, if `normalize`.
        alpha: Of the scalings "alpha/r" and "rslora".
        scaling, eta, rho, svd: as in `nn.goat_start.moe_start`.
        init_weights: The start, one of `init.STARTS`. True: "goat", but "zero" if `normalize` or
            `shared_A`. False: A and B random, nothing subtracted: for tests.
        init_cof: γ; None: 1/E. The source's default is 1, and its training scripts set 1/E.
        save_start: Save the start that is subtracted (as much again as A and B). False: loading
            makes it anew from the base weights and refuses one that is not the saved adapter's.
        dropout: Probability of dropping an element of the experts' input, in training mode.
        dropout_kind: "shared": all experts see one mask. "independent": each its own, as in the
            source; slower.
        balance_coef: Coefficient of the balance loss, which backward adds of itself
            (`set_loss_scale` where the loss is scaled); the loss that a Trainer shows is without
            it.
        balance: The balance loss's convention: "code" (k at perfect balance) or "paper" (1).
        z_coef: Coefficient of the router z-loss.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias:
            as PEFT's LoraConfig; bias "goat_only" for "lora_only".
        rank_pattern: Ranks of single layers, by name or regular expression.
        use_dora: Train a magnitude of each output over the mixture; it starts where it changes
            nothing.

    Raises:
        TypeError, ValueError: an option does not fit; the text names it and the remedy.
        RuntimeError: the installed PEFT can't be given a method.

    Source: Fan et al. (arXiv:2502.16894); Facico/GOAT-PEFT. docs/goat.md says where the two differ.
    """

    r: int = 4
    num_experts: int = 8
    top_k: int | None = 2
    renormalize: bool = True
    shared_A: bool = False
    normalize: bool = False
    goat_lambda: float = 15.0
    alpha: float = 16.0
    scaling: str | float | Sequence[float] = "theory"
    eta: float = 1.0
    rho: float = 10.0
    svd: str = "full"
    init_weights: bool | str = True
    init_cof: float | None = None
    save_start: bool = True
    dropout: float = 0.0
    dropout_kind: str = "shared"
    balance_coef: float = 1e-3
    balance: str = "code"
    z_coef: float = 0.0
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    use_dora: bool = False

    def __new__(cls, *args: Any, **options: Any) -> "GoatConfig":
        if "init_type" in options:  # PEFT would drop what it doesn't know, and go on
            remedy = "load a checkpoint of GOAT's own training code with dk.import_goat"
            raise checks.fail(ValueError, _NAME, "init_type", "left out", options["init_type"], remedy)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = register.peft_type("goat")
        self._check_numbers()
        self._check_choices()

    @property
    def start(self) -> str:
        """The start in `nn.goat_start.moe_start`'s words, or "random"."""
        if isinstance(self.init_weights, str):
            return self.init_weights
        if not self.init_weights:
            return "random"
        return "zero" if self.normalize or self.shared_A else "goat"

    @property
    def chosen(self) -> int:
        """k: experts a token chooses."""
        return self.num_experts if self.top_k is None else self.top_k

    @property
    def residual(self) -> float:
        """γ, by which the start is subtracted."""
        return 1 / self.num_experts if self.init_cof is None else self.init_cof

    def _check_numbers(self) -> None:
        for rank in (self.r, *self.rank_pattern.values()):
            self._check_positive("r", rank)
        self._check_positive("num_experts", self.num_experts)
        if self.top_k is not None:
            self._check_positive("top_k", self.top_k)
            if self.top_k > self.num_experts:
                raise self._fail("top_k", f"at most num_experts = {self.num_experts}", self.top_k, "None: all of them")
        checks.probability(_NAME, self.dropout)
        for name in ("balance_coef", "z_coef"):
            checks.not_negative(_NAME, name, getattr(self, name))
        for name in ("alpha", "eta", "rho", "goat_lambda", *(() if self.init_cof is None else ("init_cof",))):
            checks.number(_NAME, name, getattr(self, name))

    def _check_choices(self) -> None:
        checks.option(_NAME, "balance", self.balance, CONVENTIONS)
        checks.option(_NAME, "dropout_kind", self.dropout_kind, ("shared", "independent"))
        checks.option(_NAME, "bias", self.bias, ("none", "all", "goat_only"))
        checks.option(_NAME, "init_weights", self.start, (*STARTS, "random"))
        checks.option(_NAME, "svd", self.svd, ("full", "randomized"))
        if isinstance(self.scaling, str):
            checks.option(_NAME, "scaling", self.scaling, SCALINGS)
        if self.start not in ("zero", "random") and (self.normalize or self.shared_A):
            option = "normalize" if self.normalize else "shared_A"
            raise self._fail(
                "init_weights", f'True, "zero" or False with {option}=True', self.init_weights, "pass True"
            )
        if self.normalize and self.shared_A:
            raise self._fail("shared_A", "False with normalize=True", True, "give each expert its own A")
