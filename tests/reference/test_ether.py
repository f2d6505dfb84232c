"""ETHER's specification against the authors' layers, a second formula, its bounds, finite
differences (float64).
"""

from typing import Any

import pytest
import torch
from ether_calls import ether_arguments
from ether_cases import EtherCase, ether_cases, ether_errors
from golden_cases import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_calls import Maker
from torch import Tensor

from delora_kernels import reference


def function_of(plus: bool) -> Any:
    return reference.ether_plus_linear if plus else reference.ether_linear


def weight_of(plus: bool, arguments: dict[str, Any]) -> Tensor:
    """W' by the second formula."""
    rest = {name: value for name, value in arguments.items() if name not in ("x", "bias")}
    adapted: Tensor = (reference.ether_plus_weight if plus else reference.ether_weight)(**rest)
    return adapted


@pytest.mark.parametrize("case", ether_cases(), ids=str)
def test_golden(case: EtherCase) -> None:
    errors = ether_errors(getattr(reference, case.function), case)
    if case.weight_merged is not None:
        errors["W'"] = relative_error(weight_of("plus" in case.function, case.arguments), case.weight_merged)
    assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}


def test_golden_files_are_all_there() -> None:
    functions = [case.function for case in ether_cases()]
    assert [functions.count(f"ether{kind}_linear") for kind in ("", "_plus", "_qkv")] == [5, 5, 1]
    assert sum(case.arguments.get("blocks") == "official" for case in ether_cases()) == 4


@pytest.mark.parametrize("plus", [False, True])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_second_formula(plus: bool, data: st.DataObject) -> None:
    maker = Maker(data.draw(st.integers(0, 2**31 - 1), label="seed"))
    n, k, m = data.draw(st.tuples(*[st.integers(1, 4)] * 3), label="blocks, K / blocks, N / blocks")
    sides = data.draw(st.sampled_from([("into",), ("out_of",), ("into", "out_of")]), label="sides")
    lead = data.draw(st.lists(st.integers(0, 3), max_size=3), label="leading dimensions of x")
    arguments = ether_arguments(maker, plus, sides, torch.Size(lead).numel(), n * k, n * m, n)
    arguments["x"] = arguments["x"].reshape(*lead, n * k)
    grad_out = maker.tensor(*lead, n * m)
    leaves = {name: value.requires_grad_() for name, value in arguments.items()}
    y = function_of(plus)(**leaves)
    second = torch.einsum("...k,nk->...n", leaves["x"], weight_of(plus, leaves)) + leaves["bias"]
    grads, want = (torch.autograd.grad(each, list(leaves.values()), grad_out) for each in (y, second))
    for name, a, b in zip(("y", *leaves), (y, *grads), (second, *want), strict=True):
        assert a.shape == b.shape
        if a.numel():  # the gradients of one-element blocks vanish by cancellation: hence a floor
            error = float((a - b).detach().abs().max() / b.abs().max().clamp(min=1.0))
            assert error <= 1e-12, f"{name}: {error}"


def test_weight_against_loops() -> None:
    maker = Maker()
    W, u, v = maker.tensor(4, 6), maker.tensor(2, 3), maker.tensor(2, 3)
    for blocks in ("paper", "official"):
        for plus in (False, True):
            want = torch.empty(4, 6, dtype=torch.float64)
            for n in range(4):
                for k in range(6):
                    block = k // 3
                    which = block if blocks == "paper" else n // 2  # rows 0, 1 meet H_0 and rows 2, 3 meet H_1
                    row = W[n, 3 * block : 3 * block + 3]
                    a, b = u[which] / (u[which] @ u[which]).sqrt(), v[which] / (v[which] @ v[which]).sqrt()
                    change = (row @ b) * b[k % 3] - (row @ a) * a[k % 3] if plus else -2 * (row @ a) * a[k % 3]
                    want[n, k] = W[n, k] + change
            got = weight_of(plus, {"weight": W, "u": u, "blocks": blocks} | ({"v": v} if plus else {}))
            assert relative_error(got, want) <= 1e-14


@pytest.mark.parametrize("plus", [False, True])
def test_distance_from_the_identity(plus: bool, seed: int) -> None:
    """‖H − I‖_F is 2 for every block of ETHER and at most √2 for every block of ETHER+."""
    maker = Maker(seed)
    u, v = maker.tensor(3, 5), maker.tensor(3, 5)
    v[0] = -2 * u[0]  # no change at all
    v[1] -= (v[1] @ u[1]) / (u[1] @ u[1]) * u[1]  # at a right angle: the bound itself
    H = weight_of(plus, {"weight": torch.eye(15, dtype=torch.float64), "u": u} | ({"v": v} if plus else {}))
    distances = [float((H[s, s] - torch.eye(5)).norm()) for s in (slice(0, 5), slice(5, 10), slice(10, 15))]
    if not plus:
        assert distances == pytest.approx([2, 2, 2], abs=1e-14)
        assert (H @ H - torch.eye(15)).abs().max() <= 1e-14
    else:
        assert distances[:2] == pytest.approx([0, 2**0.5], abs=1e-14)
        assert distances[2] <= 2**0.5


@pytest.mark.parametrize("plus", [False, True])
def test_a_vector_of_length_zero_does_nothing(plus: bool, seed: int) -> None:
    arguments = ether_arguments(Maker(seed), plus, ("into", "out_of"), 3, 6, 4)
    without = {name: arguments.pop(name) for name in list(arguments) if name[0] in "uv"}
    zero = {name: torch.zeros_like(value).requires_grad_() for name, value in without.items()}
    y = function_of(plus)(**arguments, **zero)
    assert torch.equal(y, arguments["x"] @ arguments["weight"].T + arguments["bias"])
    assert all(not grad.any() for grad in torch.autograd.grad(y.sum(), list(zero.values())))


@pytest.mark.parametrize("plus", [False, True])
def test_gradcheck(plus: bool) -> None:
    arguments = ether_arguments(Maker(), plus, ("into", "out_of"), 3, 4, 6)
    leaves = {name: value.requires_grad_() for name, value in arguments.items()}

    def call(*values: Tensor) -> Any:
        return function_of(plus)(**dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()), atol=1e-6, rtol=1e-5)
