"""PEFT's LoRA and DoRA on convolutions, accelerated: PEFT's numbers, fewer token-sized tensors."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from adapted_convolutions import KINDS, adapted, images
from output_sized import Written
from peft_models import assert_close, config, step
from torch import nn

import delora_kernels as dk
from delora_kernels.functional import channel_term

METHODS = ("lora", "rslora", "dora")


@pytest.fixture(params=["small", "large"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs as they are, and judged to be as large as those that a GEMM adds to."""
    if request.param == "large":
        monkeypatch.setattr(channel_term, "SMALL", 0)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_pefts_numbers(method: str, dims: int, seed: int) -> None:
    """Output and every gradient in float64, the base's own among them."""
    made, x = adapted(method, seed, dims, torch.float64), images(seed, dims, torch.float64)
    for parameter in made.parameters():
        parameter.requires_grad_()
    theirs = step(made, x)
    names = list(made.state_dict())
    report = dk.accelerate(made, strict=True)
    assert str(report).startswith(f"fused 2 of 2 adapter layers (2 {'dora' if method == 'dora' else 'lora'})")
    assert_close(step(made, x), theirs, torch.float64)
    assert list(made.state_dict()) == names
    assert dk.restore(made) == 2
    assert_close(step(made, x), theirs, torch.float64)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_channels_last(method: str, seed: int) -> None:
    """The output keeps the layout; DoRA, whose norm PEFT can't take there, has the numbers of the
    other one.
    """
    made, x = adapted(method, seed), images(seed)
    theirs = step(made, x)
    made, x = (each.to(memory_format=torch.channels_last) for each in (made, x))
    dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs)
    assert made(x).is_contiguous(memory_format=torch.channels_last)


def test_exported_for_every_batch(seed: int) -> None:
    """What is decided by an output's size is not written into a program."""
    made, x = adapted("lora", seed, dtype=torch.float64), images(seed, dtype=torch.float64)
    dk.accelerate(made, strict=True)
    net = made.base_model.model.eval()
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True)
        for batch in (x[:1], torch.cat([x, x])):
            torch.testing.assert_close(program.module()(batch), net(batch), rtol=1e-12, atol=1e-12)


def test_dropout_draws_what_peft_draws(seed: int) -> None:
    made, x = adapted("lora", seed, lora_dropout=0.4), images(seed)
    theirs = step(made, x, seed)
    dk.accelerate(made, strict=True)
    assert_close(step(made, x, seed), theirs)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("order", [("default", "other"), ("other", "default")])
def test_several_adapters_in_pefts_order(order: tuple[str, str], seed: int) -> None:
    """A DoRA rescales what stands before it, and nothing that comes after."""
    made, x = adapted("dora", seed, dtype=torch.float64), images(seed, dtype=torch.float64)
    made.add_adapter("other", config("lora", r=2, target_modules=["first"]))
    made.base_model.set_adapter(list(order))
    theirs = step(made, x)
    dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs, torch.float64)


def grouped(seed: int, method: str = "lora", dims: int = 2, **options: Any) -> Any:
    """One convolution of two groups, in float64."""
    torch.manual_seed(seed)
    base = nn.Sequential(KINDS[dims](4, 6, 3, groups=2)).double()
    return peft.get_peft_model(base, config(method, r=4, target_modules=["0"], **options))


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("dims", KINDS)
def test_groups(dims: int, lora_bias: bool, seed: int) -> None:
    """In both layouts."""
    made = grouped(seed, dims=dims, lora_bias=lora_bias)
    x = torch.randn(2, 4, *(6,) * dims, dtype=torch.float64)
    theirs = step(made, x)
    dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs, torch.float64)
    if dims == 2:
        made, x = (each.to(memory_format=torch.channels_last) for each in (made, x))
        assert_close(step(made, x), theirs, torch.float64)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lora_bias(layout: torch.memory_format, seed: int) -> None:
    made, x = adapted("lora", seed, dtype=torch.float64, lora_bias=True), images(seed, dtype=torch.float64)
    theirs = step(made, x)
    assert sum("lora_B" in name and "bias" in name for name in theirs) == 2
    made, x = (each.to(memory_format=layout) for each in (made, x))
    dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs, torch.float64)


