"""All low-rank methods at once (one alone: test_dora.py, test_delora.py): the reference against the
methods' own code, against a second formula, and against finite differences (float64).
"""

from typing import Any

import pytest
import torch
from golden_cases import GoldenCase, golden_cases, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_calls import CONSTANTS, VARIANTS, Maker, function_of, run, weight_of
from torch import Tensor

from delora_kernels import reference


@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_golden(case: GoldenCase) -> None:
    y, grads = run(case.function, case.arguments | {"dropout_mask": case.dropout_mask}, case.grad_out)
    errors = {name: relative_error(grads[name], case.grads[name], case.vector_dims[name]) for name in case.grads}
    errors["y"] = relative_error(y, case.output)
    if case.weight_merged is not None:
        errors["W'"] = relative_error(weight_of(case.function, case.arguments), case.weight_merged)
    if case.row_norm is not None:
        # with m = ‖V‖ DoRA is LoRA: the source's norm must give back V itself
        V = weight_of("lora_linear", {k: v for k, v in case.arguments.items() if k != "magnitude"})
        errors["norm"] = relative_error(weight_of("dora_linear", case.arguments | {"magnitude": case.row_norm}), V)
    assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}


def test_golden_files_are_all_there() -> None:
    counts = {name: sum(case.name.startswith(name) for case in golden_cases()) for name in ("lora", "dora", "delora")}
    assert counts | {"all": len(golden_cases())} == {"lora": 5, "dora": 5, "delora": 9, "all": 20}


def second_formula(function: str, arguments: dict[str, Any]) -> Tensor:
    """y from W' as a matrix; with dropout, W sees x and all that the adapter adds to W sees x_d."""
    adapted, unadapted = weight_of(function, arguments), arguments["weight"]
    if arguments.get("dropout") == "branch":  # c ⊙ W sees x
        V = arguments["weight"] + arguments["scale"] * arguments["B"] @ arguments["A"]
        unadapted = torch.diag(arguments["magnitude"] / V.detach().norm(dim=1)) @ unadapted
    x, mask, bias = arguments["x"], arguments["dropout_mask"], arguments["bias"]
    dropped = x if mask is None else x * mask.reshape(x.shape)
    y = torch.einsum("...k,nk->...n", x, unadapted) + torch.einsum("...k,nk->...n", dropped, adapted - unadapted)
    return y if bias is None else y + bias


@pytest.mark.parametrize("variant", [*VARIANTS, "delora_peft_clamped"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_second_formula(variant: str, data: st.DataObject) -> None:
    clamped, variant = variant.endswith("_clamped"), variant.removesuffix("_clamped")
    maker = Maker(data.draw(st.integers(0, 2**31 - 1), label="seed"))
    K, N, r = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)), label="K, N, r")
    lead = data.draw(st.lists(st.integers(0, 3), max_size=3), label="leading dimensions of x")
    arguments = maker.arguments(variant, torch.Size(lead).numel(), K, N, r)
    arguments["x"] = arguments["x"].reshape(*lead, K)
    for name in data.draw(st.sets(st.sampled_from(["bias", "dropout_mask"])), label="left out"):
        arguments[name] = None
    if clamped:
        arguments["A"][0] *= 1e-5
        arguments["B"][:, -1] *= 1e-6
    grad_out = maker.tensor(*lead, N)
    y, grads = run(function_of(variant), arguments, grad_out)
    arguments |= {name: arguments[name].clone().requires_grad_() for name in grads}
    want_y = second_formula(function_of(variant), arguments)
    want = torch.autograd.grad(want_y, [arguments[name] for name in grads], grad_out)
    for name, a, b in zip(("y", *grads), (y, *grads.values()), (want_y.detach(), *want), strict=True):
        assert a.shape == b.shape, name
        if a.numel():
            # a gradient may vanish by cancellation, at K = 1 it must: hence a floor, of the size of
            # what cancels
            floor = 1e5 if clamped and name in ("A", "B") else 1.0
            error = float((a - b).abs().max() / b.abs().max().clamp(min=floor))
            assert error <= 1e-12, f"{name}: {error}"


def test_weights_against_loops() -> None:
    maker, (N, K, r) = Maker(), (4, 5, 3)
    lora, dora, delora = (maker.arguments(v, K=K, N=N, r=r) for v in ("lora", "dora_peft", "delora_authors"))
    W, A, B, s = lora["weight"], lora["A"], lora["B"], lora["scale"]
    want = [[W[n, k] + s * sum(B[n, i] * A[i, k] for i in range(r)) for k in range(K)] for n in range(N)]
    assert relative_error(weight_of("lora_linear", lora), torch.tensor(want).double()) <= 1e-14

    V = reference.lora_weight(dora["weight"], dora["A"], dora["B"], s).tolist()
    want = [[m * v / sum(u * u for u in row) ** 0.5 for v in row] for m, row in zip(dora["magnitude"], V, strict=True)]
    assert relative_error(weight_of("dora_linear", dora), torch.tensor(want).double()) <= 1e-14

    change = torch.zeros(N, K, dtype=torch.float64)
    for sign, A, B in ((1, delora["A"], delora["B"]), (-1, delora["frozen_A"], delora["frozen_B"])):
        for n in range(N):
            for k in range(K):
                for a, b in zip(A, B.T, strict=True):
                    change[n, k] += sign / len(A) * b[n] * a[k] / ((a @ a) * (b @ b)).sqrt()
    want_delora = delora["weight"] + delora["lam"] * change * delora["weight_norm"]
    assert relative_error(weight_of("delora_linear", delora), want_delora) <= 1e-14


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str) -> None:
    arguments = Maker().arguments(variant, T=3, K=4, N=3, r=2)
    trained = [k for k, v in arguments.items() if isinstance(v, Tensor) and k not in CONSTANTS]

    def norm(of: dict[str, Any]) -> Tensor:
        rows: Tensor = (of["weight"] + of["scale"] * of["B"] @ of["A"]).norm(dim=1).detach()
        return rows

    start = norm(arguments) if variant.startswith("dora") else None

    def call(*values: Tensor) -> Tensor:
        changed = arguments | dict(zip(trained, values, strict=True))
        if variant.startswith("dora"):
            # the norm counts as constant: let m follow it, so that c stays where it is while A, B
            # and W are nudged
            changed["magnitude"] = changed["magnitude"] * norm(changed) / start
        y: Tensor = getattr(reference, function_of(variant))(**changed)
        return y

    leaves = tuple(arguments[name].requires_grad_() for name in trained)
    assert torch.autograd.gradcheck(call, leaves, atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-6, rtol=1e-5)
