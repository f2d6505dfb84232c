"""lora_linear_by_sample: each sample's own adapter, against the formula sample by sample."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from delora_kernels import functional as F
from delora_kernels import reference
from delora_kernels.autograd.alike_segments import are_alike
from delora_kernels.functional.lora_by_sample import lora_by_sample_call

RANKS = (3, 1, 4)


def tensors(
    seed: int, dtype: torch.dtype, shape: tuple[int, ...], K: int = 12, N: int = 9, ranks: tuple[int, ...] = RANKS
) -> dict[str, Any]:
    torch.manual_seed(seed)
    made = {
        "x": torch.randn(*shape, K, dtype=dtype),
        "weight": torch.randn(N, K, dtype=dtype) / K**0.5,
        "bias": torch.randn(N, dtype=dtype),
    }
    factors = {
        "A": [torch.randn(r, K, dtype=dtype) / K**0.5 for r in ranks],
        "B": [torch.randn(N, r, dtype=dtype) for r in ranks],
    }
    for each in (*made.values(), *factors["A"], *factors["B"]):
        each.requires_grad_()
    return made | factors


def every(given: dict[str, Any]) -> list[torch.Tensor]:
    return [given["x"], given["weight"], given["bias"], *given["A"], *given["B"]]


@pytest.mark.parametrize("adapters", [(2, None, 0, 2, 2, 0), (0, 0, 1, 1, 2, 2), (None,) * 6, (1,) * 6], ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 2, 20), (6, 0)], ids=str)
def test_the_formula(shape: tuple[int, ...], adapters: tuple[int | None, ...], seed: int) -> None:
    """Values and every gradient in float64; an adapter without samples gets none."""
    given, scale = tensors(seed, torch.float64, shape), [1.5, -2.0, 0.5]
    y = F.lora_linear_by_sample(**given, adapters=adapters, scale=scale)
    expected = reference.lora_linear_by_sample(**given, adapters=adapters, scale=scale)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, every(given), dy, allow_unused=True) for out in (y, expected))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "adapters", "alike"),
    [
        ((3, 40), (2, 0, 1), True),
        ((3, 2, 20), (0, 1, 2), True),
        ((6, 1), (2, 0, 1, 1, 0, 2), True),
        ((6,), (2, 2, 0, 0, 1, 1), True),
        ((3, 0), (0, 1, 2), True),
        ((4, 40), (2, 0, 1, 1), False),
        ((4, 40), (2, 0, None, 1), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("wanted", ["all", "x", "A", "B"])
def test_segments_that_are_alike_are_one_batch(
    wanted: str, shape: tuple[int, ...], adapters: tuple[int | None, ...], alike: bool, seed: int
) -> None:
    """Of one length, one for each adapter, brought together or as they stand: values and whatever
    gradients are asked for, in float64; with a bias and without.
    """
    given = tensors(seed, torch.float64, shape, ranks=(3, 3, 3))
    given["bias"] = given["bias"] if wanted == "all" else None
    named = {"x": [given["x"]], "A": given["A"], "B": given["B"]}
    leaves = [*named["x"], *named["A"], *named["B"]] if wanted == "all" else named[wanted]
    for each in (given["x"], given["weight"], *given["A"], *given["B"]):
        each.requires_grad_(any(each is leaf for leaf in leaves))
    options = lora_by_sample_call(**given, adapters=adapters, scale=-1.5).options
    assert are_alike(options) is alike
    outputs = [f.lora_linear_by_sample(**given, adapters=adapters, scale=-1.5) for f in (F, reference)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(outputs[0])
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, dy) for y in outputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_ranks_or_scales_of_their_own_are_not_alike(seed: int) -> None:
    for ranks, scale, alike in (((3, 3, 3), [1.0, 1.0, 2.0], False), (RANKS, 1.0, False), ((3, 3, 3), 1.0, True)):
        given = tensors(seed, torch.float64, (3, 40), ranks=ranks)
        assert are_alike(lora_by_sample_call(**given, adapters=(0, 1, 2), scale=scale).options) is alike


def test_a_device_need_not_wait_for_rows_brought_together(seed: int) -> None:
    """Their order is made on the device: no tensor is made of numbers on the host."""

    names: set[str] = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    given = tensors(seed, torch.float32, (6, 2))
    with Seen():
        F.lora_linear_by_sample(**given, adapters=(2, None, 0, 2, 2, 0))
    assert "index_select" in names
    assert not names & {"lift_fresh", "_to_copy", "_local_scalar_dense", "nonzero"}


def test_nothing_is_written_into_what_is_given(seed: int) -> None:
    given = tensors(seed, torch.float32, (6, 2))
    before = [each.detach().clone() for each in every(given)]
    y = F.lora_linear_by_sample(**given, adapters=[0, 1, 2, 0, 1, 2])
    dy = torch.ones_like(y)
    y.backward(dy)
    assert torch.equal(dy, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(every(given), before, strict=True))


def test_compiled_and_exported(seed: int) -> None:
    """One graph; an exported program is plain torch."""
    torch._dynamo.reset()
    given = tensors(seed, torch.float32, (6, 3))
    factors = {name: value for name, value in given.items() if name != "x"}

    class Linear(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.lora_linear_by_sample(x, **factors, adapters=(2, None, 0, 2, 2, 0), scale=0.5)

    expected = Linear()(given["x"])
    compiled = torch.compile(Linear(), backend="aot_eager", fullgraph=True)(given["x"])
    torch.testing.assert_close(compiled, expected)
    dy = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(compiled, [given["x"], given["B"][2]], dy),
        torch.autograd.grad(expected, [given["x"], given["B"][2]], dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        program = torch.export.export(Linear(), (given["x"].detach(),))
    assert "delora_kernels" not in str(program.graph)
    torch.testing.assert_close(program.module()(given["x"]), expected)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "A": ({"A": torch.ones(3, 12)}, "lora_linear_by_sample: A must be a list or tuple"),
    "B": ({"B": [torch.ones(9, 3)]}, "B must be 3 factors, as many as A, got 1"),
    "shape": ({"B": [torch.ones(9, 3), torch.ones(9, 2), torch.ones(9, 4)]}, r"B\[1\]"),
    "adapters": ({"adapters": [0]}, "adapters must be 2 entries, one for each sample of x, got 1"),
    "place": ({"adapters": [0, 3]}, "adapters must be places from 0 to 2, or None, got 3"),
    "scale": ({"scale": [1.0]}, "scale must be a number, or 3 of them"),
    "x": ({"x": torch.ones(12), "adapters": [0] * 12}, r"x must be \[batch, ..., K\]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    given = tensors(0, torch.float32, (2, 5)) | {"adapters": [0, 1]}
    change, text = ERRORS[case]
    with pytest.raises((TypeError, ValueError), match=text):
        F.lora_linear_by_sample(**given | change)


def test_second_derivatives_are_refused(seed: int) -> None:
    given = tensors(seed, torch.float64, (2, 5))
    y = F.lora_linear_by_sample(**given, adapters=[0, 1])
    (dx,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"reference\.lora_linear_by_sample"):
        dx.sum().backward()