@pytest.mark.parametrize("dims", KINDS)
def test_dora_that_drops_inputs(dims: int, seed: int) -> None:
    """PEFT's mask, its second convolution, and every gradient, the base's own among them."""
    made, x = adapted("dora", seed, dims, torch.float64, lora_dropout=0.4), images(seed, dims, torch.float64)
    for parameter in made.parameters():
        parameter.requires_grad_()
    theirs = step(made, x, seed)
    dk.accelerate(made, strict=True)
    assert_close(step(made, x, seed), theirs, torch.float64)


class Checkers(nn.Module):
    """Drops every other number: the same ones in every layout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.arange(x.numel(), device=x.device).view(x.shape) % 2
        return 2 * x * kept


def test_dora_that_drops_inputs_in_channels_last(seed: int) -> None:
    """The numbers of the other layout, whose masks torch draws in another order."""
    made, x = adapted("dora", seed, dtype=torch.float64, lora_dropout=0.4), images(seed, dtype=torch.float64)
    for name in ("first", "second"):
        getattr(made.base_model.model, name).lora_dropout["default"] = Checkers()
    theirs = step(made, x)
    made, x = (each.to(memory_format=torch.channels_last) for each in (made, x))
    dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs, torch.float64)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_dropout_in_bfloat16(method: str, autocast: bool, seed: int) -> None:
    made = adapted(method, seed, dtype=torch.bfloat16, lora_dropout=0.4)
    if not autocast:  # PEFT's second convolution can't multiply its float32 input with W
        made = made.bfloat16()
    x = images(seed, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = step(made, x, seed)
        dk.accelerate(made, strict=True)
        assert_close(step(made, x, seed), theirs, torch.bfloat16)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_no_gradients(method: str, layout: torch.memory_format, seed: int) -> None:
    """The same bits without gradients and in inference mode; a result that can be written to."""
    made, x = (each.to(memory_format=layout) for each in (adapted(method, seed), images(seed)))
    dk.accelerate(made, strict=True)
    expected = made(x).detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(made(x), expected)
            made.base_model.model.first(x).add_(1)
    with torch.no_grad():
        y = made.base_model.model.first(x)
    assert not y._is_view()


@pytest.mark.usefixtures("sizes")
def test_second_derivatives(seed: int) -> None:
    """Through what was added in place."""
    made, x = adapted("lora", seed, dtype=torch.float64), images(seed, dtype=torch.float64).requires_grad_()
    factors = [p for name, p in made.named_parameters() if "lora_" in name]

    def second() -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(made(x).pow(3).sum(), [x, *factors], create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), [x, *factors])

    theirs = second()
    dk.accelerate(made, strict=True)
    for ours, their in zip(second(), theirs, strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-10, atol=1e-10 * float(their.abs().max()))


DECLINED: dict[str, tuple[Callable[[int], Any], Callable[[Any], object], str]] = {
    "groups": (
        lambda seed: grouped(seed, "dora"),
        lambda made: None,
        "DoRA on a convolution with groups, whose norm PEFT takes in its own way",
    ),
    "bias": (
        lambda seed: adapted("dora", seed),
        lambda made: setattr(made.base_model.model.first.lora_B["default"], "bias", nn.Parameter(torch.ones(8))),
        "DoRA whose lora_B has a bias",
    ),
    "disabled": (lambda seed: adapted("lora", seed), lambda made: made.base_model.disable_adapter_layers(), "disabled"),
    "merged": (lambda seed: adapted("lora", seed), lambda made: made.merge_adapter(), "its adapter is merged"),
    "hook": (
        lambda seed: adapted("lora", seed),
        lambda made: made.base_model.model.first.lora_B["default"].register_forward_hook(lambda *_: None),
        "lora_B has hooks",
    ),
    "patched": (
        lambda seed: adapted("lora", seed),
        lambda made: setattr(made.base_model.model.first, "forward", lambda x: x.new_zeros(2, 8, 4, 4)),
        "it has a forward of its own",
    ),
    "scale": (
        lambda seed: adapted("lora", seed),
        lambda made: made.base_model.model.first.scaling.update(default=torch.tensor(2.0)),
        "its scaling is a Tensor",
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case: str, seed: int) -> None:
    """With the reason; PEFT's own forward runs."""
    make, change, reason = DECLINED[case]
    made = make(seed)
    change(made)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64) if case == "groups" else images(seed)
    layer = next(module for module in made.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    torch.manual_seed(seed)
    theirs = layer(x)
    report = dk.accelerate(made)
    assert reason in str(report.layers[0].reason)
    torch.manual_seed(seed)
    assert torch.equal(layer(x), theirs)


def test_an_image_without_a_batch_is_left_to_peft(seed: int) -> None:
    made, x = adapted("lora", seed), images(seed)[0]
    theirs = made(x)
    dk.accelerate(made, strict=True)
    assert torch.equal(made(x), theirs)


@pytest.mark.usefixtures("sizes")
def test_a_hooked_base_runs_its_hooks(seed: int) -> None:
    made, x = adapted("lora", seed), images(seed)
    kept: list[torch.Tensor] = []
    base = made.base_model.model.first.base_layer
    base.register_forward_hook(lambda _, __, y: y * 2)
    base.register_forward_hook(lambda _, __, y: kept.append(y))
    theirs = step(made, x)
    dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs)
    assert torch.equal(*kept)  # what a hook holds is not written to


