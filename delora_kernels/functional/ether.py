"""ether_linear and ether_plus_linear: a frozen linear between block reflections of its input and
output.
"""

from typing import Any

import torch
from torch import Tensor

from delora_kernels import checks
from delora_kernels.autograd.reflection import ReflectedLinear, row_groups_reflected
from delora_kernels.call import ReflectCall, ReflectOptions
from delora_kernels.functional.common import as_rows, dtypes, exporting, run

BLOCKS = ("paper", "official")


def ether_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    u_out: Tensor | None = None,
    blocks: str = "paper",
) -> Tensor:
    """Apply a frozen linear between block reflections: multiplicative, and at a fixed distance from
    the start.

        y = H_out W H_in x + bias,   H = blockdiag(I − 2 û_i û_iᵀ),   û = u / ‖u‖

    ‖H_i − I‖_F = 2 for every block, whatever u. The reflections act on activations: one read and
    one write of x, and of y; no matrix H, no W' and no gradient of W is made. A vector of length 0
    reflects nothing and gets no gradient.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        u: `[blocks, K / blocks]`, one vector for each block of x's features; None: x is not
            reflected.
        bias: `[N]` or None.
        u_out: `[blocks, N / blocks]`, the same for the output; None: it is not reflected.
        blocks: "paper": as above. "official": what the authors' code computes for more than one
            block of u, where block i of W's rows is multiplied by H_i in each of its column
            blocks; it makes W' and its gradient.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Bini et al., "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane
    Reflections" (arXiv:2405.20271); mwbini/ether, `ether-instruct/lit_gpt/ether.py`.
    """
    call = ether_call("ether_linear", x, weight, bias, u, u_out, blocks)
    return _run(call, x)


def ether_plus_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    u_out: Tensor | None = None,
    v_out: Tensor | None = None,
    blocks: str = "paper",
) -> Tensor:
    """Apply a frozen linear between relaxed block reflections, which can be the identity.

        y = H_out W H_in x + bias,   H = blockdiag(I − û_i û_iᵀ + v̂_i v̂_iᵀ),
        û = u / ‖u‖, v̂ = v / ‖v‖

    ‖H_i − I‖_F ≤ √2 for every block; 0 where v = ±u.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        u, v: `[blocks, K / blocks]`, two vectors for each block of x's features; both None: x stays
            as it is.
        bias: `[N]` or None.
        u_out, v_out: `[blocks, N / blocks]`, the same for the output; both None: it stays as it is.
        blocks: "paper" or "official", as in `ether_linear`.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Bini et al. (arXiv:2405.20271), ETHER+; mwbini/ether, `ether-instruct/lit_gpt/ether.py`.
    """
    call = ether_call("ether_plus_linear", x, weight, bias, u, u_out, blocks, v, v_out)
    return _run(call, x)


def reflected(x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
    """Reflect every block of x's columns [..., C], differentiable in x, u and v, which are known to
    fit: `ether_linear` on a weight that is the identity, or with v `ether_plus_linear`, without its
    GEMM.

    Returns:
        [..., C] in x's dtype (autocast's dtype under autocast).
    """
    name = "ether_linear" if v is None else "ether_plus_linear"
    if exporting():
        identity = torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
        return ether_linear(x, identity, u=u) if v is None else ether_plus_linear(x, identity, u=u, v=v)
    checks.no_transforms(name, (x, u, v), f"reference.{name}")
    nothing: Any = None
    options = ReflectOptions(name, False, *dtypes(x, x, u))
    call = ReflectCall(as_rows(x), nothing, None, u, v, None, None, options)
    return run(ReflectedLinear, call, x.shape)[0]


def ether_call(
    name: str, x: Any, weight: Any, bias: Any, u: Any, u_out: Any, blocks: Any, v: Any = None, v_out: Any = None
) -> ReflectCall:
    """Check the arguments of `ether_linear` or, which has v and v_out too, of `ether_plus_linear`,
    and make the call of the one that is named.
    """
    directions = 2 if name == "ether_plus_linear" else 1
    checks.no_transforms(name, (x, weight, bias, u, v, u_out, v_out), f"reference.{name}")
    checks.base(name, x, weight, bias)
    N, K = weight.shape
    _side(name, ("u", "v"), (u, v)[:directions], x, K, "K", "weight's columns")
    _side(name, ("u_out", "v_out"), (u_out, v_out)[:directions], x, N, "N", "weight's rows")
    if u is None and u_out is None:
        remedy = "pass the vectors of a side, or use the frozen linear alone"
        raise checks.fail(ValueError, name, "u", "a tensor where u_out is None", "None", remedy)
    official = checks.option(name, "blocks", blocks, BLOCKS) == "official"
    by_row_groups = official and u is not None and u.shape[0] > 1
    compute_dtype, rank_dtype = dtypes(x, weight, *(t for t in (u, u_out) if t is not None))
    options = ReflectOptions(name, by_row_groups, compute_dtype, rank_dtype)
    return ReflectCall(as_rows(x), weight, bias, u, v, u_out, v_out, options)


def _side(
    name: str, names: tuple[str, str], vectors: tuple[Any, ...], x: Tensor, C: int, letter: str, what: str
) -> None:
    """Check the vectors of one side: all there or none, [blocks, C / blocks] each."""
    given = [each for each in vectors if each is not None]
    if given and len(given) < len(vectors):
        missing = names[0] if vectors[0] is None else names[1]
        raise checks.fail(ValueError, name, missing, "a tensor", "None", f"pass both {names[0]} and {names[1]}")
    for argument, value in zip(names, given, strict=False):
        value = checks.matrix(name, argument, value, f"[blocks, {letter} / blocks]")
        if value.numel() != C or C == 0:
            expected = f"[blocks, {letter} / blocks] with {letter} = {C}, {what}"
            raise checks.fail(ValueError, name, argument, expected, list(value.shape), "pass one row for each block")
        checks.same_device(name, argument, value, x)
    if len(given) == 2:
        remedy = f"{names[0]} and {names[1]} have the same blocks"
        checks.shape(name, names[1], given[1], tuple(given[0].shape), f"[blocks, {letter} / blocks]", remedy)


def _run(call: ReflectCall, x: Tensor) -> Tensor:
    if call.options.by_row_groups and call.u is not None and not exporting():
        call = call._replace(weight=row_groups_reflected(call.weight, call.u, call.v), u=None, v=None)
    return run(ReflectedLinear, call, x.shape)[0]
