"""PEFT's LoRA and DoRA on embeddings, accelerated: PEFT's numbers, fewer tensors of the output's
and none of the table's size.
"""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from adapted_embeddings import Scaled, adapted, step, tokens
from output_sized import Written
from peft_models import assert_close, config
from torch import nn

import delora_kernels as dk

METHODS = ("lora", "rslora", "dora")


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("method", METHODS)
def test_pefts_numbers(method: str, kind: Any, seed: int) -> None:
    """Output and every gradient in float64, the table's own among them."""
    made = adapted(method, seed, torch.float64, kind)
    for parameter in made.parameters():
        parameter.requires_grad_()
    for x in (tokens(seed), tokens(seed, 3), tokens(seed, 2, 3, 2)):
        theirs = step(made, x)
        report = dk.accelerate(made, strict=True)
        assert str(report).startswith(f"fused 1 of 1 adapter layers (1 {'dora' if method == 'dora' else 'lora'})")
        assert_close(step(made, x), theirs, torch.float64)
        assert dk.restore(made) == 1
    assert step(made, tokens(seed, 0, 4))["y"].shape == (0, 4, 12)


def test_several_adapters_in_pefts_order(seed: int) -> None:
    for order in (("default", "other"), ("other", "default")):
        made, x = adapted("dora", seed, torch.float64), tokens(seed)
        made.add_adapter("other", config("lora", r=2, target_modules=["table"]))
        made.base_model.set_adapter(list(order))
        theirs = step(made, x)
        dk.accelerate(made, strict=True)
        assert_close(step(made, x), theirs, torch.float64)


def test_no_row_of_the_table_is_lost(seed: int) -> None:
    """A row of W + BA that is 0 has no direction: its outputs are 0 where PEFT's are not finite."""
    made = adapted("dora", seed, torch.float64)
    layer = made.base_model.model.table
    with torch.no_grad():
        layer.base_layer.weight[:, 4] = 0
        layer.lora_embedding_B["default"][4] = 0
    dk.accelerate(made, strict=True)
    y = made(tokens(seed))
    assert y.isfinite().all()
    assert (y[..., 4] == 0).all()


DECLINED: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "disabled": ("lora", lambda made: made.base_model.disable_adapter_layers(), "its adapters are disabled"),
    "merged": ("dora", lambda made: made.merge_adapter(), "its adapter is merged"),
    "scale": (
        "lora",
        lambda made: made.base_model.model.table.scaling.update(default=torch.tensor(2.0)),
        "its scaling is a Tensor",
    ),
    "patched": (
        "lora",
        lambda made: setattr(made.base_model.model.table, "forward", lambda x: torch.zeros(2, 7, 12)),
        "it has a forward of its own",
    ),
    "split": (
        "lora",
        lambda made: setattr(made.base_model.model.table, "output_fns", {"default": lambda y: y * 2}),
        "its embedding is split among devices",
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case: str, seed: int) -> None:
    """With the reason; PEFT's own forward runs."""
    method, change, reason = DECLINED[case]
    made, x = adapted(method, seed), tokens(seed)
    change(made)
    theirs = made(x)
    assert dk.accelerate(made).layers[0].reason == reason
    assert torch.equal(made(x), theirs)


def test_mixed_batches_are_pefts(seed: int) -> None:
    made, x = adapted("lora", seed).eval(), tokens(seed)
    theirs = made(x, adapter_names=["default", "__base__"])
    dk.accelerate(made, strict=True)
    assert torch.equal(made(x, adapter_names=["default", "__base__"]), theirs)


@pytest.mark.parametrize(("method", "ours", "theirs"), [("lora", (1, 0), (4, 0)), ("dora", (2, 0), (6, 3))])
def test_tensors_that_are_written(method: str, ours: tuple[int, int], theirs: tuple[int, int], seed: int) -> None:
    """Of the output's size, the base's own among them, and of the table's; forward."""
    made, x = adapted(method, seed), tokens(seed)
    counts = []
    for _ in range(2):
        found = []
        for numel in (2 * 7 * 12, 23 * 12):
            with Written(numel) as written:
                made.base_model.model.table(x)
            found.append(written.count)
        counts.append(tuple(found))
        dk.accelerate(made)
    assert counts == [theirs, ours]


def test_a_single_token(seed: int) -> None:
    made, x = adapted("lora", seed), torch.tensor(3)
    theirs = step(made, x)
    dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs)


def test_a_renormalised_table_is_left_to_peft(seed: int) -> None:
    """max_norm scales what is looked up of A in place, before or after DoRA's norm reads it."""
    made, x = adapted("dora", seed), tokens(seed)
    made.base_model.model.table.base_layer.max_norm = 0.5
    plain = copy.deepcopy(made)
    report = dk.accelerate(made)
    assert "max_norm" in str(report.layers[0].reason)
    assert torch.equal(made(x), plain(x))


@pytest.mark.parametrize(("method", "kept"), [("lora", 0), ("dora", 1)])
def test_what_a_head_keeps_of_its_outputs_size(method: str, kept: int, seed: int) -> None:
    """[T, vocabulary]: of LoRA nothing, of DoRA one tensor; an embedding with an adapter beside it,
    of tied weights, keeps its own.
    """
    torch.manual_seed(seed)
    tied = nn.ModuleDict({"table": nn.Embedding(23, 12), "head": nn.Linear(12, 23, bias=False)})
    tied["head"].weight = tied["table"].weight
    made = peft.get_peft_model(tied, config(method, r=2, target_modules=["table", "head"]))
    report = dk.accelerate(made, strict=True)
    assert len(report.fused) == 2
    table, head = (made.base_model.model[name] for name in ("table", "head"))
    assert table.base_layer.weight is head.base_layer.weight
    x, sizes = table(tokens(seed)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = head(x)
    assert y.shape == (2, 7, 23)
    assert sizes.count(y.numel()) == kept