def test_merged_and_back(seed: int) -> None:
    made, x = adapted("dora", seed, dtype=torch.float64), images(seed, dtype=torch.float64)
    dk.accelerate(made, strict=True)
    y = made(x)
    made.merge_adapter()
    torch.testing.assert_close(made(x), y, rtol=1e-10, atol=1e-10)
    made.unmerge_adapter()
    torch.testing.assert_close(made(x), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("method", "ours", "theirs"), [("lora", 1, 4), ("dora", 2, 8)])
@pytest.mark.parametrize("small", [False, True])
def test_output_sized_tensors(
    small: bool, method: str, ours: int, theirs: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's output among them, forward: PEFT's product, multiple and sum are added into it; of
    a small output on a CPU the product is made beside it.
    """
    if not small:
        monkeypatch.setattr(channel_term, "SMALL", 0)
    ours += small
    made, x = adapted(method, seed), images(seed)
    layer = made.base_model.model.first
    counts = []
    for _ in range(2):
        with Written(2 * 8 * 4 * 4) as written:
            layer(x)
        counts.append(written.count)
        dk.accelerate(made)
    assert counts == [theirs, ours]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_left_in_training(method: str, seed: int) -> None:
    """Of a layer in eval: PEFT's DoRA asks the layer, its LoRA the dropout."""
    made, x = adapted(method, seed, lora_dropout=0.5).eval(), images(seed)
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    theirs = step(made, x, seed)
    dk.accelerate(made, strict=True)
    assert_close(step(made, x, seed), theirs)


def test_float64_adapters_under_autocast(seed: int) -> None:
    made, x = adapted("lora", seed, dtype=torch.float64), images(seed)
    for name in ("first", "second"):
        getattr(made.base_model.model, name).base_layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(made, x)
        dk.accelerate(made, strict=True)
        assert_close(step(made, x), theirs, torch.bfloat16)


def test_no_group_is_made_of_them(seed: int) -> None:
    with pytest.raises(ValueError, match="no fused linear"):
        dk.accelerate(adapted("lora", seed), group=[["base_model.model.first", "base_model.model.second"]])


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("method", METHODS)
def test_a_factor_without_data_is_not_fused(method: str, part: str, seed: int) -> None:
    made = adapted(method, seed)
    getattr(made.base_model.model.first, part).to("meta")
    first, second = dk.accelerate(made).layers
    assert (first.fused, first.code, first.reason) == (False, "meta-device", f"the {part} is on the meta device")
    assert second.fused
