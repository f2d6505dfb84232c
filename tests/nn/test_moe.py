"""The mixtures as modules: their start, their outputs and gradients, losses inside every way to
train.
"""

import copy
from typing import Any

import pytest
import torch
from golden_cases import relative_error
from nn_mixtures import KINDS, Stack, expected, expected_loss, leaves_of, loss_of, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from delora_kernels.nn import MoELoRALinear, lambda_parameter_groups, set_loss_scale

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def fresh(seed: int) -> None:
    torch.manual_seed(seed)


@every_kind
def test_output_and_gradients_are_the_references(kind: str) -> None:
    module, _ = make(kind, balance_coef=0.4, z_coef=0.2, balance="paper")
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    grad_out = torch.randn(3, 5, 12, dtype=torch.float64)
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert names == {"A", "B", "router"} | {"delora": {"lam"}, "goat-dora": {"magnitude"}}.get(kind, set())
    leaves = leaves_of(module)
    y, stats = expected(module, leaves, x)
    loss = (y * grad_out).sum() + 0.4 * stats.balance_loss("paper") + 0.2 * stats.z
    want = torch.autograd.grad(loss, [x, *leaves.values()])
    (got := module(x)).backward(grad_out)
    assert relative_error(got, y) <= 1e-12
    assert relative_error(module.balance_loss, stats.balance_loss("paper")) <= 1e-12
    assert not module.balance_loss.requires_grad
    for name, grad in zip(["x", *leaves], want, strict=True):
        ours = x.grad if name == "x" else module.get_parameter(name).grad
        assert relative_error(ours, grad) <= 1e-11, name


@every_kind
def test_start(kind: str) -> None:
    """Plain and normalised experts: exactly the frozen linear. GOAT: where all gates are 1/E, to
    rounding.
    """
    module, linear = make(kind, trained=False, **({} if kind != "goat-folded" else {"init_cof": None}))
    x = torch.randn(7, 16, dtype=torch.float64)
    if kind.startswith("goat"):
        assert relative_error(module(x), linear(x)) > 1e-3
        module.top_k = None
        module.router.data.zero_()
        # the folded weight is as exact as the float32 factors of the SVD
        assert relative_error(module(x), linear(x)) <= (1e-14 if kind == "goat" else 1e-6)
    else:
        assert torch.equal(module(x), linear(x))


@every_kind
def test_switched_off_it_is_the_frozen_linear(kind: str) -> None:
    module, linear = make(kind, torch.bfloat16)
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    x = torch.randn(7, 16).bfloat16()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    module(x).float().square().sum().backward()
    optimizer.step()
    module.enabled = False
    assert torch.equal(module(x), linear(x))
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())
    with pytest.raises(RuntimeError, match="merge: a mixture weighs its experts anew"):
        module.merge()


@every_kind
def test_state_dict_brings_it_back(kind: str) -> None:
    module, linear = make(kind)
    again = KINDS[kind][0].from_linear(copy.deepcopy(linear), **{"r": 2, "experts": 4} | KINDS[kind][1])
    again.load_state_dict(module.state_dict())
    x = torch.randn(7, 16, dtype=torch.float64)
    assert torch.equal(again(x), module(x))
    assert repr(again) == repr(module)


@every_kind
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_balance_gradient_comes_once(kind: str, reentrant: bool | None) -> None:
    """Plain, and under both kinds of checkpointing: the gradients of the loss with the balance loss
    added to it.
    """
    module, _ = make(kind)
    x = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    leaves = {"router": module.router.detach().clone().requires_grad_()}
    y, stats = expected(module, leaves, x.detach())
    (want,) = torch.autograd.grad(y.square().sum() + 0.7 * stats.balance_loss(), list(leaves.values()))
    module.balance_coef = 0.7
    out = module(x) if reentrant is None else checkpoint(module, x, use_reentrant=reentrant)
    out.square().sum().backward()
    assert relative_error(module.router.grad, want) <= 1e-12


