"""A form is taken only where the module's own forward is x Wᵀ + bias of the W that it reads."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from delora_kernels.bases import StoredBase, numeric_check, register, stored
from delora_kernels.bases.read import base_in

K, N = 24, 40


class Packed(nn.Module):
    """A linear of another library: int8 codes, and a scale for each row."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("codes", torch.randint(-127, 128, (N, K), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(N, 1) / 127)
        self.bias = nn.Parameter(torch.randn(N), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.codes.to(x.dtype) * self.scales.to(x.dtype), self.bias)


class PackedBase(StoredBase):
    """What its author registers."""

    @classmethod
    def of(cls, module: Any) -> "PackedBase":
        base = cls((module.out_features, module.in_features), module.codes.device, module.bias)
        base.codes, base.scales = module.codes, module.scales
        return base

    def dense(self, dtype: torch.dtype) -> Tensor:
        made: Tensor = self.codes.to(dtype) * self.scales.to(dtype)
        return made


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry and what has been found out are the test's own."""
    monkeypatch.setattr(stored, "FORMS", {**stored.FORMS, f"{__name__}.Packed": PackedBase})
    monkeypatch.setattr(numeric_check, "_found", {})


def test_a_registered_form_is_read(seed: int) -> None:
    torch.manual_seed(seed)
    module = Packed()
    base = base_in(module)
    assert isinstance(base, PackedBase)
    torch.testing.assert_close(linear(torch.eye(K), base.dense(torch.float32)) + module.bias, module(torch.eye(K)))


def _quantises_per_token(x: Tensor, levels: int) -> Tensor:
    step = x.abs().amax(dim=-1, keepdim=True) / levels
    return (x / step).round() * step


CHANGES: dict[str, Any] = {
    "int8 tokens": lambda self, x: Packed.forward(self, _quantises_per_token(x, 127)),
    "float8 tokens": lambda self, x: Packed.forward(self, x.to(torch.float8_e4m3fn).to(x.dtype)),
    "bfloat16 tokens": lambda self, x: Packed.forward(self, x.to(torch.bfloat16).to(x.dtype)),
    "int8 tokens but for large ones": lambda self, x: Packed.forward(
        self, torch.where(x.abs() > 6, x, _quantises_per_token(x.clamp(-6, 6), 127))
    ),
    "no bias": lambda self, x: Packed.forward(self, x) - self.bias,
    "a scale": lambda self, x: Packed.forward(self, x) * 1.001,
    "a clamp": lambda self, x: Packed.forward(self, x.clamp(-10, 10)),
    "transposed": lambda self, x: Packed.forward(self, x.flip(-1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whoever_computes_something_else_is_not_read(dtype: torch.dtype, seed: int) -> None:
    """And the very forward is, for any weights."""
    torch.manual_seed(seed)
    for name, forward in {"none": Packed.forward, **CHANGES}.items():
        if dtype != torch.float32 and name in ("bfloat16 tokens", "a scale"):
            continue  # which is within its rounding
        kind = type("Changed", (Packed,), {"forward": forward, "__module__": __name__, "__qualname__": "Packed"})
        for _ in range(5):
            base = PackedBase.of(module := kind())
            base.compute_dtype = dtype
            module.bias.data = module.bias.to(dtype)
            theirs, ours = numeric_check.errors(module, base)
            assert (theirs <= 2 * ours) == (name == "none"), (name, theirs, ours)


def test_the_reason_and_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first base of a key is compared; an error in comparing is a reason too."""
    torch.manual_seed(seed)
    calls: list[int] = []
    monkeypatch.setattr(numeric_check, "errors", lambda *_: calls.append(1) or (1.0, 0.1))
    for _ in range(3):
        assert "it is off by 1e+00 where torch's linear is off by 1e-01" in str(base_in(Packed()))
    assert len(calls) == 1
    numeric_check._found.clear()
    monkeypatch.setattr(numeric_check, "errors", lambda *_: 1 // 0)
    assert "raised ZeroDivisionError" in str(base_in(Packed()))


def test_nothing_of_the_check_reaches_the_module(seed: int) -> None:
    """What a forward settles or writes, it settles on a copy; the caller's random numbers stay."""
    torch.manual_seed(seed)

    class Settles(Packed):
        def forward(self, x: Tensor) -> Tensor:
            assert self.training
            assert x.requires_grad
            assert torch.is_grad_enabled()
            self.settled = True
            self.bias.data = self.bias.data * 1.0
            self.codes = self.codes.clone()
            return super().forward(x)

    Settles.__module__, Settles.__qualname__ = __name__, "Packed"
    module = Settles().eval()
    codes, bias, state = module.codes, module.bias.data_ptr(), torch.get_rng_state()
    with torch.no_grad():
        assert isinstance(base_in(module), PackedBase)
    assert not hasattr(module, "settled")
    assert (module.codes is codes, module.bias.data_ptr() == bias, module.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_never_while_tracing(seed: int) -> None:
    """A program that is traced first says what to do; later it may be compared."""
    torch.manual_seed(seed)
    module = Packed()
    with torch._subclasses.FakeTensorMode():
        assert "call accelerate(model) before" in str(base_in(module))
    assert isinstance(base_in(module), PackedBase)


def test_what_register_refuses() -> None:
    with pytest.raises(TypeError, match=r"register: name must be a class's dotted name, got 'Packed'"):
        register("Packed", PackedBase)
    with pytest.raises(TypeError, match="register: form must be a subclass of StoredBase"):
        register("a.Packed", Packed)  # type: ignore[arg-type]
