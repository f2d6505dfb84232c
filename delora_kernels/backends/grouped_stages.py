"""The ops of an expert model's linears as a grouped GEMM of the library's and passes beside it, for
any backend that has kernels for these.

    h_e = scale · x_e Â_eᵀ;  y_e = x_e W_eᵀ, then in place + h_e B̂_eᵀ + bias_e
    dv_e = scale · dy_e B̂_e;  dÂ_e = dv_eᵀ x_e;  dB̂_e = dy_eᵀ h_e;  dx_e = dy_e W_e, then + dv_e Â_e

Forward reads x once more than the frozen linears do, and y, which it writes again; backward reads
dy twice, x once, and dx, which it writes again.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from delora_kernels.backends import eager
from delora_kernels.backends.dropout import MaskGroup
from delora_kernels.backends.eager.grouped import grouped_gemm
from delora_kernels.dtypes import accumulate_dtype


@dataclass(frozen=True)
class GroupedStages:
    """The ops over the launchers of a backend.

    Args:
        times_small: (x [T, C], small [E, C, R], offsets, factor, dtype, group) → factor · drop(x_e)
            small_e [T, R] in `dtype`, 0 in rows that are nobody's; `group`, here and below, is the
            mask or None.
        update: (out [T, C], h [T, R], small [E, R, C], offsets, bias [E, C] or None, group): out_e
            += drop(h_e small_e) + bias_e in place; rows that are nobody's become 0, whatever they
            hold.
        sums: (x [T, C], h [T, R] or None, offsets, sums, group) → h_eᵀ drop(x_e) [E, R, C] or None,
            and if `sums` Σ_t x_e [E, C], float32; 0 for experts without rows.
    """

    times_small: Callable[..., Tensor]
    update: Callable[..., None]
    sums: Callable[..., tuple[Tensor | None, Tensor | None]]

    def grouped_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        A_hat: Tensor | None,
        B_hat: Tensor | None,
        scale: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute y and h: the thin product first, while nothing of W has pushed x out of cache."""
        offsets = offsets.contiguous()
        if A_hat is None or B_hat is None:
            return eager.grouped_linear(x, weight, bias, offsets, A_hat, B_hat, scale)
        h = self.times_small(x, A_hat.mT, offsets, scale, A_hat.dtype, _group(A_hat.shape[1], dropout_p, seed))
        y = grouped_gemm(x, weight.mT, offsets)
        self.update(y, h, B_hat.mT, offsets, bias)
        return y, h

    def grouped_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        weight: Tensor | None,
        offsets: Tensor,
        A_hat: Tensor | None,
        B_hat: Tensor | None,
        scale: float,
        need_bias: bool,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute dv, then what comes of it; dB̂ and the sums of dy from one read of dy."""
        offsets = offsets.contiguous()
        wide, dv = accumulate_dtype(dy.dtype), None
        group = _group(0 if B_hat is None else B_hat.shape[2], dropout_p, seed)
        dx, dA, dBt, dbias = dy.new_empty(0), *(dy.new_empty(size, dtype=wide) for size in (0, 0, (0, dy.shape[1])))
        if B_hat is not None and (x is not None or A_hat is not None):
            dv = self.times_small(dy, B_hat, offsets, scale, B_hat.dtype)
        if h is not None or need_bias:
            product, summed = self.sums(dy, h, offsets, need_bias)
            dBt, dbias = dBt if product is None else product.mT, dbias if summed is None else summed
        if dv is not None and x is not None:
            product, _ = self.sums(x, dv, offsets, False, group)
            dA = dA if product is None else product
        if weight is not None and dv is not None and A_hat is not None:
            dx = grouped_gemm(dy, weight, offsets)
            self.update(dx, dv, A_hat, offsets, None, group)
        elif weight is not None:
            dx = eager.grouped_backward(dy, None, None, weight, offsets, None, None, scale, False)[0]
        return dx, dA, dBt, dbias


def _group(R: int, dropout_p: float, seed: Tensor | None) -> MaskGroup | None:
    return None if seed is None else MaskGroup(slice(0, R), dropout_p, seed)
