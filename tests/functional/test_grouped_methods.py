"""Dropout, DoRA and DeLoRA on experts: values and every gradient against two formulas in float64,
whatever the experts have of the rows.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grouped_calls import ROWS, E, K, N, R, assert_close, made_of, step
from reference_calls import Maker
from torch import Tensor

from delora_kernels import functional as F
from delora_kernels import ops, reference

METHODS: dict[str, tuple[str, ...]] = {
    "lora": ("x", "weight", "A", "B", "bias"),
    "dora": ("x", "weight", "A", "B", "magnitude", "bias"),
    "delora": ("x", "weight", "A", "B", "lam", "bias"),
}
"""Method → what can train."""


def drawn(method: str, seed: int, rows: list[int], rank: int = R) -> dict[str, Any]:
    """Arguments, with rows of no expert at the end."""
    maker = Maker(seed)
    made = made_of(maker, rows)
    made |= {"A": maker.tensor(E, rank, K), "B": maker.tensor(E, N, rank)}
    if method == "dora":
        made["magnitude"] = maker.tensor(E, N)
    if method == "delora":
        del made["scale"]
        made |= {"lam": maker.tensor(E), "weight_norm": maker.tensor(E, K).abs()}
    return made


def materialised(method: str) -> Callable[..., Tensor]:
    """x W'ᵀ + bias with every expert's W' made whole."""

    def function(x: Tensor, offsets: Tensor, bias: Tensor | None = None, **rest: Any) -> Tensor:
        weights = getattr(reference, f"grouped_{method}_weight")(**rest)
        member = torch.zeros(len(x), E, dtype=x.dtype)
        begin = 0
        for e, end in enumerate(offsets.tolist()):
            member[begin:end, e], begin = 1, end
        y = torch.einsum("te,tk,enk->tn", member, x, weights)
        return y if bias is None else y + member @ bias

    return function


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients(method: str, rows: str, seed: int) -> None:
    made, trained = drawn(method, seed, ROWS[rows]), METHODS[method]
    fused = step(getattr(F, f"grouped_{method}_linear"), made, trained)
    assert_close(fused, step(getattr(reference, f"grouped_{method}_linear"), made, trained))
    assert_close(fused, step(materialised(method), made, trained))
    if method == "dora":
        assert_close(fused, step(reference.grouped_dora_linear_dense, made, trained))


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("method", METHODS)
def test_ranks(method: str, rank: int, seed: int) -> None:
    for rows in ([0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 12, 0], [2, 3, 0, 4]):
        made = drawn(method, seed, rows, rank)
        found = step(getattr(F, f"grouped_{method}_linear"), made, METHODS[method])
        assert_close(found, step(getattr(reference, f"grouped_{method}_linear"), made, METHODS[method]))


@pytest.mark.parametrize("method", METHODS)
def test_every_subset_of_gradients(method: str, seed: int) -> None:
    made, trained = drawn(method, seed, [2, 0, 3, 1]), METHODS[method]
    function = getattr(F, f"grouped_{method}_linear")
    expected = step(getattr(reference, f"grouped_{method}_linear"), made, trained)
    for count in range(len(trained) + 1):
        for some in itertools.combinations(trained, count):
            assert_close(step(function, made, some), {n: expected[n] for n in ("y", *some)})


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_on_the_branch_of_each_row(method: str, seed: int) -> None:
    """The mask of sorted rows: two rows of one token are dropped independently."""
    made, trained = drawn(method, seed, [3, 0, 4, 2]), METHODS[method]
    made["x"][1] = made["x"][0]
    kept = ops.dropout_mask(len(made["x"]), K, 0.4, torch.tensor(seed), "eager")
    mask = {"dropout_mask": kept.double() / 0.6}
    fused = step(getattr(F, f"grouped_{method}_linear"), made | {"dropout_p": 0.4, "seed": seed}, trained)
    assert_close(fused, step(getattr(reference, f"grouped_{method}_linear"), made | mask, trained))
    dense = {"lora": reference.grouped_lora_linear_dense, "dora": reference.grouped_dora_linear_dense}.get(method)
    if dense is not None:
        assert_close(fused, step(dense, made | mask, trained))
    torch.manual_seed(seed)
    first, second = (getattr(F, f"grouped_{method}_linear")(**made, dropout_p=0.4) for _ in range(2))
    assert not torch.equal(first, second)