@pytest.mark.parametrize("as_tensor", [False, True])
def test_loss_scale_and_accumulation(as_tensor: bool) -> None:
    """A loss times S / steps: the gradient is S times that of the mean over the steps, the balance
    losses included.
    """
    S, steps = 1024.0, 3
    module, _ = make("goat")
    model = nn.Sequential(module)
    batches = [torch.randn(9, 16, dtype=torch.float64) for _ in range(steps)]
    leaf = module.router.detach().clone().requires_grad_()
    total = 0
    for x in batches:
        y, stats = expected(module, {"router": leaf}, x)
        total = total + (y.square().sum() + 0.7 * stats.balance_loss()) / steps
    (want,) = torch.autograd.grad(total, leaf)
    module.balance_coef = 0.7
    set_loss_scale(model, torch.tensor(S / steps, dtype=torch.float64) if as_tensor else S / steps)
    for x in batches:
        (model(x).square().sum() * S / steps).backward()
    assert relative_error(module.router.grad, S * want) <= 1e-12


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_grad_scaler(reentrant: bool | None) -> None:
    """Steps under a GradScaler that grows, meets an infinity and backs off: those of the loss with
    balance losses.
    """
    stack, x = Stack(reentrant), torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    leaves, exact = leaves_of(stack), copy.deepcopy(stack)
    ours = torch.optim.SGD([p for p in stack.parameters() if p.requires_grad], lr=1e-2)
    theirs = torch.optim.SGD(leaves.values(), lr=1e-2)
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1), []
    for step in range(4):
        scales.append(scaler.get_scale())
        set_loss_scale(stack, scales[-1])
        scaler.scale(loss_of(stack(x))).backward()
        if step == 1:
            stack.layers[0].router.grad[0, 0] = torch.inf
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()
        if step != 1:
            expected_loss(exact, leaves, x.detach()).backward()
            theirs.step()
            theirs.zero_grad()
    assert scales == [2.0**10, 2.0**11, 2.0**10, 2.0**11]
    for name, leaf in leaves.items():
        assert relative_error(stack.get_parameter(name), leaf) <= 1e-12, name


def test_compiled_module_is_the_module() -> None:
    module, _ = make("goat", torch.float32, balance_coef=0.3)
    x, grads = torch.randn(9, 16), []
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    for each in (module, compiled):
        each(x).square().sum().backward()
        grads.append([p.grad for p in each.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(module.balance_loss, compiled.balance_loss)


def test_no_losses_outside_training() -> None:
    module, _ = make("moe", balance_coef=0.3, z_coef=0.3)
    plain, _ = make("moe")
    plain.load_state_dict(module.state_dict())
    x = torch.randn(9, 16, dtype=torch.float64)
    for each in (module.eval(), plain):
        each(x).sum().backward()
    assert torch.equal(module.router.grad, plain.router.grad)


def test_padding_is_left_out_of_the_statistics() -> None:
    module, _ = make("moe")
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    mask = torch.arange(6).expand(2, 6) < 4
    y = module(x, mask)
    stats = module.stats
    assert torch.equal(y, module(x))
    module(x[:, :4])
    assert relative_error(stats.probability, module.stats.probability) <= 1e-14


def test_experts_strengths_are_lambdas() -> None:
    """lambda_parameter_groups finds λ of normalised experts too."""
    module, _ = make("delora")
    rest, lams = lambda_parameter_groups(nn.Sequential(module), lr=1e-3, lam_lr=1e-2)
    assert [id(p) for p in lams["params"]] == [id(module.lam)]
    assert {id(p) for p in rest["params"]} == {id(p) for p in (module.A, module.B, module.router)}


def test_every_expert_can_be_trained(seed: int) -> None:
    """AdamW on a target that is a mixture itself: every expert's factors move, and the loss falls
    by half or more.
    """
    torch.manual_seed(seed)
    teacher, _ = make("moe", torch.float32)
    student = MoELoRALinear.from_linear(nn.Linear(16, 12), 4, 4, 2)
    student.weight.data.copy_(teacher.weight)
    student.bias.data.copy_(teacher.bias)
    x = torch.randn(256, 16)
    target = teacher(x).detach()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=2e-2, weight_decay=0)
    losses, start = [], {name: value.detach().clone() for name, value in student.named_parameters()}
    for _ in range(150):
        loss = (student(x) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] <= 0.5 * losses[0]
    for factor in ("A", "B"):
        moved = (getattr(student, factor).detach() - start[factor]).flatten(1).norm(dim=1)
        assert (moved > 0).all(), factor


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"experts": 0}, ValueError, "experts must be ≥ 1, got 0"),
        ({"experts": 2.0}, TypeError, "experts must be an int"),
        ({"top_k": 5}, ValueError, "top_k must be from 1 to experts = 4"),
        ({"balance": "switch"}, ValueError, "balance must be one of"),
        ({"balance_coef": -1.0}, ValueError, "balance_coef must be ≥ 0"),
        ({"residual": "none"}, ValueError, "residual must be one of"),
        ({"start": "svd"}, ValueError, "start must be one of"),
        ({"r": 5}, ValueError, "r must be at most"),
    ],
)
def test_errors(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make("goat", trained=False, **options)
