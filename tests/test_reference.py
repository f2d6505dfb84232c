"""The reference against the methods' own code, against a second formula, and against finite differences (float64)."""

import ast
import os
import pathlib
import secrets
from typing import Any

import pytest
import torch
from golden_cases import GoldenCase, golden_cases, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from delora_kernels import reference

CONSTANTS = ("weight_norm", "frozen_A", "frozen_B", "frozen_lam", "dropout_mask")


@pytest.fixture
def seed(record_property: Any) -> int:
    """A fresh seed, shown when the test fails; TEST_SEED repeats one."""
    value = int(os.environ.get("TEST_SEED", secrets.randbits(31)))
    record_property("seed", value)
    print(f"TEST_SEED={value}")
    return value


class Maker:
    """Random float64 arguments. Entries of factors and weights have sizes in [0.5, 1.5]: no norm is near zero."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int) -> Tensor:
        size = torch.rand(shape, dtype=torch.float64, generator=self.generator) + 0.5
        return size * torch.randint(0, 2, shape, generator=self.generator).mul(2).sub(1)

    def mask(self, T: int, K: int, p: float = 0.25) -> Tensor:
        return (torch.rand(T, K, dtype=torch.float64, generator=self.generator) >= p) / (1 - p)

    def arguments(self, variant: str, T: int = 5, K: int = 7, N: int = 6, r: int = 3) -> dict[str, Any]:
        """Arguments of the variant's function, x, bias and dropout_mask included."""
        made: dict[str, Any] = {"x": self.tensor(T, K), "weight": self.tensor(N, K), "bias": self.tensor(N)}
        made |= {"A": self.tensor(r, K), "B": self.tensor(N, r), "dropout_mask": self.mask(T, K)}
        if not variant.startswith("delora"):
            made |= {"scale": 0.7}
        if variant.startswith("dora"):
            made |= {"magnitude": self.tensor(N), "dropout": variant.removeprefix("dora_")}
        if variant.startswith("delora"):
            made |= {"lam": self.tensor(), "weight_norm": self.tensor(K).abs(), "eps": 0.0}
        if variant == "delora_peft":
            made |= {"lam": self.tensor(1), "eps": 1e-4}
            made["A"][0] *= 1e-5  # below the clamp
            made["B"][:, -1] *= 1e-6
        if variant in ("delora_authors", "delora_paper"):
            made |= {"frozen_A": self.tensor(r + 1, K), "frozen_B": self.tensor(N, r + 1)}
        if variant == "delora_paper":
            made |= {"weight_norm": self.tensor().abs(), "frozen_lam": 1.3}
        return made


VARIANTS = ("lora", "dora_peft", "dora_branch", "delora_peft", "delora_authors", "delora_paper")


def function_of(variant: str) -> str:
    return f"{variant.split('_')[0]}_linear"


def run(function: str, arguments: dict[str, Any], grad_out: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's output, and the gradient of every tensor that is not a constant, for Σ y · grad_out."""
    leaves = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    trained = [k for k, v in leaves.items() if isinstance(v, Tensor) and k not in CONSTANTS]
    for name in trained:
        leaves[name].requires_grad_()
    y = getattr(reference, function)(**leaves)
    grads = torch.autograd.grad(y, [leaves[k] for k in trained], torch.ones_like(y) if grad_out is None else grad_out)
    return y.detach(), dict(zip(trained, grads, strict=True))


def materialised(function: str, arguments: dict[str, Any]) -> Tensor:
    """The second formula: W' as a matrix; with dropout, W sees x and what the adapter adds to W sees x_d."""
    rest = {k: v for k, v in arguments.items() if k not in ("x", "bias", "dropout_mask", "dropout")}
    adapted, unadapted = getattr(reference, function.replace("linear", "weight"))(**rest), arguments["weight"]
    if arguments.get("dropout") == "branch":
        V = arguments["weight"] + arguments["scale"] * arguments["B"] @ arguments["A"]
        unadapted = torch.diag(arguments["magnitude"] / V.detach().norm(dim=1)) @ unadapted
    x, mask, bias = arguments["x"], arguments.get("dropout_mask"), arguments.get("bias")
    dropped = x if mask is None else x * mask.reshape(x.shape)
    y = torch.einsum("...k,nk->...n", x, unadapted) + torch.einsum("...k,nk->...n", dropped, adapted - unadapted)
    return y if bias is None else y + bias


@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_golden(case: GoldenCase) -> None:
    y, grads = run(case.function, case.arguments | {"dropout_mask": case.dropout_mask}, case.grad_out)
    errors = {name: relative_error(grads[name], case.grads[name], case.vector_dims[name]) for name in case.grads}
    errors["y"] = relative_error(y, case.output)
    rest = {k: v for k, v in case.arguments.items() if k not in ("x", "bias")}
    if case.weight_merged is not None:
        merged = getattr(reference, case.function.replace("linear", "weight"))(**rest)
        errors["W'"] = relative_error(merged, case.weight_merged)
    if case.row_norm is not None:
        # with m = ‖V‖ DoRA is LoRA: the source's norm must give back V itself
        merged = reference.dora_weight(**(rest | {"magnitude": case.row_norm}))
        del rest["magnitude"]
        errors["norm"] = relative_error(merged, reference.lora_weight(**rest))
    assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}


