"""lora_linears: several linears of one x as one call, against lora_linear one by one and the plain
formula.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from delora_kernels import functional as F
from delora_kernels import use_backend
from delora_kernels.autograd import function
from delora_kernels.functional import common

SIZES = ((20, 3), (8, 2), (24, 5))
K = 12


class Problem:
    """Arguments of a group of three, its leaves, the gradients that come back."""

    def __init__(self, seed: int, lead: tuple[int, ...] = (2, 5), dtype: torch.dtype = torch.float64, **but: Any):
        generator = torch.Generator().manual_seed(seed)
        factors = but.pop("factors", dtype)

        def drawn(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator).to(of)

        self.x = drawn(*lead, K)
        self.weights = [drawn(N, K) for N, _ in SIZES]
        self.A = [drawn(r, K, of=factors) for _, r in SIZES]
        self.B = [drawn(N, r, of=factors) for N, r in SIZES]
        self.biases: Any = [None, drawn(8), drawn(24)]
        self.scale: Any = 0.7
        self.dropout_p: Any = 0.0
        for name, value in but.items():
            setattr(self, name, value)
        self.leaves = [self.x, *self.A, *self.B]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.dys = [drawn(*lead, N) for N, _ in SIZES]

    def together(self, seed: Any = None) -> tuple[Tensor, ...]:
        given: dict[str, Any] = {"dropout_p": self.dropout_p, "seed": seed}
        return F.lora_linears(self.x, self.weights, self.A, self.B, self.scale, self.biases, **given)

    def alone(self, seed: Any = None) -> tuple[Tensor, ...]:
        scales, ps = ([v] * 3 if isinstance(v, float) else v for v in (self.scale, self.dropout_p))
        biases = self.biases or [None] * 3
        parts = zip(self.weights, self.A, self.B, scales, biases, ps, strict=True)
        return tuple(
            F.lora_linear(self.x, W, A, B, s, bias, dropout_p=p, seed=None if seed is None else seed + i)
            for i, (W, A, B, s, bias, p) in enumerate(parts)
        )

    def gradients(self, outputs: Any, chosen: tuple[int, ...] = (0, 1, 2)) -> list[Any]:
        ys = [outputs[i] for i in chosen]
        dys = [self.dys[i].to(outputs[i].dtype) for i in chosen]
        leaves = [leaf for leaf in self.leaves if leaf.requires_grad]
        return list(torch.autograd.grad(ys, leaves, dys, allow_unused=True, retain_graph=True))


def assert_alike(ours: Any, theirs: Any, tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) is (b is None), number
        if a is None:
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape), number
        limit = tolerance * float(b.double().abs().max()) if b.numel() else 0.0
        assert b.numel() == 0 or (a.double() - b.double()).abs().max() <= limit, number


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"lead": ()},
    "no token": {"lead": (0,)},
    "rows": {"lead": (7,)},
    "scales": {"scale": [0.5, 2.0, -1.0]},
    "no bias": {"biases": None},
    "dropout": {"dropout_p": 0.25},
    "dropout of one": {"dropout_p": [0.0, 0.4, 0.0], "scale": [1.0, 0.5, 2.0]},
    "float32": {"dtype": torch.float32},
    "float32 factors": {"dtype": torch.bfloat16, "factors": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("case", CASES)
def test_as_one_by_one(case: str, seed: int) -> None:
    problem = Problem(seed, **CASES[case])
    draw = 11 if "dropout" in case else None
    ours, theirs = problem.together(draw), problem.alone(draw)
    eps = torch.finfo(problem.x.dtype).eps
    # dx is a sum of six products, rounded to x's dtype after each in one of the two orders
    tolerance = 1e-12 if problem.x.dtype == torch.float64 else 8 * eps
    assert_alike(ours, theirs, tolerance)
    assert_alike(problem.gradients(ours), problem.gradients(theirs), tolerance)
    for chosen in ((1,), (0, 2)):
        assert_alike(problem.gradients(ours, chosen), problem.gradients(theirs, chosen), tolerance)
    with torch.no_grad():
        assert_alike(
            problem.together(draw), [y.detach() for y in ours], 0.0 if problem.x.dtype != torch.float32 else eps
        )


@pytest.mark.parametrize("what", ["x frozen", "A frozen", "one A frozen", "W trained", "bias trained", "B frozen"])
def test_what_is_trained(what: str, seed: int) -> None:
    problem = Problem(seed)
    frozen = {"x frozen": [problem.x], "A frozen": problem.A, "one A frozen": problem.A[:1], "B frozen": problem.B}
    for leaf in frozen.get(what, []):
        leaf.requires_grad_(False)
    more = {"W trained": problem.weights[1:2], "bias trained": problem.biases[2:]}.get(what, [])
    problem.leaves += [each.requires_grad_() for each in more]
    ours, theirs = problem.together(), problem.alone()
    assert_alike(ours, theirs, 1e-12)
    assert_alike(problem.gradients(ours), problem.gradients(theirs), 1e-12)


def test_formula(seed: int) -> None:
    """y_i = x (W_i + s_i B_i A_i)ᵀ + bias_i, and gradcheck, with masks too."""
    problem = Problem(seed, scale=[0.5, 2.0, -1.0])
    for i, y in enumerate(problem.together()):
        whole = problem.weights[i] + problem.scale[i] * problem.B[i] @ problem.A[i]
        expected = problem.x @ whole.T + (0 if problem.biases[i] is None else problem.biases[i])
        assert_alike([y], [expected], 1e-12)
    for p in (0.0, 0.5):
        small = Problem(seed, lead=(3,), dropout_p=p)
        assert torch.autograd.gradcheck(lambda *_, it=small: it.together(5), (*small.leaves,))


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_read_of_x(seed: int) -> None:
    """One projection of x for all three, one pass for dx and dA."""
    problem = Problem(seed)
    with _Ops() as seen:
        problem.gradients(problem.together())
    counts = {name: sum(f".{name}." in op for op in seen.names) for name in ("project", "expand", "input_backward")}
    assert counts == {"project": 1, "expand": 3, "input_backward": 1}


def test_backends_that_take_some(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the choice differs from linear to linear, each runs on its own."""
    asked: list[int] = []

    def choose(call: Any) -> str:
        asked.append(call.A.shape[0])
        return "eager" if call.A.shape[0] != 2 else "another"

    ran: list[str] = []
    run = function.run

    def running(family: Any, call: Any, backend: str, shape: Any) -> Any:
        ran.append(backend)
        return run(family, call, "eager", shape)

    monkeypatch.setattr(common, "choose", choose)
    monkeypatch.setattr(function, "run", running)
    problem = Problem(seed)
    ours = problem.together()
    assert asked[:3] == [3, 2, 5]
    assert ran == ["eager", "another", "eager"]
    monkeypatch.undo()
    assert_alike(ours, problem.alone(), 1e-12)


