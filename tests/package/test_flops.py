"""FLOP counters see what the fused ops compute: what PEFT's own layer computes, less what it
computes in vain.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import moe_calls
import pytest
import torch
from fused_calls import both, leaves_of
from reference_calls import VARIANTS, Maker
from torch.utils.flop_counter import FlopCounterMode

from delora_kernels import flops, functional, ops, reference
from delora_kernels.backends import eager
from delora_kernels.testing.ops.cases import OPS, OpDraw
from delora_kernels.testing.ops.cases import arguments as op_arguments

flops.register()
flops.register()

T, K, N, R = 12, 20, 16, 3
COMPARABLE = {"topk", "topk_plain", "dense", "gates", "adapter_ids"}
"""Mixtures whose reference has the same products: no A that serves all experts, no pairs folded
into W.
"""


def addmm_in_place(out: Any, left: Any, right: Any, **_: Any) -> int:
    """The formula that torch lacks, of shapes."""
    return int(2 * left[0] * left[1] * right[1])


def counted(run: Callable[[], Any]) -> int:
    """What torch's counter makes of `run`, which knows addmm but not addmm_."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place}) as counter:
        run()
    return int(counter.get_total_flops())


def test_every_op_has_a_formula_or_no_product() -> None:
    assert {*flops.FORMULAS, *flops.WITHOUT_PRODUCTS} == set(ops.NAMES)
    assert not flops.FORMULAS.keys() & set(flops.WITHOUT_PRODUCTS)


@pytest.mark.parametrize("name", OPS)
def test_an_op_counts_what_torch_counts_of_its_plain_form(name: str, seed: int) -> None:
    """Every variant, in one dtype: where dtypes differ, the plain form makes three products
    of one.
    """
    counts = []
    for values in OPS[name][0](OpDraw(T, K, N, R, torch.float64, torch.float64, "cpu", seed)):
        if "offsets" in values:  # rows of no expert, which take no time, can't be told by sizes
            values["offsets"][-1] = T
        given = op_arguments(name, {"kept": torch.ones(T, N, dtype=torch.float64)} | values)
        plain, registered = getattr(eager, name), getattr(ops, name)
        counts.append(counted(lambda op=plain, given=given: op(*given)))
        assert counted(lambda op=registered, given=given: op(*given, "eager")) == counts[-1]
    assert any(counts) == (name not in flops.WITHOUT_PRODUCTS)


@pytest.mark.parametrize("dropout", [None, "shared", "independent"])
@pytest.mark.parametrize("variant", moe_calls.VARIANTS)
def test_flops_of_a_mixture(variant: str, dropout: str | None, seed: int) -> None:
    """By the sizes of its factors, and where they have the same products as torch counts the
    formula.
    """
    E, r = 4, 2
    made = moe_calls.moe_arguments(Maker(seed), variant, T, K, N, r, E)
    fused, _ = moe_calls.both(made, dropout, seed)

    def step(function: Any, **options: Any) -> int:
        leaves = moe_calls.leaves_of(made, ("x", "A", "B", "router", "gates"))
        dy = torch.ones(T, N, dtype=torch.float64)
        return counted(lambda: moe_calls.losses(function(**leaves, **options), dy).backward())

    trained = (r if variant == "shared_A" and dropout != "independent" else E * r) + (E if "router" in made else 0)
    start = 2 * (r + 1) if variant in ("residual", "dora") else 0
    columns, width = trained + start, E * r + start
    forward = 2 * T * (N * K + columns * K + width * N) + (2 * N * K * width if variant == "dora" else 0)
    backward = 2 * T * (N * K + columns * K + 2 * width * N + trained * K)
    assert step(fused) == forward + backward
    if variant in COMPARABLE:
        mask = None if dropout is None else moe_calls.masks_of(T, K, E, seed, dropout)
        assert step(partial(reference.moe_lora_linear_dense, **made), dropout_mask=mask) == forward + backward


@pytest.mark.parametrize("function", ["ether_linear", "ether_plus_linear"])
def test_flops_of_a_reflection(function: str, seed: int) -> None:
    maker, n = Maker(seed), 4
    W, vectors = maker.tensor(N, K), {"u": maker.tensor(n, K // n)}
    if function == "ether_plus_linear":
        vectors |= {"v": maker.tensor(n, K // n)}
    leaves = {name: value.requires_grad_() for name, value in ({"x": maker.tensor(T, K)} | vectors).items()}
    step = 2 * T * N * K + 2 * T * K * len(vectors) * 2
    step += 2 * T * N * K + 2 * T * K * len(vectors) * 5
    assert counted(lambda: getattr(functional, function)(weight=W, **leaves).sum().backward()) == step


@pytest.mark.parametrize("dropout_seed", [None, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops(variant: str, dropout_seed: int | None, seed: int) -> None:
    arguments = Maker(seed).arguments(variant, T, K, N, R)
    fused, _ = both(variant, arguments, dropout_seed)
    count = counted(lambda: fused(**leaves_of(arguments, ("x", "A", "B"))).sum().backward())
    r = 2 * R + 1 if variant in ("delora_authors", "delora_paper") else R
    frozen = 2 if variant == "dora_peft" and dropout_seed is not None else 1
    forward = 2 * T * (frozen * N * K + r * K + r * N) + (2 * N * r * K if variant.startswith("dora") else 0)
    backward = 2 * T * (frozen * N * K + r * K + 2 * r * N + R * K)
    assert count == forward + backward


def test_flops_of_a_trained_base(seed: int) -> None:
    arguments = Maker(seed).arguments("lora", T, K, N, R)
    fused, _ = both("lora", arguments, None)
    count = counted(lambda: fused(**leaves_of(arguments, ("weight",))).sum().backward())
    assert count == 2 * T * (2 * N * K + R * K + R * N)


def test_torch_counts_the_reference_alike(seed: int) -> None:
    """LoRA's fused count is torch's own count of the plain formula."""
    arguments = Maker(seed).arguments("lora", T, K, N, R)
    counts = [
        counted(lambda f=function: f(**leaves_of(arguments, ("x", "A", "B"))).sum().backward())
        for function in both("lora", arguments, None)
    ]
    assert counts[0] == counts[1]
    assert counts[0] > 0
