"""A checked call in plain torch, for a program that is exported: the reference's formula, in the
call's own dtypes.

Such a program holds no op of this library and runs where the library is not; autograd
differentiates it. Dropout is torch's own, so its masks come from torch's generator. The frozen GEMM
runs in the compute dtype, the low-rank branch in the rank dtype; norms, reflections and gates take
part in float32 or wider where the fused ops do so too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout

from delora_kernels import reference
from delora_kernels.call import AnyCall, Call, MoECall, ReflectCall
from delora_kernels.dtypes import accumulate_dtype


def run(call: AnyCall, shape: Sequence[int]) -> tuple[Tensor, ...]:
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


def _outputs(call: AnyCall) -> tuple[Tensor, ...]:
    o = call.options
    x, weight = _cast(call.x, o.compute_dtype), _cast(call.weight, o.compute_dtype)
    bias = None if call.bias is None else _cast(call.bias, o.compute_dtype)
    if isinstance(call, MoECall):
        return _mixture(call, x, weight, bias)
    if isinstance(call, ReflectCall):
        return (_reflected(call, x, weight, bias),)
    return (_low_rank(call, x, weight, bias),)


def _low_rank(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    o = call.options
    A, B, mask = _cast(call.A, o.rank_dtype), _cast(call.B, o.rank_dtype), _masks(call, x, o.dropout_p)
    if call.lam is not None and call.weight_norm is not None:
        return reference.delora_linear(
            x,
            weight,
            A,
            B,
            call.lam,
            call.weight_norm,
            bias,
            frozen_A=None if call.frozen_A is None else _cast(call.frozen_A, o.rank_dtype),
            frozen_B=None if call.frozen_B is None else _cast(call.frozen_B, o.rank_dtype),
            frozen_lam=call.frozen_lam,
            eps=o.eps,
            dropout_mask=mask,
        )
    if call.magnitude is not None:
        kind = "peft" if o.two_term else "branch"  # without a mask both forms agree, and this one has one frozen GEMM
        arguments = (x, weight, A, B, call.magnitude, o.scale, bias)
        return reference.dora_linear(*arguments, dropout_mask=mask, dropout=kind)
    return reference.lora_linear(x, weight, A, B, o.scale, bias, ranks=o.ranks or None, dropout_mask=mask)


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
        dropout_mask=_masks(call, x, [p for p in o.dropout_p if p > 0]),  # the router sees x undropped
    )
    return y, stats.fraction, stats.probability, stats.z


def _reflected(call: ReflectCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = accumulate_dtype(call.options.rank_dtype)
    names = ("u", "v", "u_out", "v_out")
    vectors = {name: _cast(value, dtype) for name in names if (value := getattr(call, name)) is not None}
    blocks = "official" if call.options.by_row_groups else "paper"
    y: Tensor = getattr(reference, call.options.method)(x, weight, bias=bias, blocks=blocks, **vectors)
    return y


def _masks(call: Call | MoECall, x: Tensor, p: Sequence[float]) -> Tensor | None:
    """Draw masks of 0 and 1 / (1 − p): [T, K], of several probabilities [len(p), T, K]; None:
    nothing drops.
    """
    if not any(p):
        return None
    ones = torch.ones_like(x, dtype=call.options.rank_dtype)
    masks = [dropout(ones, each) for each in p]
    return masks[0] if len(masks) == 1 else torch.stack(masks)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tensor.to(dtype), which would be written into the program where it does nothing,
    too.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