def test_autocast(seed: int) -> None:
    problem = Problem(seed, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = problem.together(), problem.alone()
    eps = torch.finfo(torch.bfloat16).eps
    assert_alike(ours, theirs, 2 * eps)
    assert_alike(problem.gradients(ours), problem.gradients(theirs), 8 * eps)


def test_extraordinary_passes(seed: int) -> None:
    """Batched gradients, checkpointing, torch.compile; second derivatives raise."""
    for options in ({}, {"dropout_p": 0.25}):
        problem = Problem(seed, **options)
        ours, theirs = problem.together(3), problem.alone(3)
        dys = [torch.stack([dy, 2 * dy]) for dy in problem.dys]
        batched = [torch.autograd.grad(ys, problem.leaves, dys, is_grads_batched=True) for ys in (ours, theirs)]
        assert_alike(*batched, 1e-12)
        again = checkpoint(problem.together, 3, use_reentrant=False)
        assert_alike(problem.gradients(again), problem.gradients(problem.alone(3)), 1e-12)
        dx = torch.autograd.grad(problem.together(3)[0].square().sum(), problem.x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="no second derivative"):
            dx.sum().backward()
    problem = Problem(seed)
    compiled = torch.compile(problem.together, fullgraph=True, backend="aot_eager")
    assert_alike(problem.gradients(compiled()), problem.gradients(problem.alone()), 1e-12)
    with use_backend("eager"):
        assert_alike(problem.together(), problem.alone(), 1e-12)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weights": []}, ValueError, "weights must hold one linear or more"),
        ({"scale": [1.0, 2.0]}, ValueError, "scale must hold 3 values, one for each of weights, got 2"),
        ({"biases": 3}, TypeError, "biases must be a list or tuple"),
        ({"dropout_p": [0.1, 0.2, 1.5]}, ValueError, "linear 2: lora_linear: dropout_p"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: str, seed: int) -> None:
    problem = Problem(seed)
    for name, value in change.items():
        setattr(problem, name, value)
    with pytest.raises(error, match=words) as raised:
        problem.together()
    assert str(raised.value).startswith("lora_linears")


def test_errors_name_the_linear(seed: int) -> None:
    problem = Problem(seed)
    problem.B[1] = problem.B[1][:, :1]
    with pytest.raises(ValueError, match="lora_linears, linear 1: lora_linear: B"):
        problem.together()
