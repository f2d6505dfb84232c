"""Layers on bases that can't be read: the base runs its own forward under autograd, and the rank
term, fused, is added to it: PEFT's numbers, one token-sized tensor.
"""

from typing import Any

import peft
import pytest
import torch
from peft_models import METHODS, assert_close, config, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import delora_kernels as dk
from delora_kernels import reference
from delora_kernels.functional.rank_term import add_rank_term
from delora_kernels.testing import relative_error

BESIDE = ("lora", "rslora", "delora")


class Quantises(nn.Linear):
    """A linear that rounds its input, as LLM.int8() does; whose gradient is that of the product."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().amax(dim=-1, keepdim=True) / 127
        rounded = x + ((x / scale).round() * scale - x).detach()
        return nn.functional.linear(rounded, self.weight, self.bias)


class Two(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Quantises(width, width), Quantises(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(nn.functional.gelu(self.first(x)))
        return y


def adapted(method: str, seed: int, dtype: torch.dtype = torch.float32, width: int = 16, p: float = 0.0) -> Any:
    torch.manual_seed(seed)
    targets = {"target_modules": ["first", "second"]}
    return peft.get_peft_model(Two(width).to(dtype), config(method, dropout_p=p, **targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_parity(method: str, dtype: torch.dtype, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Outputs and every gradient, those of the base's own forward among them; three states."""
    made = adapted(method, seed, dtype)
    x = torch.randn(2, 5, 16, dtype=dtype)
    theirs = step(made, x)
    report = dk.accelerate(made)
    state = "own forward" if method == "dora" else "rank term fused"
    assert [layer.state for layer in report.layers] == [state, state]
    assert ("rank term alone fused, 2: the base layer is " in str(report)) == (method != "dora")
    with pytest.raises(RuntimeError, match="not every adapter layer can be fused"):
        dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", BESIDE)
def test_autocast(method: str, dtype: torch.dtype, seed: int) -> None:
    made = adapted(method, seed, dtype)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(made, x)
        dk.accelerate(made)
        assert_close(step(made, x), theirs, torch.bfloat16)


@pytest.mark.parametrize("method", BESIDE)
def test_several_adapters(method: str, seed: int) -> None:
    made = adapted(method, seed)
    made.add_adapter("other", config(method, r=2, target_modules=["first"]))
    made.base_model.set_adapter(["default", "other"])
    x = torch.randn(2, 5, 16)
    theirs = step(made, x)
    dk.accelerate(made)
    assert_close(step(made, x), theirs)


@pytest.mark.parametrize("stacked", [False, True])
def test_dropout(stacked: bool, seed: int) -> None:
    """A mask of its own for each adapter, the same one backward: by finite differences."""
    torch.manual_seed(seed)
    ranks, p = ((2, 1), (0.5, 0.25)) if stacked else ((), (0.5,))
    x, A, B = torch.randn(7, 5), torch.randn(3, 5), torch.randn(4, 3)
    tensors = [each.double().requires_grad_() for each in (torch.randn(7, 4), x, A, B)]

    def term(*tensors: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return add_rank_term(*tensors, 1.5, ranks=ranks, dropout_p=p)

    assert torch.autograd.gradcheck(term, tensors)
    y, x, A, B = (each.detach() for each in tensors)
    drawn = torch.stack([term(y, x, A, B) for _ in range(2)])
    assert torch.equal(drawn[0], drawn[1])
    assert relative_error(drawn[0], y + 1.5 * x @ A.T @ B.T) > 0.01


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.bfloat16, torch.float32)])
def test_the_formula(dtypes: tuple[torch.dtype, ...], seed: int) -> None:
    """Against float64, at most twice as far off as eager PyTorch; y is not written to."""
    torch.manual_seed(seed)
    of_y, of_x, of_factors = dtypes
    y, x = torch.randn(37, 24, dtype=of_y), torch.randn(37, 20, dtype=of_x)
    A, B = torch.randn(3, 20, dtype=of_factors), torch.randn(24, 3, dtype=of_factors)
    sent, before = torch.randn(37, 24, dtype=of_y), y.clone()

    def results(function: Any, *tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, sent.to(out.dtype))]

    def eager(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return y + (nn.functional.linear(nn.functional.linear(x.to(A.dtype), A), B) * 1.5).to(y.dtype)

    ours, theirs = results(lambda *t: add_rank_term(*t, 1.5), y, x, A, B), results(eager, y, x, A, B)
    exact = results(eager, *(each.double() for each in (y, x, A, B)))
    zero = torch.zeros(24, 20, dtype=torch.float64)
    same = y.double() + reference.lora_linear(x.double(), zero, A.double(), B.double(), 1.5)
    assert relative_error(exact[0], same) < 1e-14
    for got, peft_like, truth in zip(ours, theirs, exact, strict=True):
        assert got.dtype == peft_like.dtype
        floor = 4 * torch.finfo(got.dtype).eps
        assert relative_error(got, truth) <= 2 * relative_error(peft_like, truth) + floor
    assert torch.equal(y, before)


class Written(TorchDispatchMode):
    """Bytes of the token-sized tensors that operations make."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T, self.bytes = T, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        memory = {a.untyped_storage().data_ptr() for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and out.shape[0] == self.T and out.untyped_storage().data_ptr() not in memory:
            self.bytes += out.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("method", ["lora", "delora"])
def test_bytes_of_the_branch(method: str, seed: int) -> None:
    """At most 0.4 of what PEFT's branch allocates forward, beyond the base's own."""
    layer = adapted(method, seed, width=64).base_model.model.first
    x = torch.randn(96, 64)

    def written(run: Any) -> int:
        with Written(96) as mode:
            run(x)
        return mode.bytes

    base = written(layer.base_layer)
    theirs = written(layer) - base
    dk.accelerate(layer)
    assert written(layer) - base <= 0.4 * theirs


def test_autocast_gives_the_wider_dtype(seed: int) -> None:
    """As PEFT's sum of the two does."""
    torch.manual_seed(seed)
    x, A, B = torch.randn(6, 5), torch.randn(2, 5), torch.randn(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            y = torch.randn(6, 4).to(dtype)
            term = nn.functional.linear(nn.functional.linear(x, A), B)
            got, expected = add_rank_term(y, x, A, B), y + term
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-5)


def test_unusual_outputs(seed: int) -> None:
    """What is no plain tensor, or of another shape than the branch's, gets PEFT's sum."""
    torch.manual_seed(seed)
    x, A, B = torch.randn(6, 5), torch.randn(2, 5), torch.randn(4, 2)
    for y in (torch.randn(4), torch.randn(3, 6, 4)):
        torch.testing.assert_close(add_rank_term(y, x, A, B, 2.0), y + 2 * x @ A.T @ B.T)
