"""DistributedDataParallel over mixtures: a rank's balance loss is that of its own tokens; their
mean is trained.
"""

from typing import Any

import torch
from golden_cases import relative_error
from nn_mixtures import KINDS, Stack, expected_loss, leaves_of, loss_of
from torch.nn.parallel import DistributedDataParallel

from delora_kernels.nn import set_loss_scale
from distributed.passes import gradients

ONE_EXPERT = f"layers.{len(KINDS)}.router"
"""Its gradient is zero."""


def train(rank: int, seed: int, reentrant: bool | None, options: dict[str, Any]) -> None:
    """One pass, then two that are accumulated: the gradients are those of one process that averages
    over the parts.
    """
    torch.manual_seed(seed)
    stack = Stack(reentrant)
    x = torch.randn(12, 16, dtype=torch.float64)
    leaves = leaves_of(stack)
    wrapped = DistributedDataParallel(stack, **options)
    for parts in (2,) if options.get("static_graph") else (2, 4):  # accumulating is another graph
        chunks = x.chunk(parts)
        loss = sum(expected_loss(stack, leaves, chunk) for chunk in chunks) / parts
        want = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        share = 2 / parts
        set_loss_scale(wrapped, share)
        wrapped.zero_grad()
        mine = [chunk.clone().requires_grad_() for chunk in chunks[rank * parts // 2 : (rank + 1) * parts // 2]]
        for chunk in mine[:-1]:
            with wrapped.no_sync():
                (loss_of(wrapped(chunk)) * share).backward()
        (loss_of(wrapped(mine[-1])) * share).backward()
        found = gradients(wrapped)
        assert not found.pop(ONE_EXPERT).any()
        assert not want.pop(ONE_EXPERT).any()  # a softmax of one
        for name, grad in want.items():
            assert relative_error(found[name], grad) <= 1e-10, (
                name
            )  # a mistake is larger than 1e-3, rounding than 1e-14
