"""All low-rank methods at once (one alone: test_dora.py, test_delora.py): the fused functions
against the reference in float64, outputs, every gradient, every subset of requires_grad.
"""

from itertools import combinations
from typing import Any

import pytest
import torch
from fused_calls import DROPOUT_P, TENSORS, assert_same, both, leaves_of, mask_of
from golden_cases import GoldenCase, golden_cases, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_calls import CONSTANTS, VARIANTS, Maker
from torch import Tensor

from delora_kernels import functional


@pytest.mark.parametrize("case", [c for c in golden_cases() if c.dropout_mask is None], ids=str)
def test_golden(case: GoldenCase) -> None:
    leaves = leaves_of(case.arguments, case.grads)
    y = getattr(functional, case.function)(**case.arguments | leaves)
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), case.grad_out), strict=True))
    errors = {name: relative_error(grads[name], case.grads[name], case.vector_dims[name]) for name in case.grads}
    errors["y"] = relative_error(y.detach(), case.output)
    assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_reference(variant: str, dropout: bool, data: st.DataObject) -> None:
    maker = Maker(data.draw(st.integers(0, 2**31 - 1), label="seed"))
    # one number has no direction (DeLoRA: its gradient is 0 and rounding), or is a sum that cancels
    # (DoRA's dm)
    least = 2 if variant.startswith(("dora", "delora")) else 1
    size = st.integers(least, 19)
    K, N, r = data.draw(st.tuples(size, size, st.integers(1, 5)), label="K, N, r")
    lead = data.draw(st.lists(st.integers(0, 5), max_size=3), label="leading dimensions of x")
    arguments = maker.arguments(variant, torch.Size(lead).numel(), K, N, r)
    arguments["x"] = arguments["x"].reshape(*lead, K)
    if data.draw(st.booleans(), label="no bias"):
        arguments["bias"] = None
    fused, specified = both(variant, arguments, data.draw(st.integers(-(2**63), 2**63 - 1)) if dropout else None)
    assert_same(fused, specified, leaves_of(arguments), maker.tensor(*lead, N))


@pytest.mark.parametrize("dropout_seed", [None, 7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, dropout_seed: int | None, seed: int) -> None:
    arguments = Maker(seed).arguments(variant, T=3, K=4, N=5, r=2)
    fused, _ = both(variant, arguments, dropout_seed)
    # DoRA's norm is detached: finite differences in W, A and B would see it move
    names = ("x", "bias", "magnitude") if variant.startswith("dora") else TENSORS
    leaves = leaves_of(arguments, names)
    assert torch.autograd.gradcheck(
        lambda *values: fused(**dict(zip(leaves, values, strict=True))), (*leaves.values(),)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_subset_of_requires_grad(variant: str, seed: int) -> None:
    maker = Maker(seed)
    arguments = maker.arguments(variant)
    names = list(leaves_of(arguments))
    grad_out = maker.tensor(5, 6)
    fused, specified = both(variant, arguments, 3)
    for count in range(len(names) + 1):
        for subset in combinations(names, count):
            assert_same(fused, specified, leaves_of(arguments, subset), grad_out)


def test_chunks_cover_every_row(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors larger than one chunk: the last, shorter chunk counts too."""
    monkeypatch.setattr("delora_kernels.backends.eager.chunks.CPU_ELEMENTS", 40)
    monkeypatch.setattr("delora_kernels.backends.eager.low_rank._IN_CACHE", 40)
    maker = Maker(seed)
    for variant in VARIANTS:
        arguments = maker.arguments(variant, T=23, K=11, N=13)
        for dropout_seed in (None, 5):
            fused, specified = both(variant, arguments, dropout_seed)
            assert_same(fused, specified, leaves_of(arguments), maker.tensor(23, 13))


@pytest.mark.parametrize("variant", VARIANTS)
def test_constants_get_no_gradient_and_inputs_are_not_written(variant: str, seed: int) -> None:
    arguments = Maker(seed).arguments(variant)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    fused, _ = both(variant, arguments, 3)
    fused(**leaves_of(arguments)).sum().backward()
    assert all(torch.equal(arguments[k], v) for k, v in before.items())
    assert all(arguments[k].grad is None for k in CONSTANTS if isinstance(arguments.get(k), Tensor))


def test_dropout_mask_has_the_distribution_of_nn_dropout(seed: int) -> None:
    """Each element is dropped with probability p, independently of its row, its column and its
    neighbours.
    """
    T, K = 512, 510
    mask = mask_of(T, K, seed) > 0
    other = mask_of(T, K, seed + 1) > 0
    sigma = (DROPOUT_P * (1 - DROPOUT_P)) ** 0.5
    kept = mask.double() - (1 - DROPOUT_P)
    assert abs(kept.mean()) <= 6 * sigma / (T * K) ** 0.5
    assert kept.mean(0).abs().max() <= 6 * sigma / T**0.5
    assert kept.mean(1).abs().max() <= 6 * sigma / K**0.5
    for lag in (1, 2, 3, 4, 5):
        assert abs((kept[:, lag:] * kept[:, :-lag]).mean()) <= 6 * sigma**2 / (T * (K - lag)) ** 0.5
        assert abs((kept[lag:] * kept[:-lag]).mean()) <= 6 * sigma**2 / ((T - lag) * K) ** 0.5
    assert abs((kept * (other.double() - (1 - DROPOUT_P))).mean()) <= 6 * sigma**2 / (T * K) ** 0.5


@pytest.mark.parametrize("p", [1e-5, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p: float, seed: int) -> None:
    from delora_kernels import ops

    keep = ops.dropout_mask(1024, 1024, p, torch.tensor(seed), "eager")
    assert abs(keep.double().mean() - (1 - p)) <= 6 * (p * (1 - p) / 2**20) ** 0.5 + 2**-17


def test_seed(seed: int) -> None:
    """One seed, one mask, as int or tensor; None draws from torch's generator, whose state repeats
    it.
    """
    maker = Maker(seed)
    x, W, A, B = maker.tensor(40, 16), maker.tensor(12, 16), maker.tensor(2, 16), maker.tensor(12, 2)

    def call(seed: Any) -> Tensor:
        return functional.lora_linear(x, W, A, B, dropout_p=0.5, seed=seed)

    assert torch.equal(call(seed), call(torch.tensor(seed)))
    assert not torch.equal(call(seed), call(seed + 1))
    torch.manual_seed(seed)
    first, second = call(None), call(None)
    assert not torch.equal(first, second)
    torch.manual_seed(seed)
    assert torch.equal(first, call(None))
