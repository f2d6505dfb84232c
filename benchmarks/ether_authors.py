"""ETHER's layer as its authors run it: reflections as matrices, a transformed weight, a full weight
gradient.

The rival `authors` of the benchmarks, written from a description of mwbini/ether's
`ether-instruct/lit_gpt/ether.py` (commit ddc1038): H of every block through an identity matrix, W'
= H_out (W H_in) by batched products over row groups (see blocks="official" in
delora_kernels.reference), then one linear. Dropout 0, as in our cases. Beside a narrower weight,
without autocast, H is made in the vectors' dtype and rounded to the weight's.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def reflections(u: Tensor, v: Tensor | None) -> Tensor:
    """H of every block, `[blocks, D, D]`, without a guard for vectors of length 0."""
    identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device).expand(u.shape[0], -1, -1)

    def projection(vectors: Tensor) -> Tensor:
        return torch.bmm(vectors[:, :, None], vectors[:, None, :]) / (vectors * vectors).sum(1)[:, None, None]

    return identity - 2 * projection(u) if v is None else identity - projection(u) + projection(v)


def ether_authors(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor | None = None,
    u_out: Tensor | None = None,
    v_out: Tensor | None = None,
) -> Tensor:
    """x W'ᵀ, with W' made anew.

    Args:
        x: `[T, K]`.
        weight: `[N, K]`, frozen.
        u, v: `[blocks, K / blocks]`; without v ETHER, with it ETHER+.
        u_out, v_out: `[blocks, N / blocks]`, of the output side, or None.
    """
    N, K = weight.shape
    n = len(u)
    adapted = torch.bmm(weight.reshape(n, N, K // n), reflections(u, v).to(weight.dtype)).reshape(N, K)
    if u_out is not None:
        n = len(u_out)
        adapted = torch.bmm(reflections(u_out, v_out).to(weight.dtype), adapted.reshape(n, N // n, K)).reshape(N, K)
    return linear(x, adapted)
