"""The token-sized ops of `ops.py` as a library GEMM and passes beside it, for any backend that has
kernels for these.

`Stages` is given the launchers, and has forms (b) and (d) of docs/kernels.md: (b) the GEMM, then
one pass over its output, in place; (d) a pass that writes the rank-R term, to which the GEMM then
adds (beta = 1); for dx `token_sums` writes it on its way, where it can. What a backend has besides,
its own stages.py puts around them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels.backends.dropout import MaskGroup, mask_groups
from delora_kernels.op_arguments import Branch, Frozen, Masks, RankTerm, Rescaled, Rescaling, TermGradients


class DyParts(NamedTuple):
    """What reads of dy left, float32: dv [Q, T, R], scale · dyᵀ h [P, N, R], Σ_t dy and Σ_t dy ⊙ y
    [P, N] each.

    None where not asked for; `dv` is None too where it is finished already.
    """

    dv: Tensor | None
    product: Tensor | None
    sums: Tensor | None
    dots: Tensor | None


class WrittenTerm(NamedTuple):
    """The rank-R term of dx for `token_sums` to write on its way: out [T, C], from small [R, C] of
    any strides.
    """

    small: Tensor
    out: Tensor


class TokenSums(Protocol):
    """What one pass over x sums up over tokens, in parts."""

    def __call__(
        self,
        x: Tensor,
        h: Tensor | None,
        factor: float = 1.0,
        *,
        sums: bool = False,
        y: Tensor | None = None,
        group: MaskGroup | None = None,
        transposed: bool = False,
        ranks: int | None = None,
        term: WrittenTerm | None = None,
    ) -> DyParts:
        """product [P, C, R] = factor · drop(x)ᵀ h, sums [P, C] = Σ_t x, dots [P, C] = Σ_t x ⊙ y.

        Args:
            x: [T, C].
            h: [T, R], or None: no product.
            factor: Of the product and of the term.
            sums: Whether Σ_t x is wanted.
            y: [T, C]: Σ_t x ⊙ y is wanted; or None.
            group: Mask of the product's x and of the term, or None.
            transposed: Whether the product is laid out as hᵀ x, [P, R, C].
            ranks: How many of h's columns the product has; None: all.
            term: Where factor · h small goes, or None.
        """
        ...


@lru_cache(64)
def nothing(device: torch.device, dtype: torch.dtype, place: int = 0) -> Tensor:
    """Return the tensor of size 0 that stands for a result that nobody asked for, made once for
    each place among an op's results.
    """
    with torch.inference_mode(False):
        return torch.empty(0, dtype=dtype, device=device)


def sum_of(parts: Tensor | None, like: Tensor) -> Tensor:
    """Where a kernel writes the sum of parts: a tensor of its own, or the one part itself; no
    parts: an empty one.
    """
    if parts is None:
        return like.new_empty(0)
    return parts.squeeze(0) if parts.shape[0] == 1 else parts.new_empty(parts.shape[1:])


@dataclass(frozen=True)
class Stages:
    """The ops over the launchers of a backend, which say themselves what more they ask of dtypes
    and strides.

    Args:
        times_small: (x [T, C], small [C, R], dtype, group, column) → x small [T, R] in `dtype`;
            with a `MaskGroup`, elements of x are dropped by its mask; with a column [C], float32,
            it is x (column ⊙ small), whose factor is not rounded.
        times_small_parts: (x, small, dtype, groups) → the same in parts, [P, T, R] in float32, or
            [1, T, R] in `dtype`; `groups`, the masks of x for each of R's columns, divide these, or
            None.
        token_sums: What one pass over x [T, C] sums up over tokens, as `DyParts`: see `TokenSums`.
        takes_term: Whether token_sums can write the rank-R term for (x, h, small, group).
        takes_dy_sums: Whether dy_sums takes (dy, small, h, c).
        dy_sums: (dy, small, h, factor, sums, y, c) → dv = dy (c ⊙ small), factor · dyᵀ h, Σ_t dy,
            Σ_t dy ⊙ y.
        finish_dy: (parts, out, column, B_hat, divisor): writes to `out` what `finished` promises.
        add_parts: (parts [P, ...], dtype) → their sum in `dtype`, in their order.
        rank_update: Writes c ⊙ (base + scale · h small) + extra + bias to `out`, and returns it.
        scale_matrix: (matrix, factor, by_row) → the matrix scaled by rows or columns.
        drop: (x, dropout_p, seed) → drop(x) and x − drop(x).
    """

    times_small: Callable[..., Tensor]
    times_small_parts: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    token_sums: TokenSums
    takes_term: Callable[[Tensor, Tensor, Tensor, MaskGroup], bool]
    takes_dy_sums: Callable[[Tensor, Tensor, Tensor, Tensor | None], bool]
    dy_sums: Callable[..., DyParts]
    finish_dy: Callable[[DyParts, DyParts, Tensor | None, Tensor | None, Tensor | None], None]
    add_parts: Callable[[Tensor, torch.dtype], Tensor]
    rank_update: Callable[..., Tensor]
    scale_matrix: Callable[..., Tensor]
    drop: Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor]]

    def project(self, x: Tensor, A_hat: Tensor, masks: Masks) -> Tensor:
        """drop(x) Âᵀ; x is read once for each mask."""
        groups = mask_groups(A_hat.shape[0], masks)
        if len(groups) == 1:
            return self.times_small(x, A_hat.t(), A_hat.dtype, groups[0])
        parts = [self.times_small(x, A_hat[group.columns].t(), A_hat.dtype, group) for group in groups]
        return torch.cat(parts, dim=1)

    def expand(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        term: RankTerm,
        rescaling: Rescaling,
        prefill: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """y in form (d) if `prefill`; in (b) if not, or where x Wᵀ is kept or dropout asks for two
        products.
        """
        (h, B_hat, scale), (c, scaled, keep, dropout_p, seed) = term, rescaling
        unkept, extra = nothing(x.device, x.dtype), None
        if prefill and seed is None and not keep and (c is None or scaled is not None):
            y = x.new_empty((x.shape[0], weight.shape[0]))
            self.rank_update(None, h, B_hat.t(), scale, y, column=c, bias=bias)
            return y.addmm_(x, (weight if scaled is None else scaled).t()), unkept
        if seed is None:
            base = linear(x, weight)
        else:
            dropped, rest = self.drop(x, dropout_p, seed)
            base, extra = linear(dropped, weight), linear(rest, weight)
        out = torch.empty_like(base) if keep else base
        y = self.rank_update(base, h, B_hat.t(), scale, out, column=c, extra=extra, bias=bias)
        return y, (base if keep else unkept)

    def expand_backward(
        self, dy: Tensor, term: TermGradients, rescaled: Rescaled, need_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One read of dy where `dy_sums` takes it, else one for dv and one for the sums; c ⊙ B̂ in
        float32.
        """
        (h, B_hat, scale), (c, kept, kept_is_y, divisor) = term, rescaled
        dv, dtype = None, torch.float32 if B_hat is None else B_hat.dtype
        if B_hat is not None and h is not None and self.takes_dy_sums(dy, B_hat, h, c):
            parts = self.dy_sums(dy, B_hat, h, scale, need_bias, kept, c)
        else:
            dv = None if B_hat is None else self.times_small(dy, B_hat, dtype, None, c)
            empty = h is None and kept is None and not need_bias
            parts = DyParts(None, None, None, None) if empty else self.token_sums(dy, h, scale, sums=need_bias, y=kept)
        sums = self.finished(parts, dtype, c, None if kept_is_y or kept is None else B_hat, divisor)
        dv = sums.dv if dv is None else dv
        (_, dB_hat, dy_sum, dm), device, wide = sums, dy.device, torch.float32
        return (
            nothing(device, dy.dtype) if dv is None else dv,
            nothing(device, wide, 1) if dB_hat is None else dB_hat,
            nothing(device, wide, 2) if dm is None else dm,
            nothing(device, wide, 3) if dy_sum is None else dy_sum,
        )

    def finished(
        self,
        parts: DyParts,
        dtype: torch.dtype,
        column: Tensor | None = None,
        B_hat: Tensor | None = None,
        divisor: Tensor | None = None,
    ) -> DyParts:
        """dv in `dtype`, c ⊙ product, Σ_t dy and (dots + Σ_r product ⊙ B̂) / divisor, in one launch
        or none.

        Args:
            parts: What to add up.
            dtype: Of dv.
            column: c [N] float32, or None for 1.
            B_hat: [N, R] where the dots lack the rank-R term of u, else None.
            divisor: [N]; the quotient is 0 where it is 0. Needed with dots.
        """
        dv, product, sums, dots = parts
        if dv is None and dots is None and (column is None or product is None or product.shape[2] == 0):
            if all(found is None or found.shape[0] == 1 for found in (product, sums)):
                return DyParts(None, *(None if found is None else found.squeeze(0) for found in parts[1:]))
        out = DyParts(
            None if dv is None else dv.new_empty(dv.shape[1:], dtype=dtype),
            None if product is None else product.new_empty(product.shape[1:]),
            None if sums is None else sums.new_empty(sums.shape[1:]),
            None if dots is None else dots.new_empty(dots.shape[1:]),
        )
        self.finish_dy(parts, out, column, B_hat, divisor)
        return out

    def read_for_gating(self, dy: Tensor, v: Tensor | None, B_hat: Tensor, need_bias: bool) -> DyParts:
        """Return what a mixture's backward needs of dy, all in parts: one read of it where
        `dy_sums` takes it, else two.
        """
        if v is not None and self.takes_dy_sums(dy, B_hat, v, None):
            return self.dy_sums(dy, B_hat, v, 1.0, need_bias, None)
        empty = v is None and not need_bias
        parts = DyParts(None, None, None, None) if empty else self.token_sums(dy, v, sums=need_bias)
        return parts._replace(dv=self.times_small_parts(dy, B_hat, B_hat.dtype))

    def input_backward(
        self, dy: Tensor, frozen: Frozen, branch: Branch, masks: Masks, prefill: bool = True
    ) -> tuple[Tensor, Tensor]:
        """dÂ from one read of x for each mask; dx in form (d) if `prefill`, else in (b)."""
        (weight, c, two_term), (dv, A_hat, x, _, _) = frozen, branch
        groups, term = mask_groups(dv.shape[1], masks), None
        if weight is None or A_hat is None:
            return nothing(dy.device, dy.dtype), self.factor_grad(branch, groups)
        if two_term and c is not None and groups[0].seed is not None:
            dx = self._two_term_dx(dy, weight, c, branch, groups[0])
            return dx, self.factor_grad(branch, groups)
        if prefill and x is not None and len(groups) == 1 and self.takes_term(x, dv, A_hat, groups[0]):
            term = WrittenTerm(A_hat, dy.new_empty((dy.shape[0], weight.shape[1])))
        dA_hat = self.factor_grad(branch, groups, term)
        dy, weight = self.scaled_operands(dy, weight, c)
        if term is not None:
            return term.out.addmm_(dy, weight), dA_hat
        return self._input_grad(dy, weight, branch, groups, prefill), dA_hat

    def factor_grad(self, branch: Branch, groups: list[MaskGroup], term: WrittenTerm | None = None) -> Tensor:
        """dÂ [r, K], float32, and from all of dv's columns the term, which asks for one group."""
        dv, _, x, r, scale = branch
        if x is None:
            return nothing(dv.device, torch.float32, 1)
        if len(groups) == 1 and r > 0:
            h = dv if r == dv.shape[1] or term is not None else dv[:, :r]
            done = self.token_sums(x, h, scale, group=groups[0], transposed=True, ranks=r, term=term)
            assert done.product is not None
            return self.add_parts(done.product, torch.float32)
        sums = []
        for group in groups:
            first, last = group.columns.start, min(group.columns.stop, r)
            if first < last:
                h = dv[:, first:last] if term is None else dv
                done = self.token_sums(x, h, scale, group=group, transposed=True, ranks=last - first, term=term)
                sums.append(done.product)
        found = [self.add_parts(product, torch.float32) for product in sums if product is not None]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _input_grad(self, dy: Tensor, weight: Tensor, branch: Branch, groups: list[MaskGroup], prefill: bool) -> Tensor:
        """dx of scaled operands, the rank-R term in a pass of its own for each mask."""
        dv, A_hat, _, _, scale = branch
        assert A_hat is not None
        dx = dy.new_empty((dy.shape[0], weight.shape[1])) if prefill else torch.mm(dy, weight)
        base = None if prefill else dx
        for group in groups:
            term, small = dv[:, group.columns], A_hat[group.columns]
            base = self.rank_update(base, term, small, scale / (1 - group.dropout_p), dx, group=group)
        return dx.addmm_(dy, weight) if prefill else dx

    def scaled_operands(self, dy: Tensor, weight: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """dy and W with c on the smaller of them: the one transient."""
        if c is None:
            return dy, weight
        if dy.shape[0] <= weight.shape[1]:
            return self.scale_matrix(dy, c, by_row=False), weight
        return dy, self.scale_matrix(weight, c, by_row=True)

    def _two_term_dx(self, dy: Tensor, weight: Tensor, c: Tensor, branch: Branch, group: MaskGroup) -> Tensor:
        """dy W + drop((dy ⊙ (c − 1)) W + scale · dv Â)."""
        dv, A_hat, _, _, scale = branch
        inverse = 1 / (1 - group.dropout_p)
        dropped = torch.mm(*self.scaled_operands(dy, weight, (c - 1) * inverse)).contiguous()
        extra = torch.mm(dy, weight)
        return self.rank_update(
            dropped, dv, A_hat, scale * inverse, dropped, extra=extra, group=group, mask_base=True
        )  # fmt: skip
