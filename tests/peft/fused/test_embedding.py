"""PEFT's LoRA and DoRA on embeddings, accelerated: PEFT's numbers, fewer tensors of the output's
and none of the table's size.
"""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from output_sized import Written
from peft_models import assert_close, config
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import delora_kernels as dk
from delora_kernels.integrations.peft.fused import embedding

METHODS = ("lora", "rslora", "dora")


class Scaled(nn.Embedding):
    """Scales what it looks up, as Gemma's does; PEFT knows it by this attribute."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)
        self.scalar_embed_scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


class Net(nn.Module):
    def __init__(self, kind: type[nn.Embedding] = nn.Embedding) -> None:
        super().__init__()
        self.table = kind(23, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.table(x)
        return y


def adapted(method: str, seed: int, dtype: torch.dtype = torch.float32, kind: Any = nn.Embedding) -> Any:
    torch.manual_seed(seed)
    made = peft.get_peft_model(Net(kind).to(dtype), config(method, target_modules=["table"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter *= 0.5 + torch.rand_like(parameter)
            if "lora_embedding" in name:
                parameter.normal_()
    return made


def step(made: Any, tokens: Tensor) -> dict[str, Tensor]:
    made.zero_grad(set_to_none=True)
    y = made(tokens)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(23, shape or (2, 7), generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dtypes(method: str, dtype: torch.dtype, autocast: bool, seed: int) -> None:
    """float32 factors on a bfloat16 table too."""
    made, x = adapted(method, seed, dtype=dtype), tokens(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = step(made, x)
        dk.accelerate(made, strict=True)
        assert_close(step(made, x), theirs, torch.bfloat16 if autocast else dtype)


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


def test_copies_stay_fused(seed: int) -> None:
    made, x = adapted("dora", seed), tokens(seed)
    dk.accelerate(made, strict=True)
    again = copy.deepcopy(made)
    assert type(again.base_model.model.table) is embedding.FusedEmbedding
    assert torch.equal(again(x), made(x))
    assert made.get_layer_status() == again.get_layer_status()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled(method: str, seed: int) -> None:
    """One graph, PEFT's numbers."""
    torch._dynamo.reset()
    made, x = adapted(method, seed), tokens(seed)
    theirs = step(made, x)
    dk.accelerate(made, strict=True)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in step(compiled, x).items()}, theirs)


@pytest.mark.parametrize(("method", "ours", "theirs"), [("lora", (2, 0), (4, 0)), ("dora", (3, 0), (6, 3))])
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


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_exported(method: str, strict: bool, seed: int) -> None:
    """A program in plain torch."""
    made, x = adapted(method, seed).eval(), tokens(seed)
    layer = made.base_model.model.table
    dk.accelerate(made, strict=True)
    expected = layer(x)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=strict)
    assert "delora_kernels" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), expected)


def test_transforms(seed: int) -> None:
    """torch.func differentiates the layer as PEFT's."""
    made, x = adapted("dora", seed, dtype=torch.float64), tokens(seed)
    values = dict(made.named_parameters())

    def total(values: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(made, values, (x,))
        return y.square().sum()

    theirs = torch.func.grad(total)(values)
    dk.accelerate(made, strict=True)
    for name, ours in torch.func.grad(total)(values).items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-10, atol=1e-10)


def test_forward_mode(seed: int) -> None:
    """DoRA's norm is a constant of forward mode too: as PEFT's, and as backward."""
    made, x = adapted("dora", seed, dtype=torch.float64), tokens(seed)
    dk.accelerate(made, strict=True)
    values = {name: p.detach() for name, p in made.named_parameters() if "lora_" in name}

    def total(values: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(made, values, (x,))
        return y.square().sum()

    along = torch.func.jvp(total, (values,), (values,))[1]
    grads = torch.func.grad(total)(values)
    expected = torch.stack([(grads[name] * values[name]).sum() for name in values]).sum()
    torch.testing.assert_close(along, expected, rtol=1e-9, atol=1e-9)


def test_hooks_of_all_modules_see_every_call(seed: int) -> None:
    made, x = adapted("dora", seed, dtype=torch.float64), tokens(seed)
    dk.accelerate(made, strict=True)
    kinds: list[str] = []
    handle = register_module_forward_hook(lambda module, *_: kinds.append(type(module).__name__))
    made.base_model.model.table(x)
    handle.remove()
    assert any(kind.startswith("Dora") for kind in kinds)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_written_into_after_no_grad(method: str, seed: int) -> None:
    """As PEFT's output: it is no view."""
    made, x = adapted(method, seed, dtype=torch.float64), tokens(seed)
    dk.accelerate(made, strict=True)
    with torch.no_grad():
        y = made.base_model.model.table(x)
    y[0] = nn.Parameter(torch.ones(1, dtype=torch.float64))
    assert y.requires_grad


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
