"""A checked call in plain torch, for a program that is exported: the reference's formula, in the
call's own dtypes.

Such a program holds no op of this library and runs where the library is not; autograd
differentiates it. Dropout is torch's own, so its masks come from torch's generator. The frozen GEMM
runs in the compute dtype, the low-rank branch in the rank dtype; norms, reflections and gates take
part in float32 or wider where the fused ops do so too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from delora_kernels import reference
from delora_kernels.bases.plain import dense
from delora_kernels.call import AnyCall, Call, GroupedCall, MixedCall, MoECall, ReflectCall
from delora_kernels.dtypes import accumulate_dtype


def run(call: AnyCall | MixedCall, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Compute the outputs of a call: y, and of a mixture its statistics fraction, probability and
    z.

    Args:
        call: The call.
        shape: Of x as it came, [..., K].
    """
    if torch.is_autocast_enabled(call.x.device.type):
        with torch.autocast(call.x.device.type, enabled=False):  # the call's options hold every dtype
            y, *stats = _outputs(call)
    else:
        y, *stats = _outputs(call)
    y = _cast(y, call.options.compute_dtype)
    return (y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])), *stats


def factors(A: Tensor, B: Tensor, lam: Tensor, weight_norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `delora_factors` of checked arguments."""
    dtype = torch.promote_types(A.dtype, B.dtype)
    with torch.autocast(A.device.type, enabled=False):
        wide = [_cast(tensor, accumulate_dtype(dtype)) for tensor in (A, B, lam, weight_norm)]
        A_hat, B_hat = reference.delora_factors(*wide, eps=eps)
    return _cast(A_hat, dtype), _cast(B_hat, dtype)


def _outputs(call: AnyCall | MixedCall) -> tuple[Tensor, ...]:
    o = call.options
    if o.method not in FORMULAS:
        raise NotImplementedError(
            f"{o.method}: a program with it can't be exported yet: functional/plain_torch.py has no formula of it; "
            "list one in FORMULAS there, or use another method"
        )
    x, weight = _cast(call.x, o.compute_dtype), dense(call.weight, o.compute_dtype)
    bias = None if call.bias is None else _cast(call.bias, o.compute_dtype)
    found: Tensor | tuple[Tensor, ...] = FORMULAS[o.method](call, x, weight, bias)
    return (found,) if isinstance(found, Tensor) else found


def _lora(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    o = call.options
    ranks = o.ranks or None
    return reference.lora_linear(x, weight, *_factors(call), o.scale, bias, ranks=ranks, dropout_mask=_mask(call, x))


def _dora(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert call.magnitude is not None
    o = call.options
    kind = "peft" if o.two_term else "branch"  # without a mask both forms agree, and this one has one frozen GEMM
    arguments = (x, weight, *_factors(call), call.magnitude, o.scale, bias)
    return reference.dora_linear(*arguments, dropout_mask=_mask(call, x), dropout=kind)


def _delora(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert call.lam is not None
    assert call.weight_norm is not None
    o, mask = call.options, _mask(call, x)
    start = [None if of is None else _cast(of, o.rank_dtype) for of in (call.frozen_A, call.frozen_B)]
    frozen: dict[str, Any] = {"frozen_A": start[0], "frozen_B": start[1], "frozen_lam": call.frozen_lam}
    arguments = (x, weight, *_factors(call), call.lam, call.weight_norm, bias)
    return reference.delora_linear(*arguments, **frozen, eps=o.eps, dropout_mask=mask)


def _factors(call: Call) -> tuple[Tensor, Tensor]:
    return _cast(call.A, call.options.rank_dtype), _cast(call.B, call.options.rank_dtype)


def _mixture(call: MoECall, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    o = call.options
    names = ("A", "B", "router", "frozen_A", "frozen_B")
    given = {name: value for name in names if (value := getattr(call, name)) is not None}
    y, stats = reference.moe_lora_linear_dense(
        x,
        weight,
        **{name: _cast(value, o.rank_dtype) for name, value in given.items()},
        gates=call.gates,
        top_k=None if call.router is None else o.top_k,
        renormalize=o.renormalize,
        scale=call.scale,
        bias=bias,
        token_mask=None if call.token_share is None else call.token_share > 0,
        residual=1.0 if call.residual is None else call.residual,
        magnitude=call.magnitude,
        dropout_mask=_mask(call, x),
    )
    return y, stats.fraction, stats.probability, stats.z


def _reflected(call: ReflectCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = accumulate_dtype(call.options.rank_dtype)
    names = ("u", "v", "u_out", "v_out")
    vectors = {name: _cast(value, dtype) for name in names if (value := getattr(call, name)) is not None}
    blocks = "official" if call.options.by_row_groups else "paper"
    y: Tensor = getattr(reference, call.options.method)(x, weight, bias=bias, blocks=blocks, **vectors)
    return y


def _grouped(call: GroupedCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every expert on every row: a program holds no loop over offsets that it can't see."""
    o = call.options
    x = x if call.rows is None else x.index_select(0, call.rows)
    A, B = (None if of is None else _cast(of, o.rank_dtype) for of in (call.A, call.B))
    if A is None or B is None:
        A, B = x.new_zeros(len(weight), 1, x.shape[1]), x.new_zeros(*weight.shape[:2], 1)
    rest: dict[str, Any] = {"scale": o.scale, "bias": bias, "dropout_mask": _mask(call, x)}
    if call.magnitude is not None:
        return reference.grouped_dora_linear_dense(x, weight, A, B, call.magnitude, call.offsets, **rest)
    return reference.grouped_lora_linear_dense(x, weight, A, B, call.offsets, **rest)


def _mixed(call: MixedCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Add the term of each segment to its rows; the rest are the frozen linear's alone."""
    o, tokens = call.options, x.flatten(0, -2)
    y = tokens @ weight.T if bias is None else tokens @ weight.T + bias
    order = torch.arange(tokens.shape[0], device=x.device) if call.order is None else call.order
    A = _cast(call.A, o.rank_dtype).split(o.ranks)
    B = _cast(call.B, o.rank_dtype).split([len(weight) * r for r in o.ranks])
    for i, rows in zip(o.adapters, order.split(o.lengths), strict=True):
        if i is not None:
            term = o.scales[i] * (_cast(tokens[rows], o.rank_dtype) @ A[i].T) @ B[i].view(-1, o.ranks[i]).T
            y = y.index_add(0, rows, _cast(term, y.dtype))
    return y


def _mask(call: Call | MoECall | GroupedCall, x: Tensor) -> Tensor | None:
    """Draw a mask of 0 and 1 / (1 − p): [T, K], or several [masks, T, K]; None: nothing drops.

    In a mixture what has p = 0 sees x itself, and has no mask.
    """
    drawn = [p for p in call.options.dropout_p if p > 0 or not isinstance(call, MoECall)]
    if not any(drawn):
        return None
    ones = torch.ones_like(x, dtype=call.options.rank_dtype)
    masks = [dropout(ones, p) for p in drawn]
    return masks[0] if len(masks) == 1 else torch.stack(masks)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tensor.to(dtype), which would be written into the program where it does nothing,
    too.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


FORMULAS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "lora_linear": _lora,
    "dora_linear": _dora,
    "delora_linear": _delora,
    "moe_lora_linear": _mixture,
    "ether_linear": _reflected,
    "ether_plus_linear": _reflected,
    "grouped_lora_linear": _grouped,
    "grouped_dora_linear": _grouped,
    "lora_linear_by_sample": _mixed,
    "grouped_delora_linear": _grouped,  # whose factors are normalised in the call
}
"""Public function name → what it computes of (call, x, weight, bias), the three in the compute
dtype.
"""
