"""The fused DeLoRA alone: PEFT's start, λ = 0, lengths that do nothing."""

import pytest
import torch
from fused_calls import assert_same, both, leaves_of
from golden_cases import relative_error
from reference_calls import Maker
from torch import Tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_b_of_delora(dtype: torch.dtype, seed: int) -> None:
    """PEFT's start: y is the frozen output, dA = 0 and dλ = 0 exactly, dB is the formula's, large
    and finite.
    """
    arguments = Maker(seed).arguments("delora_peft", T=9, K=16, N=12)
    arguments |= {"B": torch.zeros(12, 3, dtype=torch.float64), "bias": None}
    arguments = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    leaves, wide_leaves = leaves_of(arguments), leaves_of(wide)
    y = both("delora_peft", arguments, None)[0](**leaves)
    grads = dict(zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True))
    reference_y = both("delora_peft", wide, None)[1](**wide_leaves)
    dB = torch.autograd.grad(reference_y.sum(), wide_leaves["B"])[0]
    assert torch.equal(y, torch.nn.functional.linear(arguments["x"], arguments["weight"]))
    assert not grads["A"].any()
    assert not grads["lam"].any()
    assert all(grad.isfinite().all() for grad in grads.values())
    # h, dy, the sum over 9 tokens and the result are rounded: four times eps / 2, and as much again
    # for the worst case, all of it of the terms' sizes where the sum over tokens cancels; and the
    # sums over 16 columns and 9 tokens are rounded at each step in the dtype that they are kept in
    h = wide["x"] @ wide["A"].T
    sizes = (wide["x"].abs() @ wide["A"].abs().T).sum(0)
    factor = dB.abs().amax(0) / h.sum(0).abs()  # by which the sum over tokens is multiplied
    over_tokens, over_both = (float((factor * of).max() / dB.abs().max()) for of in (h.abs().sum(0), sizes))
    kept_in = torch.float64 if dtype == torch.float64 else torch.float32
    eps, eps_kept = torch.finfo(dtype).eps, torch.finfo(kept_in).eps
    assert relative_error(grads["B"].double(), dB) <= 4 * eps * over_tokens + (9 + 16) * eps_kept / 2 * over_both


def test_lambda_gradient_at_zero(seed: int) -> None:
    for variant in ("delora_peft", "delora_authors"):
        maker = Maker(seed)
        arguments = maker.arguments(variant)
        arguments["lam"] = torch.zeros(1, dtype=torch.float64)
        fused, specified = both(variant, arguments, None)
        assert_same(fused, specified, leaves_of(arguments), maker.tensor(5, 6))


def test_decoupling(seed: int) -> None:
    """eps = 0: the lengths of A's rows and B's columns do nothing, and no gradient points along
    them.
    """
    maker = Maker(seed)
    arguments = maker.arguments("delora_authors")
    leaves = leaves_of(arguments, ("A", "B"))
    fused, _ = both("delora_authors", arguments, None)
    y = fused(**leaves)
    scaled = {"A": arguments["A"] * maker.tensor(3, 1).abs(), "B": arguments["B"] * maker.tensor(3).abs()}
    assert relative_error(fused(**scaled), y.detach()) <= 1e-14
    dA, dB = torch.autograd.grad(y, list(leaves.values()), maker.tensor(5, 6))
    assert ((dA * arguments["A"]).sum(1).abs() / (dA.norm(dim=1) * arguments["A"].norm(dim=1))).max() <= 1e-13
    assert ((dB * arguments["B"]).sum(0).abs() / (dB.norm(dim=0) * arguments["B"].norm(dim=0))).max() <= 1e-13
