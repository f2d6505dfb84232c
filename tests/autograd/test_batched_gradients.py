"""Many gradients at once (`vectorize=True`, `is_grads_batched=True`) are those taken one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from delora_kernels import functional as F

T, K, N, r, E = 3, 8, 12, 2, 4


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def calls() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    x, W, A, B, b = drawn(T, K), drawn(N, K), drawn(r, K), drawn(N, r), drawn(N)
    AE, BE, G, gates = drawn(E, r, K), drawn(E, N, r), drawn(E, K), drawn(T, E)
    u, v, uo, vo = drawn(2, K // 2), drawn(2, K // 2), drawn(2, N // 2), drawn(2, N // 2)
    A0, B0 = AE.clone(), BE.clone()  # constants
    m, lam, n = drawn(N), drawn(1).abs(), drawn(K).abs()

    def mixture(x: Tensor, A: Tensor, B: Tensor, G: Tensor, s: Tensor, b: Tensor) -> Any:
        y, stats = F.moe_lora_linear(x, W, A, B, G, top_k=2, scale=s, bias=b, frozen_A=A0, frozen_B=B0, residual=0.3)
        return y.sum(1) + stats.balance_loss() + stats.z

    return {
        "lora": (lambda x, A, B, b: F.lora_linear(x, W, A, B, 0.5, b), [x, A, B, b]),
        "dora": (lambda x, A, B, m: F.dora_linear(x, W, A, B, m), [x, A, B, m]),
        "delora": (lambda x, A, B, lam: F.delora_linear(x, W, A, B, lam, n), [x, A, B, lam]),
        "mixture": (mixture, [x, AE, BE, G, drawn(E), b]),
        "shared A": (lambda x, A, B, G: F.moe_lora_linear(x, W, A, B, G)[0], [x, A, BE, G]),
        "given gates": (lambda x, A, B, g: F.moe_lora_linear(x, W, A, B, gates=g)[0], [x, AE, BE, gates]),
        "ether": (lambda x, u, b: F.ether_linear(x, W, u, b), [x, u, b]),
        "ether, both": (lambda x, u, uo: F.ether_linear(x, W, u, u_out=uo), [x, u, uo]),
        "ether+": (lambda x, *s: F.ether_plus_linear(x, W, s[0], s[1], b, u_out=s[2], v_out=s[3]), [x, u, v, uo, vo]),
        "official": (lambda x, u: F.ether_linear(x, W, u, blocks="official"), [x, u]),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_batched_gradients(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    function, inputs = calls()[name]
    leaves = tuple(value.requires_grad_() for value in inputs)
    y = function(*leaves)
    douts = torch.randn(5, *y.shape, dtype=torch.float64)
    batched = torch.autograd.grad(y, leaves, douts, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(douts):
        alone = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for found, expected in zip(batched, alone, strict=True):
            torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-13 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("name", ["lora", "mixture", "ether+"])
def test_jacobian(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    function, inputs = calls()[name]
    fast, slow = (
        torch.autograd.functional.jacobian(function, tuple(inputs), vectorize=vectorize) for vectorize in (True, False)
    )
    for found, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(expected.abs().max() + 1))
