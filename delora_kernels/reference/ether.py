"""ETHER and ETHER+: a frozen linear whose input, output or both are reflected, block by block.

    W' = H_out W H_in,   H = blockdiag(H_1, ..., H_n)
    ETHER    H_i = I − 2 û_i û_iᵀ                 ‖H_i − I‖_F = 2
    ETHER+   H_i = I − û_i û_iᵀ + v̂_i v̂_iᵀ        ‖H_i − I‖_F ≤ √2

û = u / ‖u‖; a vector of length 0 has no direction: û = 0, and no gradient. Every H is symmetric.
Bini et al., "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections"
(arXiv:2405.20271). blocks="official" is what the authors' code computes for more than one input
block (mwbini/ether, `ether-instruct/lit_gpt/ether.py`): there row group i of W is multiplied by the
same H_i in every column block.
"""

import torch
from torch import Tensor


def ether_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    u_out: Tensor | None = None,
    blocks: str = "paper",
) -> Tensor:
    """Apply a frozen linear between reflections.

        y = H_out W H_in x + bias,   H_i = I − 2 û_i û_iᵀ

    Args:
        x: `[..., K]`, any float dtype, which all tensors share.
        weight: W, `[N, K]`, nn.Linear's layout.
        u: `[blocks, K / blocks]`, of the input side; None: not reflected.
        bias: `[N]` or None.
        u_out: `[blocks, N / blocks]`, of the output side; None: not reflected.
        blocks: "paper" or "official".

    Returns:
        y, `[..., N]`.

    Source: arXiv:2405.20271; the output side is flip_side in the authors' code.
    """
    return _linear(x, weight, (u, None), (u_out, None), bias, blocks)


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
    """Apply a frozen linear between relaxed reflections.

        y = H_out W H_in x + bias,   H_i = I − û_i û_iᵀ + v̂_i v̂_iᵀ

    Args:
        x, weight, bias, blocks: as in `ether_linear`.
        u, v: `[blocks, K / blocks]`, of the input side; None: left as it is.
        u_out, v_out: `[blocks, N / blocks]`, of the output side; None: left as it is.

    Returns:
        y, `[..., N]`.

    Source: arXiv:2405.20271, ETHER+.
    """
    return _linear(x, weight, (u, v), (u_out, v_out), bias, blocks)


def ether_weight(
    weight: Tensor, u: Tensor | None = None, *, u_out: Tensor | None = None, blocks: str = "paper"
) -> Tensor:
    """Return the matrix W' `[N, K]` that `ether_linear` applies; arguments as there."""
    return _weight(weight, (u, None), (u_out, None), blocks)


def ether_plus_weight(
    weight: Tensor,
    u: Tensor | None = None,
    v: Tensor | None = None,
    *,
    u_out: Tensor | None = None,
    v_out: Tensor | None = None,
    blocks: str = "paper",
) -> Tensor:
    """Return the matrix W' `[N, K]` that `ether_plus_linear` applies; arguments as there."""
    return _weight(weight, (u, v), (u_out, v_out), blocks)


def ether_qkv_linear(x: Tensor, weight: Tensor, u: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the authors' fused query-key-value layer: every slice of W's rows has output-side
    reflections of its own.

        W_s' = H_s W_s

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        u: `[S, blocks, rows of a slice / blocks]`.
        rows: int64, the row numbers of the S slices one after the other; the other rows stay as
            they are.
        bias: `[N]` or None.

    Returns:
        y, `[..., N]`.

    Source: mwbini/ether, `ETHERQKVLinear`.
    """
    slices = rows.view(u.shape[0], -1)
    reflected = [_weight(weight[own], (None, None), (u_s, None), "paper") for own, u_s in zip(slices, u, strict=True)]
    y = x @ weight.index_copy(0, rows, torch.cat(reflected)).T
    return y if bias is None else y + bias


Pair = tuple[Tensor | None, Tensor | None]


def unit(vectors: Tensor) -> Tensor:
    """Each row of `vectors` over its length; rows of length 0 stay 0 and get no gradient."""
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.masked_fill(length == 0, torch.inf)


def _linear(x: Tensor, weight: Tensor, into: Pair, out_of: Pair, bias: Tensor | None, blocks: str) -> Tensor:
    dtype = weight.dtype
    if blocks == "official":
        weight, into = _weight(weight, into, (None, None), blocks), (None, None)
    y = _reflect(_reflect(x, *into).to(dtype) @ weight.to(dtype).T, *out_of)
    return y if bias is None else y + bias


def _reflect(x: Tensor, u: Tensor | None, v: Tensor | None) -> Tensor:
    """x − 2 (x·û) û, or with v x − (x·û) û + (x·v̂) v̂, in every block of x's last dimension."""
    if u is None:
        return x
    by_block = x.unflatten(-1, u.shape)

    def along(vectors: Tensor) -> Tensor:
        direction = unit(vectors)
        return (by_block * direction).sum(-1, keepdim=True) * direction

    change = -2 * along(u) if v is None else along(v) - along(u)
    return (by_block + change).flatten(-2)


def _weight(weight: Tensor, into: Pair, out_of: Pair, blocks: str) -> Tensor:
    """H_out W H_in with every H a matrix."""
    if into[0] is not None:
        matrices = _matrices(*into)
        n, D, _ = matrices.shape
        if blocks == "official":  # W as a list of its N · n chunks, N of them for each H in turn
            chunks = weight.reshape(n, weight.shape[0], D)
            weight = torch.bmm(chunks.to(matrices.dtype), matrices).reshape(weight.shape)
        else:
            weight = weight @ torch.block_diag(*matrices)
    if out_of[0] is not None:
        weight = torch.block_diag(*_matrices(*out_of)) @ weight
    return weight


def _matrices(u: Tensor | None, v: Tensor | None) -> Tensor:
    """H_i of every block, `[blocks, D, D]`."""
    assert u is not None
    identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)

    def outer(vectors: Tensor) -> Tensor:
        direction = unit(vectors)
        return direction[:, :, None] * direction[:, None, :]

    return identity - 2 * outer(u) if v is None else identity - outer(u) + outer(v)