def test_golden_files_are_all_there() -> None:
    counts = {name: sum(case.name.startswith(name) for case in golden_cases()) for name in ("lora", "dora", "delora")}
    assert counts | {"all": len(golden_cases())} == {"lora": 5, "dora": 5, "delora": 9, "all": 20}


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_second_formula(variant: str, data: st.DataObject) -> None:
    maker = Maker(data.draw(st.integers(0, 2**31 - 1), label="seed"))
    K, N, r = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)), label="K, N, r")
    lead = data.draw(st.lists(st.integers(0, 3), max_size=3), label="leading dimensions of x")
    T = torch.Size(lead).numel()
    arguments = maker.arguments(variant, T, K, N, r)
    arguments["x"] = arguments["x"].reshape(*lead, K)
    if data.draw(st.booleans(), label="no bias"):
        arguments["bias"] = None
    if data.draw(st.booleans(), label="no dropout"):
        arguments["dropout_mask"] = None
    grad_out = maker.tensor(*lead, N)
    y, grads = run(function_of(variant), arguments, grad_out)
    arguments |= {name: arguments[name].clone().requires_grad_() for name in grads}
    expected = materialised(function_of(variant), arguments)
    expected_grads = torch.autograd.grad(expected, [arguments[name] for name in grads], grad_out)
    for name, got, want in zip(("y", *grads), (y, *grads.values()), (expected, *expected_grads), strict=True):
        # at size 1 gradients vanish by cancellation, hence the floor; below the clamp they are 1e4 or more
        assert got.shape == want.shape, name
        error = (got - want).abs().max().item() if got.numel() else 0.0
        floor = 1e5 if variant == "delora_peft" and name in "AB" else 1.0
        assert error <= 1e-12 * max(floor, want.abs().max().item() if want.numel() else 0.0), f"{name}: {error}"


def test_weights_against_loops(seed: int) -> None:
    maker, (N, K, r) = Maker(seed), (4, 5, 3)
    lora, dora, delora = (maker.arguments(v, K=K, N=N, r=r) for v in ("lora", "dora_peft", "delora_authors"))
    for made in (lora, dora, delora):
        for name in ("x", "bias", "dropout_mask", "dropout"):
            made.pop(name, None)
    W, A, B, s = lora["weight"].tolist(), lora["A"].tolist(), lora["B"].tolist(), lora["scale"]
    want = [[W[n][k] + s * sum(B[n][i] * A[i][k] for i in range(r)) for k in range(K)] for n in range(N)]
    assert relative_error(reference.lora_weight(**lora), torch.tensor(want, dtype=torch.float64)) <= 1e-14

    want = reference.lora_weight(dora["weight"], dora["A"], dora["B"], dora["scale"]).tolist()
    want = [[m * v / sum(u * u for u in row) ** 0.5 for v in row] for m, row in zip(dora["magnitude"], want, strict=True)]
    assert relative_error(reference.dora_weight(**dora), torch.tensor(want, dtype=torch.float64)) <= 1e-14

    want = delora["weight"].clone()
    for sign, A, B in ((1, delora["A"], delora["B"]), (-1, delora["frozen_A"], delora["frozen_B"])):
        for a, b in zip(A, B.T, strict=True):
            lengths = (a @ a).sqrt() * (b @ b).sqrt()
            for n in range(N):
                for k in range(K):
                    change = delora["lam"] / len(A) * b[n] * a[k] / lengths * delora["weight_norm"][k]
                    want[n, k] += sign * change
    assert relative_error(reference.delora_weight(**delora), want) <= 1e-14


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, seed: int) -> None:
    arguments = Maker(seed).arguments(variant, T=3, K=4, N=3, r=2)
    if variant == "delora_peft":
        arguments["A"][0] *= 1e5  # gradients of a clamped row are too steep for finite differences
        arguments["B"][:, -1] *= 1e6
    trained = [k for k, v in arguments.items() if isinstance(v, Tensor) and k not in CONSTANTS]

    def norm(of: dict[str, Any]) -> Tensor:
        return (of["weight"] + of["scale"] * of["B"] @ of["A"]).norm(dim=1).detach()

    def call(*values: Tensor) -> Tensor:
        changed = arguments | dict(zip(trained, values, strict=True))
        if variant.startswith("dora"):
            # the norm counts as constant: let m follow it, so that c stays where it is while A, B and W are nudged
            changed["magnitude"] = changed["magnitude"] * norm(changed) / norm(arguments)
        return getattr(reference, function_of(variant))(**changed)

    leaves = tuple(arguments[name].requires_grad_() for name in trained)
    assert torch.autograd.gradcheck(call, leaves, atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-6, rtol=1e-5)


def test_reference_stands_alone() -> None:
    folder = pathlib.Path(reference.__file__).parent
    nodes = [node for path in folder.glob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported == {"torch"} | {f"delora_kernels.reference.{name}" for name in ("lora", "dora", "delora")}