def test_one_expert_is_the_plain_method(seed: int) -> None:
    """All rows of one: what `dora_linear` (dropout of the branch) and `delora_linear` compute."""
    for method, names in METHODS.items():
        made = drawn(method, seed, [0, 7, 0, 0])
        y = getattr(F, f"grouped_{method}_linear")(**made)[:7]
        own = {name: made[name][1] for name in names if name != "x"}
        rest = {"scale": 0.7} if method != "delora" else {"weight_norm": made["weight_norm"][1]}
        expected = getattr(F, f"{method}_linear")(made["x"][:7], **own, **rest)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_rows_and_factors_of_length_zero(seed: int) -> None:
    """DoRA's row without direction gives its bias and no gradient; DeLoRA's too with eps = 0."""
    made = drawn("dora", seed, [2, 0, 3, 1])
    made["weight"][0, 2], made["B"][0, 2] = 0, 0
    found = step(F.grouped_dora_linear, made, METHODS["dora"])
    assert torch.equal(found["y"][:2, 2], made["bias"][0, 2].expand(2))
    assert not found["magnitude"][0, 2].any()
    assert all(bool(value.isfinite().all()) for value in found.values())
    made = drawn("delora", seed, [2, 0, 3, 1]) | {"eps": 0.0}
    made["A"][0, 1] = 0
    found = step(F.grouped_delora_linear, made, METHODS["delora"])
    assert_close(found, step(reference.grouped_delora_linear, made, METHODS["delora"]))
    assert not found["A"][0, 1].any()


def test_one_number_for_each_expert_and_the_clamp(seed: int) -> None:
    made = drawn("delora", seed, [2, 0, 3, 1])
    made |= {"weight_norm": made["weight"].flatten(1).norm(dim=1), "B": torch.zeros_like(made["B"])}
    found = step(F.grouped_delora_linear, made, METHODS["delora"])
    assert_close(found, step(reference.grouped_delora_linear, made, METHODS["delora"]))
    assert found["B"].abs().max() > 1e3  # the clamp's 1e-4 divides it


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "one magnitude for all": (
        "dora",
        {"magnitude": torch.zeros(N).double()},
        r"magnitude must be \[E, N\] = \[4, 12\]",
    ),
    "one λ for all": ("delora", {"lam": torch.zeros(()).double()}, r"lam must be \[E\] = \[4\]"),
    "norms of rows": ("delora", {"weight_norm": torch.zeros(E, N).double()}, r"weight_norm must be \[E, K\] or \[E\]"),
    "a negative clamp": ("delora", {"eps": -1.0}, "eps must be"),
    "all dropped": ("lora", {"dropout_p": 1.0}, "dropout_p"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case: str, seed: int) -> None:
    method, changed, text = WRONG[case]
    with pytest.raises(ValueError, match=f"grouped_{method}_linear: {text}"):
        getattr(F, f"grouped_{method}_linear")(**drawn(method, seed, [2, 0, 3, 1]) | changed)


@pytest.mark.parametrize("method", ["dora", "delora"])
def test_compiles_to_one_graph(method: str, seed: int) -> None:
    """Also for another number of rows: nothing reads where experts' rows end."""
    function = getattr(F, f"grouped_{method}_linear")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in ([4, 0, 3, 1], [0, 9, 2, 2]):
        made = drawn(method, seed, rows)
        assert_close(step(compiled, made, METHODS[method]), step(function, made, METHODS[method]))
