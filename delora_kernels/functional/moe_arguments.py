"""Checks of the arguments of `functional.moe_lora_linear`, and the `MoECall` made of them."""

from typing import Any

import torch
from torch import Tensor

from delora_kernels import checks
from delora_kernels.call import MoECall, MoEOptions
from delora_kernels.functional.common import as_rows, dtypes, seeds

_NAME = "moe_lora_linear"


def moe_lora_call(
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    router: Any = None,
    *,
    gates: Any = None,
    adapter_ids: Any = None,
    top_k: Any = None,
    renormalize: Any = True,
    scale: Any = 1.0,
    bias: Any = None,
    token_mask: Any = None,
    frozen_A: Any = None,
    frozen_B: Any = None,
    residual: Any = 1.0,
    magnitude: Any = None,
    dropout_p: Any = 0.0,
    dropout: Any = "shared",
    seed: Any = None,
    balance_coef: Any = 0.0,
    z_coef: Any = 0.0,
) -> MoECall:
    """Check the arguments of `moe_lora_linear` and make its call."""
    tensors = (x, weight, bias, A, B, router, gates, scale, frozen_A, frozen_B, residual, magnitude)
    checks.no_transforms(_NAME, tensors, f"reference.{_NAME}")
    checks.base(_NAME, x, weight, bias)
    N, K = weight.shape
    if not _plainly_right(x, A, B, router, N, K):
        _experts(x, A, B, router, N, K)
    E, _, r = B.shape
    acc = torch.float64 if torch.float64 in (A.dtype, B.dtype, x.dtype) else torch.float32
    gates, k = _gating(x, E, router, gates, adapter_ids, acc), _top_k(top_k, E, router)
    if frozen_A is not None or frozen_B is not None:
        _pairs(x, frozen_A, frozen_B, N, K)
        residual = _vector(
            "residual", checks.number_or_tensor(_NAME, "residual", residual), x, frozen_B.shape[0], "[J]", acc
        )
        checks.constant(_NAME, "residual", residual)
    else:
        residual = None
    if magnitude is not None:
        magnitude = checks.tensor(_NAME, "magnitude", magnitude)
        checks.shape(_NAME, "magnitude", magnitude, (N,), "[N]", "pass one value for each row of weight")
        checks.same_device(_NAME, "magnitude", magnitude, x)
    p = checks.probability(_NAME, dropout_p)
    independent = checks.option(_NAME, "dropout", dropout, ("shared", "independent")) == "independent"
    scale = checks.number_or_tensor(_NAME, "scale", scale)
    balance_coef = checks.number_or_tensor(_NAME, "balance_coef", balance_coef)
    z_coef = checks.number_or_tensor(_NAME, "z_coef", z_coef)
    if p > 0 and independent and A.dim() == 2:
        A = A.expand(E, r, K)  # each expert sees x through a mask of its own, so nothing is shared
    experts = (r,) * E if independent else ((E if A.dim() == 3 else 1) * r,)
    undropped = (0 if router is None else E) + (0 if frozen_A is None else frozen_A.shape[0] * frozen_A.shape[1])
    ranks = (*experts, undropped)[: len(experts) + (undropped > 0)] if p > 0 else ()
    probabilities = (*((p,) * len(experts)), 0.0)[: len(ranks)] if p > 0 else (0.0,)
    seed = seeds(_NAME, seed, x, len(ranks)) if p > 0 else None
    compute_dtype, rank_dtype, rows = *dtypes(x, weight, A, B, *(() if router is None else (router,))), as_rows(x)
    return MoECall(
        rows,
        weight,
        bias,
        A,
        B,
        router,
        gates,
        magnitude,
        _vector("scale", scale, x, E, "[E]", acc),
        frozen_A,
        frozen_B,
        residual,
        _token_share(x, token_mask, acc),
        _coefficient("balance_coef", balance_coef, x, acc),
        _coefficient("z_coef", z_coef, x, acc),
        seed,
        MoEOptions(_NAME, k, bool(renormalize), ranks, probabilities, compute_dtype, rank_dtype),
    )


def _plainly_right(x: Tensor, A: Any, B: Any, router: Any, N: int, K: int) -> bool:
    """Whether A, B and the router, if there is one, are right, found the short way; False: ask for
    each.
    """
    given = (A, B) if router is None else (A, B, router)
    for value in given:
        if type(value) not in checks.PLAIN or value.dtype not in checks.FLOATS or value.device != x.device:
            return False
        if value.layout != torch.strided or value.is_meta:
            return False
    if B.dim() != 3 or 0 in B.shape or B.shape[1] != N:
        return False
    E, _, r = B.shape
    return A.shape == ((r, K) if A.dim() == 2 else (E, r, K)) and (router is None or router.shape == (E, K))


def _experts(x: Tensor, A: Any, B: Any, router: Any, N: int, K: int) -> None:
    """Check A [E, r, K] or [r, K], B [E, N, r], and the router [E, K] if there is one."""
    A, B = checks.tensor(_NAME, "A", A), checks.tensor(_NAME, "B", B)
    if B.dim() != 3 or 0 in (B.shape[0], B.shape[2]):
        expected = "[E, N, r] with E, r ≥ 1"
        raise checks.fail(ValueError, _NAME, "B", expected, f"shape {list(B.shape)}", "stack the experts' B")
    E, _, r = B.shape
    checks.shape(_NAME, "B", B, (E, N, r), "[E, N, r]", "N is weight's number of rows")
    shape, letters = ((r, K), "[r, K]") if A.dim() == 2 else ((E, r, K), "[E, r, K]")
    checks.shape(_NAME, "A", A, shape, letters, "E and r are B's, K is weight's number of columns")
    checks.same_device(_NAME, "A", A, x)
    checks.same_device(_NAME, "B", B, x)
    if router is not None:
        router = checks.tensor(_NAME, "router", router)
        checks.shape(_NAME, "router", router, (E, K), "[E, K]", "E is B's number of experts")
        checks.same_device(_NAME, "router", router, x)


