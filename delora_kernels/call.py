"""One call as data: what functional/ makes of arguments, backends judge and autograd/ runs."""

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """Everything about a call that is not a tensor.

    Args:
        method: Name of the public function, for messages.
        scale: Factor of the rank-R term (LoRA's s); 1 for DeLoRA.
        eps: Lower clamp of DeLoRA's norms; 0 for none.
        ranks: Widths of the adapters stacked in A and B, each with a dropout mask of its own; ()
            for one.
        dropout_p: For each mask, the probability of dropping an element of the low-rank branch's
            input, in [0, 1).
        two_term: PEFT's DoRA with dropout: the column scale acts on a frozen GEMM of the dropped
            input.
        save_output: DoRA keeps its output for backward in place of a private tensor.
        frozen_rank: Rank of DeLoRA's frozen start; 0: there is none.
        compute_dtype: Dtype of x, W and y inside the call; autocast's dtype under autocast.
        rank_dtype: Dtype of Â, B̂ and every [T, R] tensor: the wider of compute_dtype and the
            factors' dtype.
    """

    method: str
    scale: float
    eps: float
    ranks: tuple[int, ...]
    dropout_p: tuple[float, ...]
    two_term: bool
    save_output: bool
    frozen_rank: int
    compute_dtype: torch.dtype
    rank_dtype: torch.dtype


class Call(NamedTuple):
    """The tensors of one call (the autograd Function's inputs, in this order) and its options.

    Args:
        x: [..., K], any float dtype; cast to compute_dtype as nn.Linear would under autocast.
        weight: [N, K], the frozen weight; any strides. Or a stored base (bases/stored.py).
        bias: [N] or None.
        A, B: [r, K], [N, r], the trainable factors.
        magnitude: [N] for DoRA, else None.
        lam: 0-d or [1] for DeLoRA, else None.
        weight_norm: [K] or 0-d for DeLoRA, else None; a constant.
        frozen_A, frozen_B, frozen_lam: DeLoRA's frozen start, constants; frozen_lam None: scaled by
            the live lam.
        seed: int64 on x's device if an element may drop, 0-d or one for each of ranks, else None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    lam: Tensor | None
    weight_norm: Tensor | None
    frozen_A: Tensor | None
    frozen_B: Tensor | None
    frozen_lam: Tensor | None
    seed: Tensor | None
    options: Options


class MoEOptions(NamedTuple):
    """Everything about a mixture's call that is not a tensor.

    Args:
        method: Name of the public function, for messages.
        top_k: Experts a router keeps for a token; all of them where it is dense or the gates are
            given.
        renormalize: Whether the kept probabilities are divided by their sum.
        ranks: Widths of the blocks of [A; router; frozen A] with a dropout mask of their own; ()
            for no dropout.
        dropout_p: For each of `ranks`, the probability of dropping an element of its input; 0 where
            all see x itself.
        compute_dtype, rank_dtype: as in `Options`.
    """

    method: str
    top_k: int
    renormalize: bool
    ranks: tuple[int, ...]
    dropout_p: tuple[float, ...]
    compute_dtype: torch.dtype
    rank_dtype: torch.dtype


class MoECall(NamedTuple):
    """The tensors of one mixture's call (its autograd Function's inputs, in this order) and its
    options.

    Args:
        x, weight, bias: as in `Call`.
        A: [E, r, K], or [r, K] for one that all experts share.
        B: [E, N, r].
        router: [E, K], or None where the gates are given.
        gates: [T, E] in float32 or float64, or None.
        magnitude: [N] for DoRA over the mixture, else None.
        scale: [E] in float32 or float64, each expert's factor.
        frozen_A, frozen_B, residual: the subtracted pairs, [J, r₀, K], [J, N, r₀], constants, and
            their factors [J].
        token_share: [T] in float32 or float64: the weight of each token in the statistics; None:
            all count alike.
        balance_coef, z_coef: 0-d: the part of each loss whose gradient backward adds of itself, or
            None.
        seed: int64 [len(ranks)] on x's device if an element may drop, else None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    router: Tensor | None
    gates: Tensor | None
    magnitude: Tensor | None
    scale: Tensor
    frozen_A: Tensor | None
    frozen_B: Tensor | None
    residual: Tensor | None
    token_share: Tensor | None
    balance_coef: Tensor | None
    z_coef: Tensor | None
    seed: Tensor | None
    options: MoEOptions


