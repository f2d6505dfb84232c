"""The public functions: check the arguments, settle dtypes, seed and backend, run the one autograd Function.

Every function takes x `[..., K]`, a frozen weight `[N, K]` in nn.Linear's layout and small factors in any float dtype.
Each gradient has the dtype of its tensor. Without autocast x and weight share one dtype; factors may be wider (PEFT's
float32 adapters on a bf16 base), the low-rank branch then runs in the wider dtype. Under torch.autocast x and weight
are cast as nn.Linear casts them and the branch runs in autocast's dtype. Outputs are deterministic; second derivatives
and torch.func transforms are refused: `delora_kernels.reference` has the same functions in plain torch for those.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from delora_kernels import adapted_linear, backends, checks
from delora_kernels.call import Call, Options


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A frozen linear with a low-rank update.

        y = x Wᵀ + scale · drop(x) Aᵀ Bᵀ + bias

    rsLoRA is scale = alpha / √r.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r, K]`.
        B: `[N, r]`.
        scale: Factor s of the update, usually alpha / r.
        bias: `[N]` or None.
        dropout_p: Probability of dropping an element of the branch's input, in [0, 1).
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask; None draws from torch's generator.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq. 3.
    """
    return _run(_lora_call(x, weight, A, B, scale, bias, dropout_p=dropout_p, seed=seed), x)


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
    call = _dora_call(
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
    call = _delora_call(
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


def _lora_call(
    x: Any, weight: Any, A: Any, B: Any, scale: Any = 1.0, bias: Any = None, *, dropout_p: Any = 0.0, seed: Any = None
) -> Call:
    name = "lora_linear"
    _check(name, x, weight, bias, A, B)
    return _call(name, x, weight, bias, A, B, scale=checks.number(name, "scale", scale), dropout_p=dropout_p, seed=seed)


def _dora_call(
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    magnitude: Any,
    scale: Any = 1.0,
    bias: Any = None,
    *,
    dropout_p: Any = 0.0,
    seed: Any = None,
    dropout: Any = "peft",
    saved: Any = "private",
) -> Call:
    name = "dora_linear"
    _check(name, x, weight, bias, A, B)
    magnitude = checks.tensor(name, "magnitude", magnitude)
    checks.shape(name, "magnitude", magnitude, (weight.shape[0],), "[N]", "pass one value for each row of weight")
    checks.same_device(name, "magnitude", magnitude, x)
    two_term = checks.option(name, "dropout", dropout, ("peft", "branch")) == "peft"
    save_output = checks.option(name, "saved", saved, ("private", "output")) == "output"
    two_term = two_term and checks.probability(name, dropout_p) > 0
    if save_output and (bias is not None or two_term):
        got = "a bias" if bias is not None else "dropout='peft' with dropout_p > 0"
        raise checks.fail(
            ValueError, name, "saved", "'private' here", f"'output' with {got}", "y does not hold c ⊙ u then"
        )
    return _call(
        name,
        x,
        weight,
        bias,
        A,
        B,
        magnitude=magnitude,
        scale=checks.number(name, "scale", scale),
        dropout_p=dropout_p,
        seed=seed,
        two_term=two_term,
        save_output=save_output,
    )


def _delora_call(
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    lam: Any,
    weight_norm: Any,
    bias: Any = None,
    *,
    frozen_A: Any = None,
    frozen_B: Any = None,
    frozen_lam: Any = None,
    eps: Any = 1e-4,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> Call:
    name = "delora_linear"
    _check(name, x, weight, bias, A, B)
    lam = checks.scalar_tensor(name, "lam", lam, x)
    if isinstance(weight_norm, Tensor) and weight_norm.dim() > 0:
        weight_norm = checks.tensor(name, "weight_norm", weight_norm)
        remedy = "pass ‖W‖ of each input column, or one number"
        checks.shape(name, "weight_norm", weight_norm, (weight.shape[1],), "[K]", remedy)
        checks.same_device(name, "weight_norm", weight_norm, x)
    else:
        weight_norm = checks.scalar_tensor(name, "weight_norm", weight_norm, x)
    checks.constant(name, "weight_norm", weight_norm)
    if (frozen_A is None) != (frozen_B is None):
        missing = "frozen_A" if frozen_A is None else "frozen_B"
        raise checks.fail(
            ValueError, name, missing, "a tensor", "None", "a frozen start needs both frozen_A and frozen_B"
        )
    if frozen_A is not None:
        checks.factors(name, x, weight, frozen_A, frozen_B, ("frozen_A", "frozen_B"))
        checks.constant(name, "frozen_A", frozen_A)
        checks.constant(name, "frozen_B", frozen_B)
    if frozen_lam is not None:
        if frozen_A is None:
            raise checks.fail(
                ValueError, name, "frozen_lam", "None", "a value", "it scales frozen_A and frozen_B: pass them"
            )
        frozen_lam = checks.scalar_tensor(name, "frozen_lam", frozen_lam, x)
        checks.constant(name, "frozen_lam", frozen_lam)
    return _call(
        name,
        x,
        weight,
        bias,
        A,
        B,
        lam=lam,
        weight_norm=weight_norm,
        frozen_A=frozen_A,
        frozen_B=frozen_B,
        frozen_lam=frozen_lam,
        eps=checks.not_negative(name, "eps", eps),
        dropout_p=dropout_p,
        seed=seed,
    )


backends.load("eager")

CALLS: dict[str, Callable[..., Call]] = {
    "lora_linear": _lora_call,
    "dora_linear": _dora_call,
    "delora_linear": _delora_call,
}
"""Public function name → what checks its arguments and turns them into a `Call`."""


def active_transform(tensors: Iterable[Any]) -> str | None:
    """The functional transform that is under way, which the autograd Function can't take part in, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if forward_ad._current_level >= 0:
        duals = (forward_ad.unpack_dual(t) for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
        if any(dual.tangent is not None for dual in duals):
            return "forward-mode differentiation"
    return None


def _check(name: str, x: Any, weight: Any, bias: Any, A: Any, B: Any) -> None:
    transform = active_transform((x, weight, bias, A, B))
    if transform is not None:
        raise RuntimeError(f"{name} does not support {transform}; use delora_kernels.reference.{name} there")
    checks.base(name, x, weight, bias)
    checks.factors(name, x, weight, A, B)


def _call(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    dropout_p: Any,
    seed: Any,
    scale: float = 1.0,
    magnitude: Tensor | None = None,
    lam: Tensor | None = None,
    weight_norm: Tensor | None = None,
    frozen_A: Tensor | None = None,
    frozen_B: Tensor | None = None,
    frozen_lam: Tensor | None = None,
    eps: float = 0.0,
    two_term: bool = False,
    save_output: bool = False,
) -> Call:
    dropout_p = checks.probability(name, dropout_p)
    compute_dtype = rank_dtype = _compute_dtype(x)
    if compute_dtype == x.dtype == weight.dtype and not _autocast(x):
        rank_dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), compute_dtype)
    seed = checks.seed(name, seed, x) if dropout_p > 0 else None
    options = Options(name, scale, eps, dropout_p, two_term, save_output, compute_dtype, rank_dtype, backend="")
    call = Call(
        x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0),
        weight,
        bias,
        A,
        B,
        magnitude,
        lam,
        weight_norm,
        frozen_A,
        frozen_B,
        frozen_lam,
        seed,
        options,
    )
    return call._replace(options=options._replace(backend=backends.choose(call)))


def _autocast(x: Tensor) -> bool:
    # autocast leaves float64 alone
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype


def _run(call: Call, x: Tensor) -> Tensor:
    return adapted_linear.run(call).view(*x.shape[:-1], call.weight.shape[0])
