"""What adapted convolutions and embeddings do alike: torch's own operations, compiled, exported,
transformed, seen by hooks, copied.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import adapted_convolutions
import adapted_embeddings
import peft_models
import pytest
import torch
from peft_models import assert_close
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import delora_kernels as dk
from delora_kernels.integrations.peft.fused import convolution, embedding


class Kind(NamedTuple):
    """How a model is made, an input of it, what a training step gives, and its first layer."""

    adapted: Callable[..., Any]
    drawn: Callable[[int, torch.dtype], Tensor]
    step: Callable[[Any, Tensor], dict[str, Tensor]]
    layer: str
    fused: type


KINDS = {
    "convolution": Kind(
        adapted_convolutions.adapted,
        lambda seed, dtype: adapted_convolutions.images(seed, dtype=dtype),
        peft_models.step,
        "first",
        convolution.FusedConv2d,
    ),
    "embedding": Kind(
        adapted_embeddings.adapted,
        lambda seed, dtype: adapted_embeddings.tokens(seed),
        adapted_embeddings.step,
        "table",
        embedding.FusedEmbedding,
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def made_of(kind: Kind, method: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor, Any]:
    """The model, its input, its first layer."""
    made = kind.adapted(method, seed, dtype=dtype)
    return made, kind.drawn(seed, dtype), getattr(made.base_model.model, kind.layer)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dtypes(kind: Kind, method: str, dtype: torch.dtype, autocast: bool, seed: int) -> None:
    """float32 factors on a bfloat16 base too."""
    made, x, _ = made_of(kind, method, seed, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = kind.step(made, x)
        dk.accelerate(made, strict=True)
        assert_close(kind.step(made, x), theirs, torch.bfloat16 if autocast else dtype)


def pickled(made: Any) -> Any:
    return pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_copies_stay_fused(kind: Kind, way: Callable[[Any], Any], seed: int) -> None:
    made, x, _ = made_of(kind, "dora", seed)
    dk.accelerate(made, strict=True)
    again = way(made)
    assert type(getattr(again.base_model.model, kind.layer)) is kind.fused
    assert torch.equal(again(x), made(x))
    assert made.get_layer_status() == again.get_layer_status()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled(kind: Kind, method: str, seed: int) -> None:
    """One graph, PEFT's numbers."""
    torch._dynamo.reset()
    made, x, _ = made_of(kind, method, seed)
    theirs = kind.step(made, x)
    dk.accelerate(made, strict=True)
    ours = kind.step(torch.compile(made, backend="aot_eager", fullgraph=True), x)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in ours.items()}, theirs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_exported(kind: Kind, method: str, strict: bool, seed: int) -> None:
    """A program in plain torch."""
    made, x, layer = made_of(kind, method, seed)
    dk.accelerate(made.eval(), strict=True)
    expected = layer(x)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=strict)
    assert "delora_kernels" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), expected)


def total_of(made: Any, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    def total(values: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(made, values, (x,))
        return y.square().sum()

    return total


def test_transforms(kind: Kind, seed: int) -> None:
    """torch.func differentiates the layer as PEFT's."""
    made, x, _ = made_of(kind, "dora", seed, torch.float64)
    values = dict(made.named_parameters())
    theirs = torch.func.grad(total_of(made, x))(values)
    dk.accelerate(made, strict=True)
    for name, ours in torch.func.grad(total_of(made, x))(values).items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-10, atol=1e-10)


def test_forward_mode(kind: Kind, seed: int) -> None:
    """DoRA's norm is a constant of forward mode too: as PEFT's, and as backward."""
    made, x, _ = made_of(kind, "dora", seed, torch.float64)
    dk.accelerate(made, strict=True)
    values = {name: p.detach() for name, p in made.named_parameters() if "lora_" in name}
    along = torch.func.jvp(total_of(made, x), (values,), (values,))[1]
    grads = torch.func.grad(total_of(made, x))(values)
    expected = torch.stack([(grads[name] * values[name]).sum() for name in values]).sum()
    torch.testing.assert_close(along, expected, rtol=1e-9, atol=1e-9)


def test_hooks_of_all_modules_see_every_call(kind: Kind, seed: int) -> None:
    made, x, layer = made_of(kind, "dora", seed, torch.float64)
    dk.accelerate(made, strict=True)
    kinds: list[str] = []
    handle = register_module_forward_hook(lambda module, *_: kinds.append(type(module).__name__))
    layer(x)
    handle.remove()
    assert any(kind.startswith("Dora") for kind in kinds)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_written_into_after_no_grad(kind: Kind, method: str, seed: int) -> None:
    """As PEFT's output: it is no view."""
    made, x, layer = made_of(kind, method, seed, torch.float64)
    dk.accelerate(made, strict=True)
    with torch.no_grad():
        y = layer(x)
    y[0] = nn.Parameter(torch.ones(1, dtype=torch.float64))
    assert y.requires_grad
