"""The two specifications of a mixture against GOAT's own code, each other and finite differences
(float64).
"""

from typing import Any

import pytest
import torch
from goat_cases import GoatCase, goat_cases, goat_errors
from golden_cases import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_calls import VARIANTS, free, leaves_of, losses, moe_arguments, results
from reference_calls import Maker

from delora_kernels import reference

SPECIFICATIONS = (reference.moe_lora_linear, reference.moe_lora_linear_dense)


@pytest.mark.parametrize("function", SPECIFICATIONS)
@pytest.mark.parametrize("case", goat_cases(), ids=str)
def test_golden(case: GoatCase, function: Any) -> None:
    assert {name: error for name, error in goat_errors(function, case).items() if not error <= 1e-12} == {}


def test_golden_files_are_all_there() -> None:
    assert len(goat_cases()) == 20


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_they_agree(variant: str, data: st.DataObject) -> None:
    maker = Maker(data.draw(st.integers(0, 2**31 - 1), label="seed"))
    K, N, r, E = data.draw(st.tuples(*[st.integers(1, 6)] * 4), label="K, N, r, E")
    lead = data.draw(st.lists(st.integers(0, 3), max_size=3), label="leading dimensions of x")
    T = torch.Size(lead).numel()
    arguments = moe_arguments(maker, variant, T, K, N, r, E)
    for name, last in (("x", (K,)), ("gates", (E,)), ("adapter_ids", ()), ("token_mask", ())):
        if name in arguments:
            arguments[name] = arguments[name].reshape((*lead, *last))
    masks = data.draw(st.sampled_from([None, (T, K), (E, T, K)]), label="dropout mask")
    if masks is not None:
        arguments["dropout_mask"] = (torch.rand(masks, generator=maker.generator).double() >= 0.25) / 0.75
    leaves, grad_out = leaves_of(arguments), maker.tensor(*lead, N)
    rest = {name: value for name, value in arguments.items() if name not in leaves}
    loop, dense = (results(lambda f=f, **tensors: f(**rest | tensors), leaves, grad_out) for f in SPECIFICATIONS)
    for name, want in dense.items():
        assert loop[name].shape == want.shape
        if want.numel():  # a gradient may vanish by cancellation, hence a floor of the size of what cancels
            error = (loop[name] - want).abs().max() / want.abs().max().clamp(min=1)
            assert error <= 1e-12, f"{name}: {error}"


@pytest.mark.parametrize("function", SPECIFICATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, function: Any, seed: int) -> None:
    maker = Maker(seed)
    arguments = moe_arguments(maker, variant, T=3, K=4, N=3)
    names = [
        n
        for n in ("x", "A", "B", "router", "gates", "scale", "magnitude")
        if n in free(variant) and isinstance(arguments.get(n), torch.Tensor)
    ]
    if variant == "gates":  # f jumps where a gate leaves 0
        arguments["gates"] = maker.tensor(3, 4)
    leaves, grad_out = leaves_of(arguments, names), maker.tensor(3, 3)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return losses(function(**arguments | dict(zip(leaves, values, strict=True))), grad_out)

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()), atol=1e-7, rtol=1e-6)


def test_balance_loss_of_a_balanced_router() -> None:
    """E tokens that each prefer another expert: f = k / E; the code's loss is k, the paper's 1."""
    E, k = 4, 2
    x = torch.eye(E, dtype=torch.float64) + 0.5 * torch.eye(E, dtype=torch.float64).roll(1, 1)
    arguments = moe_arguments(Maker(0), "dense", E, E, 3, 2, E)
    _, stats = reference.moe_lora_linear(**arguments | {"x": x, "router": torch.eye(E).double(), "top_k": k})
    assert relative_error(stats.fraction, torch.full((E,), k / E)) <= 1e-15
    assert abs(stats.balance_loss("code") - k) <= 1e-14
    assert abs(stats.balance_loss("paper") - 1) <= 1e-14


def test_the_lowest_index_wins_ties() -> None:
    arguments = moe_arguments(Maker(0), "topk")
    arguments["router"][:] = arguments["router"][0]
    _, stats = reference.moe_lora_linear(**arguments)
    assert stats.fraction.tolist() == [1, 1, 0, 0]
