"""The fused mixture against GOAT's own code, the reference and LoRA (float64): outputs, losses,
every gradient.
"""

from itertools import combinations
from typing import Any

import pytest
import torch
from goat_cases import GoatCase, goat_cases, goat_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_calls import DROPOUT_P, VARIANTS, both, free, leaves_of, losses, moe_arguments, results
from reference_calls import Maker
from torch import Tensor

from delora_kernels import functional as F


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Same shapes, and values to float64 rounding; a gradient may cancel, hence a floor of the size
    of its terms.
    """
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    errors = {k: (ours[k] - v).abs().max() / v.abs().max().clamp(min=1) for k, v in theirs.items() if v.numel()}
    assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}


@pytest.mark.parametrize("case", goat_cases(), ids=str)
def test_golden(case: GoatCase) -> None:
    assert {name: error for name, error in goat_errors(F.moe_lora_linear, case).items() if not error <= 1e-12} == {}


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_reference(variant: str, data: st.DataObject) -> None:
    maker = Maker(data.draw(st.integers(0, 2**31 - 1), label="seed"))
    K, N, r, E = data.draw(
        st.tuples(st.integers(1, 9), st.integers(1, 9), *[st.integers(1, 5)] * 2), label="K, N, r, E"
    )
    lead = data.draw(st.lists(st.integers(0, 4), max_size=3), label="leading dimensions of x")
    arguments = moe_arguments(maker, variant, torch.Size(lead).numel(), K, N, r, E)
    for name, last in (("x", (K,)), ("gates", (E,)), ("adapter_ids", ()), ("token_mask", ())):
        if name in arguments:
            arguments[name] = arguments[name].reshape((*lead, *last))
    if data.draw(st.booleans(), label="no bias"):
        arguments["bias"] = None
    kind = data.draw(st.sampled_from([None, "shared", "independent"]), label="dropout")
    fused, specified = both(arguments, kind, data.draw(st.integers(-(2**63), 2**62)))
    leaves, grad_out = leaves_of(arguments), maker.tensor(*lead, N)
    assert_same(results(fused, leaves, grad_out), results(specified, leaves, grad_out))


@pytest.mark.parametrize("dropout", [None, "shared", "independent"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, dropout: str | None, seed: int) -> None:
    """Every expert, the router, the gates, the scales; of y and of both losses."""
    maker = Maker(seed)
    arguments = moe_arguments(maker, variant, T=3, K=4, N=3, E=3)
    if variant == "gates":  # f jumps where a gate leaves 0
        arguments["gates"] = maker.tensor(3, 3)
    leaves, grad_out = leaves_of(arguments, free(variant)), maker.tensor(3, 3)
    fused, _ = both(arguments, dropout, seed)
    assert torch.autograd.gradcheck(
        lambda *values: losses(fused(**dict(zip(leaves, values, strict=True))), grad_out),
        tuple(leaves.values()),
        atol=1e-7,
        rtol=1e-6,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_subset_of_requires_grad(variant: str, seed: int) -> None:
    maker = Maker(seed)
    arguments = moe_arguments(maker, variant)
    names, grad_out = list(leaves_of(arguments)), maker.tensor(6, 5)
    fused, specified = both(arguments, "shared", 3)
    for count in range(len(names) + 1):
        for subset in combinations(names, count):
            leaves = leaves_of(arguments, subset)
            assert_same(*(results(function, leaves, grad_out) for function in (fused, specified)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, DROPOUT_P])
@pytest.mark.parametrize("shared", [False, True])
def test_one_expert_is_lora_bit_for_bit(shared: bool, dropout_p: float, dtype: torch.dtype, seed: int) -> None:
    maker = Maker(seed)
    arguments = {k: v.to(dtype) for k, v in moe_arguments(maker, "dense", E=1).items() if isinstance(v, Tensor)}
    leaves = leaves_of(arguments) | ({"A": arguments["A"][0].clone().requires_grad_()} if shared else {})
    options, grad_out = {"dropout_p": dropout_p, "seed": 5}, maker.tensor(6, 5).to(dtype)
    y, stats = F.moe_lora_linear(**leaves, top_k=1, scale=0.7, **options)
    lora = {k: v[0] if k == "B" or (k == "A" and not shared) else v for k, v in leaves.items() if k != "router"}
    want = F.lora_linear(**lora, scale=0.7, **options)
    assert torch.equal(y, want)
    grads, expected = (
        dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True), strict=True))
        for out in (y, want)
    )
    assert expected.pop("router") is None
    assert not grads.pop("router").any()
    assert [name for name, grad in expected.items() if not torch.equal(grads[name], grad)] == []
    assert (stats.fraction, stats.probability, stats.z, stats.balance_loss()) == (1, 1, 0, 1)


def test_a_row_of_zeros_has_no_direction(seed: int) -> None:
    """Its output is the bias, and nothing learns from it; is_grads_batched=True gives the same."""
    arguments = moe_arguments(Maker(seed), "dora")
    for name in ("weight", "B", "frozen_B"):
        arguments[name][..., 2, :] = 0
    fused, _ = both(arguments, None, 0)
    leaves = leaves_of(arguments)
    y, _ = fused(**leaves)
    assert torch.equal(y[:, 2], leaves["bias"][2].expand(6))
    dy = torch.stack([torch.ones_like(y), torch.eye(6, 5).to(y)])
    found = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True, is_grads_batched=True)
    for i, each in enumerate(dy):
        one = torch.autograd.grad(y, list(leaves.values()), each, retain_graph=True)
        for name, a, b in zip(leaves, one, found, strict=True):
            torch.testing.assert_close(b[i], a, rtol=1e-12, atol=1e-12, msg=name)
        grads = dict(zip(leaves, one, strict=True))
        assert not grads["magnitude"][2].any()
        assert not grads["B"][:, 2].any()
        assert not grads["weight"][2].any()


def test_all_experts_is_the_dense_softmax(seed: int) -> None:
    maker = Maker(seed)
    arguments, grad_out = moe_arguments(maker, "dense"), maker.tensor(6, 5)
    leaves = leaves_of(arguments)
    dense = results(both(arguments, None, 0)[0], leaves, grad_out)
    for renormalize in (True, False):
        every = arguments | {"top_k": 4, "renormalize": renormalize}
        assert_same(results(both(every, None, 0)[0], leaves, grad_out), dense)


def test_adapter_ids_are_each_tokens_own_lora(seed: int) -> None:
    maker = Maker(seed)
    arguments = moe_arguments(maker, "adapter_ids", T=12)
    x, W, A, B, bias, ids = (arguments[k] for k in ("x", "weight", "A", "B", "bias", "adapter_ids"))
    y, stats = F.moe_lora_linear(**arguments)
    for t, e in enumerate(ids.tolist()):
        alone = torch.nn.functional.linear(x[t], W, bias)
        if e >= 0:
            alone = F.lora_linear(x[t : t + 1], W, A[e], B[e], 0.7, bias)[0]
        assert (y[t] - alone).abs().max() <= 1e-13
    assert torch.equal(stats.fraction * 12, torch.bincount(ids + 1, minlength=5)[1:].double())


def test_ties_go_to_the_lowest_index(seed: int) -> None:
    """All logits alike: the first two experts carry every token, with weights of a half."""
    maker = Maker(seed)
    arguments = moe_arguments(maker, "topk", T=9, E=5)
    arguments["router"] = torch.zeros(5, 7, dtype=torch.float64)
    y, stats = F.moe_lora_linear(**arguments)
    half = torch.tensor([0.5, 0.5, 0, 0, 0]).double().expand(9, 5)
    given = {k: v for k, v in arguments.items() if k not in ("router", "top_k", "renormalize")}
    assert (y - F.moe_lora_linear(**given, gates=half)[0]).abs().max() <= 1e-13
    assert stats.fraction.tolist() == [1, 1, 0, 0, 0]


def test_experts_that_nobody_chose(seed: int) -> None:
    """Their parameters get a gradient of exactly 0, and NaN or Inf in them harms nobody."""
    maker = Maker(seed)
    arguments = moe_arguments(maker, "topk", T=7)
    arguments["x"] = arguments["x"].abs()
    arguments["router"][2:] = -arguments["router"][2:].abs() - 4  # far below
    arguments["router"][:2] = arguments["router"][:2].abs()
    fused, _ = both(arguments, None, 0)
    leaves, grad_out = leaves_of(arguments), maker.tensor(7, 5)
    ours = results(fused, leaves, grad_out)
    assert not ours["A"][2:].any()
    assert not ours["B"][2:].any()
    for name, bad in (("A", float("inf")), ("A", float("nan"))):
        spoiled = {k: v.detach().clone() for k, v in leaves.items()}
        spoiled[name][3].view(-1)[0] = bad
        y, stats = fused(**spoiled)
        assert torch.equal(y, ours["y"])
        assert torch.equal(stats.probability, ours["probability"])


@pytest.mark.parametrize("variant", ["topk", "gates", "adapter_ids"])
def test_tokens_without_an_expert(variant: str, seed: int) -> None:
    """Gates of 0 and ids of −1 give the frozen output; a mask over all tokens gives losses of 0,
    not NaN.
    """
    maker = Maker(seed)
    arguments = moe_arguments(maker, variant)
    if variant != "topk":
        nothing = torch.zeros_like if variant == "gates" else lambda ids: torch.full_like(ids, -1)
        arguments[variant] = nothing(arguments[variant])
        y, _ = F.moe_lora_linear(**arguments)
        assert torch.equal(y, torch.nn.functional.linear(arguments["x"], arguments["weight"], arguments["bias"]))
    arguments["token_mask"] = torch.zeros(6, dtype=torch.bool)
    fused, specified = both(arguments, None, 0)
    leaves, grad_out = leaves_of(arguments), maker.tensor(6, 5)
    ours = results(fused, leaves, grad_out)
    assert_same(ours, results(specified, leaves, grad_out))
    assert ours["probability"].tolist() == ours["fraction"].tolist() == [0] * 4
    assert ours["z"] == 0


def test_padding_does_not_count(seed: int) -> None:
    """Statistics and losses with padding masked are those of the batch without it, even where
    padding is NaN.
    """
    maker = Maker(seed)
    arguments = moe_arguments(maker, "topk", T=9)
    padded = arguments | {"x": torch.cat([arguments["x"], torch.full((4, 7), torch.nan, dtype=torch.float64)])}
    padded["token_mask"] = torch.arange(13) < 9
    found = []
    for call in (arguments, padded):
        leaves = leaves_of(call, ("router",))
        _, stats = F.moe_lora_linear(**call | leaves)
        (grad,) = torch.autograd.grad(stats.balance_loss() + stats.z, leaves["router"])
        found.append({"f": stats.fraction, "P": stats.probability.detach(), "z": stats.z.detach(), "G": grad})
    assert_same(found[1] | {"G": found[0]["G"]}, found[0])
    clean = padded | {"x": padded["x"].nan_to_num(3.0)}
    leaves = leaves_of(clean, ("router",))
    _, stats = F.moe_lora_linear(**clean | leaves)
    (grad,) = torch.autograd.grad(stats.balance_loss() + stats.z, leaves["router"])
    assert_same({"G": grad}, {"G": found[0]["G"]})


@pytest.mark.parametrize("dropout_p", [0.0, DROPOUT_P])
@pytest.mark.parametrize("scaled", ["number", "tensor"])
@pytest.mark.parametrize("variant", ["dense", "residual", "dora"])
def test_one_experts_router_is_not_run(variant: str, scaled: str, dropout_p: float, seed: int) -> None:
    """In every form: no z, a gradient of zeros for a router whose logits would overflow, whatever
    the coefficients; y and the other gradients are those of a given gate of 1.
    """
    maker = Maker(seed)
    arguments = moe_arguments(maker, variant, E=1)
    arguments["scale"] = maker.tensor(1) if scaled == "tensor" else 0.7
    arguments["router"] = torch.full_like(arguments["router"], 1e200)
    leaves, grad_out = leaves_of(arguments), maker.tensor(6, 5)
    rest = {k: v for k, v in arguments.items() if k not in leaves and k != "top_k"} | {"dropout_p": dropout_p}
    y, stats = F.moe_lora_linear(**leaves, **rest, seed=5, balance_coef=0.3, z_coef=0.2)
    sums = stats.fraction.item(), stats.probability.item()  # of shares
    assert sums == pytest.approx((1, 1), rel=1e-14)
    assert (stats.z, stats.top_k) == (0, 1)
    grads = dict(zip(leaves, torch.autograd.grad((y * grad_out).sum() + stats.z, list(leaves.values())), strict=True))
    router = grads.pop("router")
    assert router.shape == arguments["router"].shape
    assert not router.any()
    leaves.pop("router")
    rest.pop("renormalize", None)
    want, _ = F.moe_lora_linear(**leaves, **rest, gates=torch.ones(6, 1, dtype=y.dtype), seed=5)
    theirs = torch.autograd.grad((want * grad_out).sum(), list(leaves.values()))
    assert_same({"y": y.detach(), **grads}, {"y": want.detach(), **dict(zip(leaves, theirs, strict=True))})


@pytest.mark.parametrize("variant", ["topk", "dense", "residual", "gates"])
def test_coefficients_are_the_losses_gradient(variant: str, seed: int) -> None:
    """balance_coef and z_coef: the backward of y alone, as if the losses had been added to it."""
    maker = Maker(seed)
    arguments, grad_out = moe_arguments(maker, variant), maker.tensor(6, 5)
    leaves = leaves_of(arguments)
    rest = {k: v for k, v in arguments.items() if k not in leaves}
    y, stats = F.moe_lora_linear(**leaves, **rest)
    loss = (y * grad_out).sum() + 0.3 * stats.balance_loss("code") + 0.2 * stats.z
    theirs = torch.autograd.grad(loss, list(leaves.values()))
    for coefficient in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        y, _ = F.moe_lora_linear(**leaves, **rest, balance_coef=coefficient, z_coef=0.2)
        ours = torch.autograd.grad((y * grad_out).sum(), list(leaves.values()))
        assert_same(*(dict(zip(leaves, grads, strict=True)) for grads in (ours, theirs)))


def test_the_papers_convention(seed: int) -> None:
    _, stats = F.moe_lora_linear(**moe_arguments(Maker(seed), "topk"))
    assert torch.equal(stats.balance_loss("paper") * 2, stats.balance_loss("code"))
    with pytest.raises(ValueError, match="convention must be one of"):
        stats.balance_loss("switch")


def test_nothing_is_written(seed: int) -> None:
    for variant in VARIANTS:
        arguments = moe_arguments(Maker(seed), variant)
        before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
        fused, _ = both(arguments, "shared", 3)
        losses(fused(**leaves_of(arguments)), torch.ones(6, 5)).backward()
        assert all(torch.equal(arguments[k], v) for k, v in before.items())


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"router": None}, ValueError, "router must be the only one of router, gates, adapter_ids, got none of them"),
    ({"gates": torch.ones(6, 4).double()}, ValueError, "router must be the only one .* got router and gates"),
    ({"router": torch.ones(3, 7).double()}, ValueError, r"router must be \[E, K\] = \[4, 7\], got \[3, 7\]"),
    ({"A": torch.ones(3, 2, 7).double()}, ValueError, r"A must be \[E, r, K\] = \[4, 2, 7\]"),
    ({"A": torch.ones(3, 7).double()}, ValueError, r"A must be \[r, K\] = \[2, 7\]"),
    ({"B": torch.ones(5, 2).double()}, ValueError, r"B must be \[E, N, r\] with E, r ≥ 1, got shape \[5, 2\]"),
    ({"B": torch.ones(4, 6, 2).double()}, ValueError, r"B must be \[E, N, r\] = \[4, 5, 2\]"),
    ({"top_k": 5}, ValueError, "top_k must be from 1 to E = 4, got 5"),
    ({"top_k": 2.0}, TypeError, "top_k must be an int"),
    ({"router": None, "gates": torch.ones(6, 4).double()}, ValueError, "top_k must be None without a router"),
    ({"router": None, "top_k": None, "gates": torch.ones(6).double()}, ValueError, r"gates must be .* = \[6, 4\]"),
    ({"router": None, "top_k": None, "adapter_ids": torch.ones(6)}, TypeError, "adapter_ids must be an int64"),
    ({"router": None, "top_k": None, "adapter_ids": torch.ones(5).long()}, ValueError, r"adapter_ids must be .*\[6\]"),
    ({"token_mask": torch.ones(6)}, TypeError, "token_mask must be a bool tensor, got torch.float32"),
    ({"token_mask": torch.ones(7).bool()}, ValueError, r"token_mask must be \[...\] = \[6\]"),
    ({"scale": torch.ones(3)}, ValueError, r"scale must be \[E\] = \[4\], got \[3\]"),
    ({"frozen_A": torch.ones(2, 2, 7).double()}, ValueError, "frozen_B must be a tensor, got None"),
    ({"frozen_A": torch.ones(2, 7), "frozen_B": torch.ones(1, 5, 2)}, ValueError, "frozen_A must be 3-D"),
    ({"dropout": "both"}, ValueError, "dropout must be one of .*independent"),
    ({"balance_coef": "1"}, TypeError, "balance_coef must be a number"),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD, ids=[words[:40] for _, _, words in BAD])
def test_errors(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        F.moe_lora_linear(**moe_arguments(Maker(0), "topk") | change)
