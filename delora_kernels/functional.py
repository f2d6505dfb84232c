"""The public functions: check the arguments, settle dtypes, seed and backend, run the one autograd Function.

Every function takes x `[..., K]`, a frozen weight `[N, K]` in nn.Linear's layout and small factors in any float dtype.
Each gradient has the dtype of its tensor. Without autocast x and weight share one dtype; factors may be wider (PEFT's
float32 adapters on a bf16 base), the low-rank branch then runs in the wider dtype. Under torch.autocast x and weight
are cast as nn.Linear casts them and the branch runs in autocast's dtype. Outputs are deterministic; second derivatives
and torch.func transforms are refused: `delora_kernels.reference` has the linear functions in plain torch for those.
"""

from collections.abc import Sequence

from torch import Tensor

from delora_kernels import adapted_linear, backends
from delora_kernels.call import Call
from delora_kernels.calls import delora_call, dora_call, factors_call, lora_call
from delora_kernels.fold import Fold


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    ranks: Sequence[int] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A frozen linear with a low-rank update.

        y = x Wᵀ + scale · drop(x) Aᵀ Bᵀ + bias

    rsLoRA is scale = alpha / √r. Several adapters are one of their summed rank, A and B stacked.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r, K]`.
        B: `[N, r]`.
        scale: Factor s of the update, usually alpha / r.
        bias: `[N]` or None.
        ranks: Ranks of the adapters stacked in A's rows and B's columns, each with its own dropout mask; None: one.
        dropout_p: Probability of dropping an element of the branch's input, in [0, 1); one for each of `ranks`, or one
            for all.
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask (seed + i that of adapter i); None draws
            from torch's generator.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq. 3.
    """
    return _run(lora_call(x, weight, A, B, scale, bias, ranks=ranks, dropout_p=dropout_p, seed=seed), x)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dropout: str = "peft",
    saved: str = "private",
) -> Tensor:
    """A frozen linear whose updated weight rows are rescaled to learned magnitudes.

        y = c ⊙ (x Wᵀ + scale · x Aᵀ Bᵀ) + bias,   c = magnitude / ‖W + scale · B A‖ by rows, the norm detached

    A row of zero norm has c = 0: its output is the bias and no gradient passes through it.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r, K]`.
        B: `[N, r]`.
        magnitude: m, `[N]`.
        scale: Factor s of the update, usually alpha / r.
        bias: `[N]` or None.
        dropout_p: Probability of dropping an element, in [0, 1).
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask; None draws from torch's generator.
        dropout: "peft": with x' = drop(x), y = (x − x') Wᵀ + c ⊙ (x' Wᵀ + scale · x' Aᵀ Bᵀ) + bias, two frozen GEMMs.
            "branch": only the low-rank branch sees drop(x), one frozen GEMM.
        saved: "private": backward keeps a `[T, N]` tensor of its own. "output": it keeps y, which costs nothing where
            the consumer keeps y too; y must then not be modified in place (autograd refuses), there may be no bias and
            no two-term dropout, and an exactly zero magnitude gets no gradient.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), eq. 5 and section 4.3.
    """
    call = dora_call(
        x, weight, A, B, magnitude, scale, bias, dropout_p=dropout_p, seed=seed, dropout=dropout, saved=saved
    )
    return _run(call, x)


def delora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    lam: Tensor | float,
    weight_norm: Tensor | float,
    bias: Tensor | None = None,
    *,
    frozen_A: Tensor | None = None,
    frozen_B: Tensor | None = None,
    frozen_lam: Tensor | float | None = None,
    eps: float = 1e-4,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A frozen linear with a normalised low-rank update of bounded norm: angle and strength learn apart.

        y = x Wᵀ + drop(x) Âᵀ B̂ᵀ + bias,   Â = diag(1/‖A_i‖) A diag(n),   B̂ = B diag(λ / (r ‖B_i‖))

    With a frozen start (A₀, B₀) the pair's own update, scaled by λ₀, is subtracted. ‖ΔW‖_F ≤ λ max n (PEFT's form).

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r, K]`; only its rows' directions matter.
        B: `[N, r]`; only its columns' directions matter.
        lam: λ, the strength; a number, or a 0-d or `[1]` tensor.
        weight_norm: n, a constant: `[K]`, one value for each input column (PEFT and the authors' code), or a number or
            0-d tensor (the paper's ‖W‖).
        bias: `[N]` or None.
        frozen_A: A₀, `[r₀, K]`, a constant, or None.
        frozen_B: B₀, `[N, r₀]`, a constant, or None.
        frozen_lam: λ₀ of the frozen start (the paper), or None: the live λ (the authors' code).
        eps: Lower clamp of the norms, which then get no gradient (PEFT: 1e-4); 0: no clamp, and a factor of length 0
            contributes nothing.
        dropout_p: Probability of dropping an element of the branch's input, in [0, 1).
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask; None draws from torch's generator.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv:2503.18225), eqs. 5-9.
    """
    call = delora_call(
        x,
        weight,
        A,
        B,
        lam,
        weight_norm,
        bias,
        frozen_A=frozen_A,
        frozen_B=frozen_B,
        frozen_lam=frozen_lam,
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
    )
    return _run(call, x)


def delora_factors(
    A: Tensor, B: Tensor, lam: Tensor | float, weight_norm: Tensor | float, *, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """DeLoRA's normalised update as a plain low-rank pair, which `lora_linear` takes with scale 1.

        Â = diag(1/‖A_i‖) A diag(n),   B̂ = B diag(λ / (r ‖B_i‖)),   ΔW = B̂ Â

    Args:
        A: `[r, K]`.
        B: `[N, r]`.
        lam: λ; a number, or a 0-d or `[1]` tensor.
        weight_norm: n, a constant: `[K]`, or a number or 0-d tensor.
        eps: Lower clamp of the norms, which then get no gradient (PEFT: 1e-4); 0: no clamp, and a factor of length 0
            contributes nothing.

    Returns:
        Â `[r, K]` and B̂ `[N, r]`, in the wider dtype of A and B, computed in float32 or wider; differentiable once.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv:2503.18225), eqs. 5-8.
    """
    lam, weight_norm, eps = factors_call(A, B, lam, weight_norm, eps)
    A_hat, B_hat = Fold.apply(A, B, lam, weight_norm, eps, backends.requested() or "eager")
    return A_hat, B_hat


def _run(call: Call, x: Tensor) -> Tensor:
    y = adapted_linear.run(call)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


backends.load("eager")
