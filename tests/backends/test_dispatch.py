"""Which backend an automatic choice takes, with stand-ins for those that can't run here."""

import logging
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from delora_kernels import backends, dispatch, explain, ops
from delora_kernels import functional as F
from delora_kernels.backends import eager

REFUSES = "a stand-in that takes nothing"


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Every backend runs and has eager's ops; the dict holds why a name does not take calls."""
    refused: dict[str, str | None] = dict.fromkeys(backends.NAMES)

    def stand_in(name: str) -> Any:
        return SimpleNamespace(
            **{op: getattr(eager, op) for op in (*ops.NAMES, "wants_scaled")} | {"supports": lambda call: refused[name]}
        )

    monkeypatch.setattr(backends, "loaded", {name: stand_in(name) for name in backends.NAMES})
    monkeypatch.setattr(backends, "_unavailable", dict.fromkeys(backends.NAMES))
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "reason_unasked", lambda name, call: None)
    monkeypatch.setattr(dispatch, "_requested", None)
    return refused


def arguments() -> tuple[torch.Tensor, ...]:
    return torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3, requires_grad=True), torch.ones(4, 1)


def test_triton_then_cuda_then_eager(stand_ins: dict[str, str | None], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, dispatch.__name__)
    order = []
    for name in ("triton", "cuda", "eager"):
        found = explain("lora_linear", *arguments())
        order.append(found.backend)
        behind = dict.fromkeys(list(backends.NAMES)[len(order) :], f"{name} comes first")
        assert found.reasons == dict.fromkeys(order[:-1], REFUSES) | behind
        stand_ins[name] = REFUSES
    assert order == list(backends.NAMES)
    assert [record.getMessage() for record in caplog.records] == [
        f"backend {name} not used: {REFUSES}" for name in ("triton", "cuda")
    ], "each reason once"
    with pytest.raises(RuntimeError, match="no backend takes this call"):
        F.lora_linear(*arguments())


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_request_is_the_reason_against_all_others(name: str, stand_ins: dict[str, str | None]) -> None:
    """Also against those that could not take the call: nobody asked them."""
    stand_ins |= dict.fromkeys([other for other in backends.NAMES if other != name], REFUSES)
    with dispatch.use_backend(name):
        found = explain("lora_linear", *arguments())
    assert found.backend == name
    assert found.reasons == {other: f"{name} was requested" for other in backends.NAMES if other != name}


def test_what_is_no_function_is_named_in_a_line() -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(3, 3)] * 50)
    with pytest.raises(
        ValueError, match="explain: function must be one of lora_linear, .*got a Sequential; pass"
    ) as of:
        explain(model)
    assert "accelerate(model)" in str(of.value)
    assert len(str(of.value)) < 150 + sum(len(name) + 2 for name in F.CALLS)
    with pytest.raises(ValueError, match="got 'lora'; pass one or its name$"):
        explain("lora")


def test_what_does_not_run_here_is_not_asked(stand_ins: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._unavailable, "triton", "triton is not installed")
    monkeypatch.delitem(backends.loaded, "triton")
    assert explain("dora_linear", *arguments(), torch.ones(4)).backend == "cuda"


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_has_every_op(name: str) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    module = backends.load(name)
    assert isinstance(module, ModuleType)
    assert [op for op in ops.NAMES if not callable(getattr(module, op, None))] == []
    assert module.weight_grad is eager.weight_grad, "what a backend lacks, it takes from another"


def test_backward_takes_each_op_from_where_the_backend_has_it(stand_ins: dict[str, str | None], seed: int) -> None:
    """A backend with one op of its own: the call and its gradients meet both, and are what they
    were.
    """
    torch.manual_seed(seed)
    x, W, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 3), (4, 3), (2, 3), (4, 2)))
    leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
    expected = torch.autograd.grad((x @ W.T + x @ A.T @ B.T).square().sum(), leaves)
    called: list[str] = []

    def own(*args: Any) -> Any:
        called.append("cuda")
        return eager.input_backward(*args)

    stand_ins["triton"] = REFUSES
    backends.load("cuda").input_backward = own  # type: ignore[assignment]
    backends.load("triton").project = None  # type: ignore[assignment]
    got = torch.autograd.grad(F.lora_linear(x, W, A, B).square().sum(), leaves)
    assert called == ["cuda"]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(got, expected, strict=True))
