"""GOAT's layer as its authors run it: a Python loop over experts that gathers and scatters tokens.

The rival `goat-eager` of the benchmarks, written from a description of Facico/GOAT-PEFT's
`goat/peta/src/goat/layer.py` (commit ef4d21a): a copy of x in the adapters' dtype, a whole pass of
the first expert for a buffer's shape, then for each expert the tokens that chose it, found by
`torch.where`, through a dropout of its own.

What it costs is memory traffic: at T=1024, K=N=2048, E=8, k=2, r=4 in float32, forward and backward
move 1.3 GB (1.6 with dropout) beside the frozen GEMMs' 17.2 GFLOP; its own products are 0.3.
Whatever takes its place is therefore at most 1 + (1.3 GB / bandwidth) / (17.2 GFLOP / GEMM rate)
times faster: three times only where the device computes 26 times as many FLOP as it moves bytes, as
GPUs and bfloat16 units do, and float32 on a CPU does not.
"""

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear


def goat_loop(
    x: Tensor,
    weight: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    router: Tensor,
    top_k: int,
    scale: float,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """y and the balance loss in the code's convention.

    Args:
        x: `[T, K]`.
        weight: `[N, K]`, frozen; GOAT's has its start taken off.
        A: E tensors `[r, K]`.
        B: E tensors `[N, r]`.
        router: `[E, K]`.
        top_k: Experts a token chooses.
        scale: Of every expert.
        dropout_p: Of every expert's input; the authors' trainers have 0.05.
    """

    def expert(e: int, tokens: Tensor) -> Tensor:
        return linear(linear(dropout(tokens, dropout_p) if dropout_p else tokens, A[e]), B[e]) * scale

    y = linear(x, weight)
    tokens = x.to(A[0].dtype)
    probabilities = linear(tokens, router).float().softmax(1)
    weights, chosen = probabilities.topk(top_k, dim=1)
    weights = weights / weights.sum(1, keepdim=True)
    update = torch.zeros_like(expert(0, tokens))
    for e in range(len(A)):
        rows, slot = torch.where(chosen == e)
        update[rows] += weights[rows, slot, None] * expert(e, tokens[rows])
    y += update
    counts = torch.bincount(chosen.flatten(), minlength=len(A))
    return y, len(A) * (counts / len(x) * probabilities.mean(0)).sum()
