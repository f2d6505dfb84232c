"""What docs/differences.md says of PEFT and of accelerated layers, side by side: each row that no
other test shows.
"""

import io
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from peft_models import model
from torch import Tensor

import delora_kernels as dk
from delora_kernels.testing import relative_error

METHODS = ("lora", "dora", "delora")


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(7, 12)


def both(method: str, seed: int, **options: Any) -> tuple[Any, Any]:
    """PEFT's adapted linear 12 → 20, and the same accelerated."""
    plain, made = (model(method, seed, **options) for _ in range(2))
    dk.accelerate(made, strict=True)
    return plain.base_model.model.first, made.base_model.model.first


def raises_after_an_edit(layer: Any, x: Tensor) -> bool:
    given = x.clone().requires_grad_() * 1
    y = layer(given)
    given.mul_(2)
    try:
        y.float().sum().backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_of_x_raises(method: str, x: Tensor, seed: int) -> None:
    """PEFT notices it only where its lora_A keeps x itself: no dropout, no cast, and not DeLoRA."""
    plain, made = both(method, seed)
    assert raises_after_an_edit(plain, x) is (method != "delora")
    assert raises_after_an_edit(made, x)
    plain, made = both(method, seed, dropout_p=0.5)
    assert not raises_after_an_edit(plain, x)
    assert raises_after_an_edit(made, x)
    plain, made = both(method, seed, dtype=torch.bfloat16)
    assert not raises_after_an_edit(plain, x.bfloat16())
    assert raises_after_an_edit(made, x.bfloat16())


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives(method: str, x: Tensor, seed: int) -> None:
    plain, made = both(method, seed)
    for layer in (plain, made):
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(given).square().sum(), given, create_graph=True)
        if layer is plain:
            gradient.sum().backward()
            assert given.grad is not None
        else:
            with pytest.raises(RuntimeError, match="has no second derivative"):
                gradient.sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_dropout_draws_other_masks(method: str, x: Tensor, seed: int) -> None:
    """The same seed gives other outputs, and torch's generator stands elsewhere; neither moves it
    without dropout.
    """
    for dropout_p in (0.5, 0.0):
        ends, outputs = [], []
        for layer in both(method, seed, dropout_p=dropout_p):
            torch.manual_seed(seed)
            start = torch.get_rng_state()
            outputs.append(layer(x))
            ends.append(torch.get_rng_state())
            assert torch.equal(start, ends[-1]) is (dropout_p == 0)
        assert torch.equal(*ends) is (dropout_p == 0)
        assert (relative_error(*outputs) < 1e-5) is (dropout_p == 0)


def kept(layer: Any, x: Tensor) -> Counter[tuple[int, ...]]:
    """Shapes of what is kept for backward beside the layer's own tensors."""
    own = {tensor.data_ptr() for tensor in itertools.chain(layer.parameters(), layer.buffers())}
    found: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            found[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return Counter(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept(method: str, dtype: torch.dtype, x: Tensor, seed: int) -> None:
    """Of tensors with a row for each token: x, one [T, r], and of DoRA one [T, N]."""
    plain, made = both(method, seed, dtype=dtype)
    theirs, ours = (
        Counter({s: n for s, n in kept(layer, x.to(dtype)).items() if s[0] == 7}) for layer in (plain, made)
    )
    r = made.r["default"]
    assert ours == Counter({(7, 12): 1, (7, r): 1} | ({(7, 20): 1} if method == "dora" else {}))
    assert all(theirs[shape] >= ours[shape] for shape in ours)
    assert theirs[7, 20] == (2 if method == "dora" else 0)


def test_a_pickled_layer_needs_this_library(seed: int) -> None:
    """Files of adapters do not; a whole model in torch.save does, until restore()."""
    made = model("lora", seed)
    dk.accelerate(made, strict=True)
    for restored in (False, True):
        file = io.BytesIO()
        torch.save(made, file)
        assert (b"delora_kernels" in file.getvalue()) is not restored
        dk.restore(made)
