"""DeLoRA linears of one x, whose factors are folded side by side: where a λ is 0, where norms are
below the clamp, beside LoRA and DoRA, and where clamps differ.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from delora_kernels import functional, reference
from delora_kernels.autograd import shared_input
from delora_kernels.functional.common import run_linears

K = 9
SIZES = ((7, 3), (5, 2), (11, 4))  # N, r


def _member(kind: str, N: int, r: int) -> tuple[str, dict[str, Any]]:
    """A function's name and its arguments but x; `kind` says what is out of the ordinary."""
    draw = {"dtype": torch.float64}
    made: dict[str, Any] = {"weight": torch.randn(N, K, **draw), "A": torch.randn(r, K, **draw)}
    made |= {"B": torch.randn(N, r, **draw), "bias": torch.randn(N, **draw) if r == 2 else None}
    if kind == "lora":
        made["scale"] = 1.7
    elif kind == "dora":
        made |= {"magnitude": torch.rand(N, **draw), "scale": 0.6}
    else:
        made |= {"lam": torch.rand(1, **draw) + 0.5, "weight_norm": torch.rand(K, **draw)}
        made["eps"] = 0.3 if kind == "another clamp" else 1e-4
    if kind == "zero":
        made["lam"].zero_()
    if kind == "clamped":
        made["A"][0] *= 1e-7
        made["B"][:, -1] *= 1e-7
    name = kind if kind in ("lora", "dora") else "delora"
    trained = ("A", "B", "magnitude", "lam")
    return f"{name}_linear", {key: v.requires_grad_() if key in trained else v for key, v in made.items()}


GROUPS = {
    "zero": ("delora", "zero", "delora"),
    "clamped": ("clamped", "delora", "clamped"),
    "beside others": ("lora", "clamped", "dora"),
    "other clamps": ("delora", "another clamp", "clamped"),
}


@pytest.mark.parametrize("outputs", [(0, 1, 2), (0, 2), (1,)], ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_of_the_formula(group: str, outputs: tuple[int, ...], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """y and every gradient in float64, through these outputs alone, against the formulas under
    autograd; of what no gradient comes back to, there is none.
    """
    torch.manual_seed(seed)
    straight: list[int] = []
    direct = shared_input.shared_direct
    monkeypatch.setattr(shared_input, "shared_direct", lambda calls: straight.append(len(calls)) or direct(calls))
    members = [_member(kind, *size) for kind, size in zip(GROUPS[group], SIZES, strict=True)]
    x = torch.randn(2, 6, K, dtype=torch.float64).requires_grad_()
    leaves = [x, *(v for _, made in members for v in made.values() if isinstance(v, Tensor) and v.requires_grad)]
    ours = run_linears([functional.CALLS[name](x, **made) for name, made in members], x.shape, None)
    theirs = [getattr(reference, name)(x, **made) for name, made in members]
    assert straight == ([] if group == "other clamps" else [3])
    grads = []
    for ys in (ours, theirs):
        total = sum((ys[i] * torch.linspace(-1, 1, ys[i].numel(), dtype=x.dtype).view_as(ys[i])).sum() for i in outputs)
        assert isinstance(total, Tensor)
        grads.append(torch.autograd.grad(total, leaves, allow_unused=True))
    for found, wanted in zip((*ours, *grads[0]), (*theirs, *grads[1]), strict=True):
        assert (found is None) is (wanted is None)
        if wanted is not None:
            assert found.shape == wanted.shape
            assert (found - wanted).abs().max() <= 1e-11 * wanted.abs().max()
