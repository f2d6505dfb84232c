"""What checks the arguments of each public function and turns them into a `Call`: dtypes, seed and backend settled."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from delora_kernels import backends, checks
from delora_kernels.call import AnyCall, Call, Options
from delora_kernels.ether_calls import ether_call, ether_plus_call
from delora_kernels.moe_calls import moe_lora_call
from delora_kernels.settle import as_rows, dtypes, refuse_transforms


def lora_call(
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    scale: Any = 1.0,
    bias: Any = None,
    *,
    ranks: Any = None,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> Call:
    """The call that `functional.lora_linear` makes."""
    name = "lora_linear"
    _check(name, x, weight, bias, A, B)
    scale = checks.number(name, "scale", scale)
    ranks = checks.ranks(name, ranks, A)
    return _call(name, x, weight, bias, A, B, scale=scale, ranks=ranks, dropout_p=dropout_p, seed=seed)


def dora_call(
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
    """The call that `functional.dora_linear` makes."""
    name = "dora_linear"
    _check(name, x, weight, bias, A, B, magnitude)
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


def delora_call(
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
    """The call that `functional.delora_linear` makes."""
    name = "delora_linear"
    _check(name, x, weight, bias, A, B, lam, weight_norm, frozen_A, frozen_B, frozen_lam)
    lam, weight_norm, eps = _delora_constants(name, A, lam, weight_norm, eps)
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
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
    )


def factors_call(A: Any, B: Any, lam: Any, weight_norm: Any, eps: Any) -> tuple[Tensor, Tensor, float]:
    """λ, n and eps as `functional.delora_factors` passes them on, all of its arguments checked."""
    name = "delora_factors"
    refuse_transforms(name, (A, B, lam, weight_norm), "reference.delora_weight")
    checks.pair(name, A, B)
    checks.same_device(name, "B", B, A)
    return _delora_constants(name, A, lam, weight_norm, eps)


def _delora_constants(name: str, A: Tensor, lam: Any, weight_norm: Any, eps: Any) -> tuple[Tensor, Tensor, float]:
    lam = checks.scalar_tensor(name, "lam", lam, A)
    if isinstance(weight_norm, Tensor) and weight_norm.dim() > 0:
        weight_norm = checks.tensor(name, "weight_norm", weight_norm)
        remedy = "pass ‖W‖ of each input column, or one number"
        checks.shape(name, "weight_norm", weight_norm, (A.shape[1],), "[K]", remedy)
        checks.same_device(name, "weight_norm", weight_norm, A)
    else:
        weight_norm = checks.scalar_tensor(name, "weight_norm", weight_norm, A)
    checks.constant(name, "weight_norm", weight_norm)
    return lam, weight_norm, checks.not_negative(name, "eps", eps)


def _check(name: str, x: Any, weight: Any, bias: Any, A: Any, B: Any, *others: Any) -> None:
    refuse_transforms(name, (x, weight, bias, A, B, *others), f"reference.{name}")
    if not checks.plainly_right(x, weight, bias, A, B):
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
    ranks: tuple[int, ...] = (),
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
    dropout_p = checks.probabilities(name, dropout_p, ranks)
    compute_dtype, rank_dtype = dtypes(x, A, B)
    seed = checks.seed(name, seed, x, len(ranks)) if any(dropout_p) else None
    settled = (name, scale, eps, ranks, dropout_p, two_term, save_output, compute_dtype, rank_dtype)
    tensors = (
        as_rows(x),
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
    )
    backend = backends.choose(Call(*tensors, Options(*settled, backend="")))
    return Call(*tensors, Options(*settled, backend))


CALLS: dict[str, Callable[..., AnyCall]] = {
    "lora_linear": lora_call,
    "dora_linear": dora_call,
    "delora_linear": delora_call,
    "moe_lora_linear": moe_lora_call,
    "ether_linear": ether_call,
    "ether_plus_linear": ether_plus_call,
}
"""Public function name → what checks its arguments and turns them into a `Call`."""