class ReflectOptions(NamedTuple):
    """Everything about a reflected linear's call that is not a tensor.

    Args:
        method: Name of the public function, for messages.
        by_row_groups: u, v reflect row groups of W (blocks="official") in place of x's blocks.
        compute_dtype, rank_dtype: as in `Options`; the reflections are computed in rank_dtype or
            float32.
    """

    method: str
    by_row_groups: bool
    compute_dtype: torch.dtype
    rank_dtype: torch.dtype


class ReflectCall(NamedTuple):
    """The tensors of one reflected linear's call (its autograd Function's inputs, in this order)
    and its options.

    Args:
        x, weight, bias: as in `Call`; weight None: the reflected x itself.
        u, v: [blocks, K / blocks], the input side; u None: not reflected, v None: ETHER.
        u_out, v_out: [blocks, N / blocks], the output side; None likewise.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    u: Tensor | None
    v: Tensor | None
    u_out: Tensor | None
    v_out: Tensor | None
    options: ReflectOptions


class TermCall(NamedTuple):
    """The tensors of a rank term beside a base that has run already (its autograd Function's
    inputs, in this order), and its options.

    Args:
        x: [T, K], the base's input.
        y: [T, N], its output.
        A, B, seed: as in `Call`.
    """

    x: Tensor
    y: Tensor
    A: Tensor
    B: Tensor
    seed: Tensor | None
    options: Options


class GroupedOptions(NamedTuple):
    """Everything about a grouped linear's call that is not a tensor.

    Args:
        method: Name of the public function, for messages.
        scale: Factor of the rank-r term.
        dropout_p: Of the term's input, (p,).
        compute_dtype, rank_dtype: as in `Options`.
    """

    method: str
    scale: float
    dropout_p: tuple[float, ...]
    compute_dtype: torch.dtype
    rank_dtype: torch.dtype


class GroupedCall(NamedTuple):
    """The tensors of a call of an expert model's linears (its autograd Function's inputs, in this
    order) and its options.

    Args:
        x: [T, K], sorted by expert; or the tokens [t, K] that `rows` takes the T rows from.
        weight: [E, N, K], any strides.
        bias: [E, N] or None.
        A, B: [E, r, K], [E, N, r]; both None: the linears alone.
        magnitude: [E, N] for DoRA, else None.
        offsets: int32 or int64 [E], the end of each expert's rows.
        rows: int64 [T], the token of each row; None: x is sorted already.
        places: int64 [t, k], where each token's rows stand: the inverse of `rows`.
        seed: int64, 0-d, on x's device if an element may drop, else None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    magnitude: Tensor | None
    offsets: Tensor
    rows: Tensor | None
    places: Tensor | None
    seed: Tensor | None
    options: GroupedOptions


class MixedOptions(NamedTuple):
    """Everything about a mixed batch's call that is not a tensor.

    Args:
        method: Name of the public function, for messages.
        lengths: Rows of each segment, which stand one behind the other.
        adapters: For each segment the place of its adapter in `ranks`, or None: it has none; an
            adapter may have several segments, and has one.
        ranks: Of the adapters.
        scales: Factor of each.
        compute_dtype, rank_dtype: as in `Options`.
    """

    method: str
    lengths: tuple[int, ...]
    adapters: tuple[int | None, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    compute_dtype: torch.dtype
    rank_dtype: torch.dtype


class MixedCall(NamedTuple):
    """The tensors of a call whose samples have adapters of their own (its autograd Function's
    inputs, in this order) and its options.

    Args:
        x, weight, bias: as in `Call`.
        A: [R, K], the adapters' stacked, of those that some sample has.
        B: [N · R], theirs one behind the other, each contiguous.
        order: int64 [T'], the rows of x that the segments count; None: all rows, as they stand.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    order: Tensor | None
    options: MixedOptions


AnyCall = Call | MoECall | ReflectCall | GroupedCall
