"""training_report: every planted fault raises an alarm that names it, and nothing healthy does."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from expert_models import adapted, block, routed
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.integrations.peft.fused import experts as fused_experts


class Dense(nn.Module):
    """Two linears, of which a forward pass may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        return y[:, :5] if self.skips else self.second(y.tanh())


def dense(seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["first", "second"], **options)
    return peft.get_peft_model(Dense(), config)


def experts(seed: int, zero: bool = True) -> Any:
    """The start of training: B = 0."""
    model = adapted(block(seed=seed), seed=seed + 1)
    if zero:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
    return model


def optimizer_of(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def loss_of(model: Any, seed: int) -> Tensor:
    """Of random tokens; experts 1 and 2 get none."""
    if isinstance(model.base_model.model, Dense):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        y = model(x)
    else:
        x, chosen, weights = routed(12, seed)
        y = model(x.requires_grad_(), torch.where(chosen == 2, 3, chosen), weights)
    return (y - 1).square().mean()


def train(model: Any, optimizer: Any, steps: int = 6, accumulation: int = 1) -> None:
    for step in range(steps):
        for part in range(accumulation):
            loss_of(model, 10 * step + part).backward()
        optimizer.step()
        optimizer.zero_grad()


def report_of(model: Any, **options: Any) -> Any:
    optimizer = optimizer_of(model, **options)
    with dk.watch_training(model, optimizer):
        train(model, optimizer)
    return dk.training_report(model)


MODELS: dict[str, Callable[[int], Any]] = {"dense": dense, "experts": experts}


def _accelerated(model: Any) -> Any:
    dk.accelerate(model)
    return model


def _frozen_A(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


HEALTHY: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "accelerated": _accelerated,
    "frozen A": _frozen_A,
    "checkpointed": lambda model: _checkpointed(model),
}


def _checkpointed(model: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    inner = model.base_model.model
    own = inner.forward
    inner.forward = lambda *args: checkpoint(own, *args, use_reentrant=False)
    return model


@pytest.mark.parametrize("case", HEALTHY)
@pytest.mark.parametrize("kind", MODELS)
def test_no_alarm_on_right_runs(kind: str, case: str, seed: int) -> None:
    model = HEALTHY[case](MODELS[kind](seed))
    report = report_of(model)
    assert report.alarms == (), report
    assert report.steps == 6
    moved = sum(each.change > 0 for each in report.tensors)  # weight decay moves what no token came to
    assert f"{moved} of {len(report.tensors)} adapter tensors moved in 6 steps" in str(report)
    assert all(each.change > 0 and each.gradient > 0 for each in report.tensors if each.tokens)
    untouched = {each.expert for each in report.without_tokens}
    assert untouched == ({1, 2} if kind == "experts" else set())


@pytest.mark.parametrize("kind", MODELS)
def test_no_alarm_at_every_moment(kind: str, seed: int) -> None:
    """Before anything, after one backward pass with B = 0, in warm-up at lr 0, in the middle of
    accumulation, where a GradScaler leaves steps out.
    """
    model = MODELS[kind](seed)
    assert dk.training_report(model).alarms == ()
    optimizer = optimizer_of(model, lr=0.0)
    with dk.watch_training(model, optimizer):
        assert dk.training_report(model).alarms == ()
        loss_of(model, 0).backward()
        report = dk.training_report(model)
        assert report.alarms == ()
        assert {each.gradient for each in report.tensors if "lora_A" in each.name and each.tokens} == {0.0}
        train(model, optimizer, steps=2)
        report = dk.training_report(model)
        assert (report.alarms, report.steps) == ((), 0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        train(model, optimizer, steps=1, accumulation=3)
        loss_of(model, 99).backward()
        assert dk.training_report(model).alarms == ()
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=float(2**60))
        for step in range(3):  # float32 overflows: these steps are left out
            scaler.scale(loss_of(model, step) * 1e30).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        report = dk.training_report(model)
        assert (report.alarms, report.steps) == ((), 1)


def test_tokens_that_no_loss_counts_do_not_count(seed: int) -> None:
    """Of an expert that has such tokens alone, nothing is expected."""
    model = experts(seed, zero=False)
    optimizer = optimizer_of(model)
    x, chosen, weights = routed(12, seed)
    chosen = torch.where(chosen == 2, 3, chosen)
    chosen[5, 0] = 2
    with dk.watch_training(model, optimizer):
        for _ in range(5):
            y = model(x.requires_grad_(), chosen, weights)
            torch.cat([y[:5], y[6:]]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    report = dk.training_report(model)
    assert report.alarms == ()
    assert {each.expert for each in report.without_tokens} == {1, 2}


def _wrong_packing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ParamWrapper.get_delta_factors

    def wrong(self: Any, name: str) -> Any:
        _, rhs, scale = own(self, name)
        B = self.lora_B[name].weight
        return B.view(B.shape[0], self.num_experts, -1).permute(1, 0, 2), rhs, scale

    monkeypatch.setattr(ParamWrapper, "get_delta_factors", wrong)


def _left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert's update is forgotten."""
    own = ParamWrapper.get_delta_factors

    def wrong(self: Any, name: str) -> Any:
        lhs, rhs, scale = own(self, name)
        kept = torch.ones(len(lhs), 1, 1)
        kept[3] = 0
        return lhs * kept, rhs, scale

    monkeypatch.setattr(ParamWrapper, "get_delta_factors", wrong)


def _detached(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ParamWrapper.get_delta_factors

    def wrong(self: Any, name: str) -> Any:
        lhs, rhs, scale = own(self, name)
        return lhs.detach(), rhs, scale

    monkeypatch.setattr(ParamWrapper, "get_delta_factors", wrong)


def _fused_wrongly(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """This library's own reading of B, planted wrong."""
    own = fused_experts._pair

    def wrong(wrapper: Any, parts: Any, name: str, weight: Tensor) -> Any:
        A, B, scale = own(wrapper, parts, name, weight)  # type: ignore[misc]
        return A, B.roll(1, 0), scale

    monkeypatch.setattr(fused_experts, "_pair", wrong)
    dk.accelerate(model)


FAULTS: dict[str, tuple[Callable[[Any, pytest.MonkeyPatch], None], str]] = {
    "another packing of B": (_wrong_packing, "off PEFT's packing by"),
    "an expert left out": (_left_out, "of expert 3: its gradient is 0, although tokens came"),
    "B detached": (_detached, "lora_B.default.weight of expert 0: it got no gradient, although tokens came"),
    "fused wrongly": (_fused_wrongly, "off PEFT's packing by"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_experts(fault: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, text = FAULTS[fault]
    model = experts(seed, zero=fault != "an expert left out" and fault != "B detached")
    plant(model, monkeypatch)
    if "packing" in text:  # seen before the first step, although B is 0
        assert any(text in alarm for alarm in dk.training_report(model).alarms)
    report = report_of(model)
    assert any(text in alarm for alarm in report.alarms), report
    assert "ALARM" in str(report)


def test_an_update_that_never_acts(seed: int) -> None:
    """The layer's output does not depend on its adapter."""
    model = dense(seed)
    layer = model.base_model.model.second
    layer.forward = layer.base_layer.forward
    report = report_of(model)
    named = [alarm for alarm in report.alarms if "second" in alarm]
    assert len(named) == 2
    assert all("it got no gradient, although tokens came" in alarm for alarm in named)
    assert len(report.alarms) == 2


def test_what_the_optimizer_does_not_have_or_move(seed: int) -> None:
    model = dense(seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    forgotten = next(name for name in parameters if "first.lora_B" in name)
    optimizer = torch.optim.SGD([p for name, p in parameters.items() if name != forgotten], lr=1e-2)
    still = next(p for name, p in parameters.items() if "second.lora_B" in name)
    with dk.watch_training(model, optimizer):
        for step in range(5):
            loss_of(model, step).backward()
            before = still.detach().clone()
            optimizer.step()
            with torch.no_grad():
                still.copy_(before)
            optimizer.zero_grad()
    alarms = dk.training_report(model).alarms
    assert sorted(alarm.rpartition(": ")[2] for alarm in alarms) == [
        "it has a gradient and was stepped, and has not moved",
        "it is in no parameter group of the optimizer",
    ]


def test_a_layer_that_is_not_called_is_no_alarm(seed: int) -> None:
    model = dense(seed)
    model.base_model.model.skips = True
    report = report_of(model)
    assert report.alarms == ()
    assert {each.name.split(".")[2] for each in report.without_tokens} == {"second"}


def test_a_lost_quantisation_state(seed: int) -> None:
    class Params4bit(nn.Parameter):
        bnb_quantized = True
        quant_state = None

    model = dense(seed)
    base = model.base_model.model.first.base_layer
    base.weight = Params4bit(base.weight.data, requires_grad=False)
    assert "first: its 4-bit base weight has lost its quantisation state" in dk.training_report(model).alarms[0]


def test_factors_are_not_written_to(seed: int) -> None:
    model = experts(seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dk.training_report(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_errors_say_what_to_pass() -> None:
    with pytest.raises(TypeError, match="watch_training: model must be a torch.nn.Module, got int"):
        dk.watch_training(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must hold PEFT adapter layers, got a Linear without any"):
        dk.training_report(nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "muse_spark", "aria"])
def test_packing_of_other_families(family: str, seed: int) -> None:
    model = adapted(block(family, seed=seed), seed=seed + 1)
    assert dk.training_report(model).alarms == ()
    dk.accelerate(model)
    assert dk.training_report(model).alarms == ()


def test_factors_that_peft_keeps_as_parameters(seed: int) -> None:
    """AdaLoRA's A and B, which get no gradient while its E is 0."""
    torch.manual_seed(seed)
    config = peft.AdaLoraConfig(init_r=2, target_r=1, total_step=100, target_modules=["first", "second"])
    model = peft.get_peft_model(Dense(), config)
    optimizer = optimizer_of(model)
    with dk.watch_training(model, optimizer):
        train(model, optimizer, steps=1)
        assert dk.training_report(model).alarms == ()
        train(model, optimizer, steps=3)
    report = dk.training_report(model)
    assert report.alarms == (), report
    assert all(each.tokens for each in report.tensors)


def test_a_step_below_what_float32_tells_apart_is_no_alarm(seed: int) -> None:
    """DeLoRA's λ is 15: in warm-up AdamW's step may be less than its rounding."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(Dense(), peft.DeloraConfig(r=2, target_modules=["first", "second"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "delora_B" in name:
                parameter.normal_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-7, weight_decay=0.0)
    with dk.watch_training(model, optimizer):
        train(model, optimizer, steps=3)
    report = dk.training_report(model)
    assert any("lambda" in each.name and each.change == 0 and each.gradient for each in report.tensors)
    assert report.alarms == (), report


def test_an_optimizer_that_sets_its_own_rates(seed: int) -> None:
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    model = dense(seed)
    optimizer = adafactor([p for p in model.parameters() if p.requires_grad], relative_step=True, lr=None)
    with dk.watch_training(model, optimizer):
        train(model, optimizer)
    report = dk.training_report(model)
    assert (report.alarms, report.steps) == ((), 6)