def _gating(x: Tensor, E: int, router: Any, gates: Any, adapter_ids: Any, acc: torch.dtype) -> Tensor | None:
    """Return the given gates as [T, E], or None where the router makes them."""
    ways = {"router": router, "gates": gates, "adapter_ids": adapter_ids}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        ways_given = " and ".join(given) or "none of them"
        expected = "the only one of router, gates, adapter_ids"
        raise checks.fail(ValueError, _NAME, "router", expected, ways_given, "pass one")
    if router is not None:
        return None
    remedy = "give one value for each token, with x's leading dimensions"
    if gates is not None:
        gates = checks.tensor(_NAME, "gates", gates)
        checks.shape(_NAME, "gates", gates, (*x.shape[:-1], E), "[..., E]", remedy)
        checks.same_device(_NAME, "gates", gates, x)
        return as_rows(gates).to(acc)
    if not isinstance(adapter_ids, Tensor) or adapter_ids.dtype not in (torch.int32, torch.int64):
        got = str(adapter_ids.dtype) if isinstance(adapter_ids, Tensor) else type(adapter_ids).__name__
        raise checks.fail(TypeError, _NAME, "adapter_ids", "an int64 or int32 tensor", got, "convert it with .long()")
    checks.shape(_NAME, "adapter_ids", adapter_ids, tuple(x.shape[:-1]), "[...]", remedy)
    checks.same_device(_NAME, "adapter_ids", adapter_ids, x)
    return (adapter_ids.reshape(-1, 1) == torch.arange(E, device=x.device)).to(acc)


def _top_k(top_k: Any, E: int, router: Any) -> int:
    """How many experts a token keeps."""
    if top_k is None:
        return E
    if router is None:
        raise checks.fail(ValueError, _NAME, "top_k", "None without a router", top_k, "select in the given gates")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise checks.fail(TypeError, _NAME, "top_k", "an int, or None", type(top_k).__name__, "pass an int")
    if not 1 <= top_k <= E:
        raise checks.fail(ValueError, _NAME, "top_k", f"from 1 to E = {E}", top_k, "None keeps all experts")
    return top_k


def _pairs(x: Tensor, frozen_A: Any, frozen_B: Any, N: int, K: int) -> None:
    """Check the constant pairs A⁰ [J, r₀, K], B⁰ [J, N, r₀]."""
    if frozen_A is None or frozen_B is None:
        missing = "frozen_A" if frozen_A is None else "frozen_B"
        raise checks.fail(ValueError, _NAME, missing, "a tensor", "None", "a residual needs both frozen_A and frozen_B")
    for name, value in (("frozen_A", frozen_A), ("frozen_B", frozen_B)):
        checks.tensor(_NAME, name, value)
        checks.same_device(_NAME, name, value, x)
        checks.constant(_NAME, name, value)
    if frozen_A.dim() != 3:
        got = f"shape {list(frozen_A.shape)}"
        raise checks.fail(ValueError, _NAME, "frozen_A", "3-D [J, r₀, K]", got, "add a dimension for the pairs")
    J, r0, _ = frozen_A.shape
    checks.shape(_NAME, "frozen_A", frozen_A, (J, r0, K), "[J, r₀, K]", "K is weight's number of columns")
    checks.shape(_NAME, "frozen_B", frozen_B, (J, N, r0), "[J, N, r₀]", "J and r₀ are frozen_A's")


def _vector(argument: str, value: float | Tensor, x: Tensor, n: int, letters: str, acc: torch.dtype) -> Tensor:
    """Return a number or one for each expert, as a tensor [n]."""
    if not isinstance(value, Tensor):
        return torch.full((n,), value, dtype=acc, device=x.device)
    value = checks.tensor(_NAME, argument, value)
    checks.same_device(_NAME, argument, value, x)
    if value.dim() == 0:
        return value.to(acc).expand(n)
    checks.shape(_NAME, argument, value, (n,), letters, "pass a number, or one for each expert")
    return value.to(acc)


def _token_share(x: Tensor, token_mask: Any, acc: torch.dtype) -> Tensor | None:
    """1 / (number of tokens that count) for each that does, 0 for the others."""
    if token_mask is None:
        return None
    if not isinstance(token_mask, Tensor) or token_mask.dtype != torch.bool:
        got = str(token_mask.dtype) if isinstance(token_mask, Tensor) else type(token_mask).__name__
        raise checks.fail(TypeError, _NAME, "token_mask", "a bool tensor", got, "convert it with .bool()")
    remedy = "give one value for each token, with x's leading dimensions"
    checks.shape(_NAME, "token_mask", token_mask, tuple(x.shape[:-1]), "[...]", remedy)
    checks.same_device(_NAME, "token_mask", token_mask, x)
    counted = token_mask.reshape(-1).to(acc)
    return counted / counted.sum().clamp(min=1)


def _coefficient(argument: str, value: float | Tensor, x: Tensor, acc: torch.dtype) -> Tensor | None:
    """Return a loss's coefficient as a 0-d tensor, or None for 0."""
    if not isinstance(value, Tensor) and value == 0:
        return None
    value = checks.scalar_tensor(_NAME, argument, value, x).reshape(()).to(acc)
    checks.constant(_NAME, argument, value)
    return value
