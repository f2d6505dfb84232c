"""adapted_linears: several modules of one x as one call, against each module alone."""

from typing import Any

import pytest
import torch
from nn_modules import KINDS, make
from shared_calls import sizes_of_shared_calls
from torch import Tensor, nn

from delora_kernels.nn import EtherLinear, GoatLinear, adapted_linears

taken = pytest.fixture(sizes_of_shared_calls)
PLAIN = ("lora", "dora", "delora")


def gradients(outputs: Any, x: Tensor, modules: list[nn.Module]) -> list[Any]:
    leaves = [x, *(p for module in modules for p in module.parameters() if p.requires_grad)]
    total = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


@pytest.mark.parametrize("kinds", [PLAIN, ("lora",) * 3, ("delora", "delora"), tuple(KINDS)], ids=str)
def test_as_one_by_one(kinds: tuple[str, ...], seed: int, taken: list[int]) -> None:
    """Outputs and every gradient in float64, through all outputs and through one."""
    torch.manual_seed(seed)
    modules = [make(kind)[0] for kind in kinds]
    x = torch.randn(2, 5, 14, dtype=torch.float64).requires_grad_()
    ours, theirs = adapted_linears(x, modules), tuple(module(x) for module in modules)
    assert taken == [len(kinds)]
    for y, expected in zip(ours, theirs, strict=True):
        assert y.shape == expected.shape
        assert (y - expected).abs().max() <= 1e-12 * expected.abs().max()
    for chosen in (slice(None), slice(1, 2)):
        found, wanted = (
            gradients(each[chosen], x, modules) for each in (adapted_linears(x, modules), tuple(m(x) for m in modules))
        )
        for grad, expected_grad in zip(found, wanted, strict=True):
            assert (grad is None) is (expected_grad is None)
            if grad is not None:
                assert (grad - expected_grad).abs().max() <= 1e-12 * expected_grad.abs().max()


def test_what_runs_alone(seed: int, taken: list[int]) -> None:
    """A merged module, hooked ones, another class and other methods, each at its place."""
    torch.manual_seed(seed)
    modules: list[Any] = [make(kind)[0] for kind in (*PLAIN, "lora", "lora", "lora")]
    modules[3].merge()
    modules[4].register_forward_hook(lambda module, args, y: 2 * y)

    class Own(type(modules[5])):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) + 1
            return y

    modules[5].__class__ = Own
    linear = nn.Linear(14, 10).double()
    modules += [linear, EtherLinear.from_linear(linear, 2), GoatLinear.from_linear(linear, experts=2, r=2)]
    x = torch.randn(3, 14, dtype=torch.float64)
    ours = adapted_linears(x, nn.ModuleList(modules))
    assert taken == [3]
    for y, module in zip(ours, modules, strict=True):
        expected = module(x)
        assert (y - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_dropout_is_of_training_alone(seed: int) -> None:
    """In training each module has a mask of its own, from torch's generator; in evaluation none."""
    torch.manual_seed(seed)
    modules = [make("lora", dropout_p=0.5)[0] for _ in range(2)]
    x = torch.randn(4, 14, dtype=torch.float64)
    drawn = []
    for _ in range(2):
        torch.manual_seed(seed)
        drawn.append(adapted_linears(x, modules))
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    for module in modules:
        module.eval()
    for y, before, module in zip(adapted_linears(x, modules), drawn[0], modules, strict=True):
        assert (y - module(x)).abs().max() <= 1e-12 * y.abs().max()
        assert not torch.equal(y, before)


@pytest.mark.parametrize(
    ("modules", "error", "words"),
    [
        ([], ValueError, "one module or more"),
        (3, TypeError, "a list of modules"),
        ([nn.Linear(4, 4), 3], TypeError, "a list of modules"),
    ],
)
def test_errors(modules: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        adapted_linears(torch.zeros(2, 4), modules)
    assert str(raised.value).startswith("adapted_linears: modules")
