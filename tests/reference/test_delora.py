"""What DeLoRA promises, held by the reference: lengths that do nothing, bounds, starts, directions
of zero length.
"""

import pytest
import torch
from golden_cases import relative_error
from reference_calls import Maker, run, weight_of

from delora_kernels import reference

DELORA = ("delora_peft", "delora_authors", "delora_paper")


@pytest.mark.parametrize("variant", DELORA)
def test_delora_ignores_lengths(variant: str) -> None:
    maker = Maker()
    arguments = maker.arguments(variant) | {"eps": 0.0}
    y = reference.delora_linear(**arguments)
    for name, shape in (("A", (3, 1)), ("B", (1, 3)), ("frozen_A", (4, 1)), ("frozen_B", (1, 4))):
        if name in arguments:
            rescaled = arguments | {name: arguments[name] * 10 ** (3 * maker.tensor(*shape))}
            assert relative_error(reference.delora_linear(**rescaled), y) <= 1e-13, name


@pytest.mark.parametrize("variant", DELORA)
def test_delora_gradients_are_orthogonal_to_the_factors(variant: str) -> None:
    maker = Maker()
    arguments = maker.arguments(variant)
    _, grads = run("delora_linear", arguments, maker.tensor(5, 6))
    for name, dim in (("A", 1), ("B", 0)):
        sizes = grads[name].norm(dim=dim) * arguments[name].norm(dim=dim)
        assert sizes.min() > 1e-3, name
        assert ((grads[name] * arguments[name]).sum(dim=dim).abs() / sizes).max() <= 1e-13, name


def test_delora_bounds() -> None:
    maker = Maker()
    for variant, factor in (("delora_peft", 1), ("delora_authors", 2)):
        arguments = maker.arguments(variant)
        bound = factor * arguments["lam"].abs() * arguments["weight_norm"].max()
        change = weight_of("delora_linear", arguments) - arguments["weight"]
        assert 0.01 * bound < change.norm() <= bound
        # reached where all ranks share one direction, the start has the opposite one, and n is one
        # number
        arguments |= {"A": maker.tensor(1, 7).expand(3, 7), "B": maker.tensor(6, 1).expand(6, 3), "weight_norm": 1.7}
        if variant == "delora_authors":
            arguments |= {"frozen_A": -arguments["A"], "frozen_B": arguments["B"]}
        change = weight_of("delora_linear", arguments) - arguments["weight"]
        assert relative_error(change.norm(), factor * arguments["lam"].abs().squeeze() * 1.7) <= 1e-13


@pytest.mark.parametrize(("name", "index"), [("A", (0,)), ("B", (slice(None), 0))])
def test_delora_direction_of_zero_length(name: str, index: tuple[int | slice, ...]) -> None:
    maker = Maker()
    arguments, grad_out = maker.arguments("delora_authors"), maker.tensor(5, 6)
    arguments[name][index] = 0
    y, grads = run("delora_linear", arguments, grad_out)
    # the same as the ranks 1 and 2 alone, at two thirds of λ
    small = {"A": arguments["A"][1:], "B": arguments["B"][:, 1:], "lam": arguments["lam"] * 2 / 3}
    small |= {"frozen_A": None, "frozen_B": None}
    start = {"A": arguments["frozen_A"], "B": arguments["frozen_B"], "frozen_A": None, "frozen_B": None}
    (y1, grads1), (y0, grads0) = (run("delora_linear", arguments | change, grad_out) for change in (small, start))
    frozen = arguments["x"] @ arguments["weight"].T + arguments["bias"]
    assert relative_error(y, y1 - y0 + frozen) <= 1e-13
    assert relative_error(grads["lam"], grads1["lam"] * 2 / 3 - grads0["lam"]) <= 1e-12
    assert relative_error(grads["A"][1:], grads1["A"]) <= 1e-13
    assert relative_error(grads["B"][:, 1:], grads1["B"]) <= 1e-13
    assert grads["A"][0].abs().max() == 0
    assert grads["B"][:, 0].abs().max() == 0
    assert relative_error(grads["x"], grads1["x"] - grads0["x"] + grad_out @ arguments["weight"]) <= 1e-13
    everything = arguments | {"A": 0 * arguments["A"], "B": 0 * arguments["B"], "frozen_A": None, "frozen_B": None}
    y, grads = run("delora_linear", everything, grad_out)
    assert torch.equal(y, frozen)
    assert all(grads[zero].abs().max() == 0 for zero in ("A", "B", "lam"))
    assert torch.equal(weight_of("delora_linear", everything), arguments["weight"])


def test_delora_peft_start() -> None:
    maker = Maker()
    arguments, grad_out = maker.arguments("delora_peft"), maker.tensor(5, 6)
    arguments["B"] *= 0
    y, grads = run("delora_linear", arguments, grad_out)
    assert torch.equal(y, arguments["x"] @ arguments["weight"].T + arguments["bias"])
    assert grads["A"].abs().max() == 0
    assert grads["lam"].abs() == 0
    directions = arguments["A"] / arguments["A"].norm(dim=1, keepdim=True)
    dropped = arguments["x"] * arguments["dropout_mask"] * arguments["weight_norm"]
    want = arguments["lam"] / 3 / 1e-4 * grad_out.T @ dropped @ directions.T
    assert relative_error(grads["B"], want) <= 1e-13


def test_delora_frozen_starts() -> None:
    maker = Maker()
    arguments, grad_out = maker.arguments("delora_authors"), maker.tensor(5, 6)
    arguments |= {"frozen_A": arguments["A"].clone(), "frozen_B": arguments["B"].clone()}
    frozen = arguments["x"] @ arguments["weight"].T + arguments["bias"]
    y, grads = run("delora_linear", arguments, grad_out)
    assert relative_error(y, frozen) <= 1e-14
    assert grads["lam"] == 0
    y, grads = run("delora_linear", arguments | {"frozen_lam": arguments["lam"].clone()}, grad_out)
    assert relative_error(y, frozen) <= 1e-14
    alone = reference.delora_linear(**(arguments | {"frozen_A": None, "frozen_B": None}))
    assert relative_error(grads["lam"], (grad_out * (alone - frozen)).sum() / arguments["lam"]) <= 1e-12


@pytest.mark.parametrize("variant", DELORA)
def test_delora_constants_get_no_gradient(variant: str) -> None:
    arguments = Maker().arguments(variant)
    if variant == "delora_paper":
        arguments["frozen_lam"] = torch.tensor(1.3, dtype=torch.float64)
    names = [name for name in ("weight_norm", "frozen_A", "frozen_B", "frozen_lam") if name in arguments]
    leaves = [arguments[name].requires_grad_() for name in names]
    arguments["A"].requires_grad_()
    for result in (reference.delora_linear(**arguments), weight_of("delora_linear", arguments)):
        *constants, dA = torch.autograd.grad(result.sum(), [*leaves, arguments["A"]], allow_unused=True)
        assert constants == [None] * len(names)
        assert dA.abs().max() > 1e-6
