"""TrainingReportCallback: right runs of many kinds raise no alarm, planted faults do, in a Trainer
and driven by hand.
"""

import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from expert_models import FAMILIES, adapted, block, routed
from peft.tuners.lora.layer import ParamWrapper
from peft_models import Small
from tiny_llama import llama
from torch import nn
from torch.utils.checkpoint import checkpoint
from trainers import trainer

import delora_kernels as dk
from delora_kernels.integrations.transformers import training_report_callback as integration

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

STATE: Any = SimpleNamespace(is_world_process_zero=True)
DENSE = {"target_modules": ["first", "second", "third"]}


def dense(config: Any) -> Any:
    return peft.get_peft_model(Small(conv1d=False), config)


METHODS: dict[str, Any] = {
    "lora": lambda: dense(peft.LoraConfig(r=2, **DENSE)),
    "rslora": lambda: dense(peft.LoraConfig(r=2, use_rslora=True, lora_dropout=0.1, **DENSE)),
    "dora": lambda: dense(peft.LoraConfig(r=2, use_dora=True, **DENSE)),
    "delora": lambda: dense(peft.DeloraConfig(r=2, **DENSE)),
    "goat": lambda: dense(dk.GoatConfig(r=4, num_experts=2, **DENSE)),
    "ether+": lambda: dense(dk.EtherPlusConfig(**DENSE)),
} | {family: (lambda family=family: experts(family)) for family in FAMILIES}
"""What trains: the methods on a dense model, LoRA on the experts of every family."""


def experts(family: str) -> Any:
    """Adapters at PEFT's start, of random implementations and projections."""
    made = block(family, random.choice(["eager", "grouped_mm", "batched_mm"]), seed=random.randrange(999))
    names = ("down_proj",) if random.random() < 0.2 else ()
    model = adapted(made, names, r=random.choice([2, 3]), seed=random.randrange(999))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return model


def loss_of(model: Any, without: int) -> torch.Tensor:
    """Of random tokens, none of them for two of the experts, or for the last layer of a dense
    model.
    """
    inner = model.base_model.model
    if isinstance(inner, Small):
        x = torch.randn(5, 12)
        y = inner.second(nn.functional.gelu(inner.first(x))) if without else model(x)
    else:
        x, chosen, weights = routed(9, random.randrange(999))  # expert 1 gets none
        y = model(x.requires_grad_(), torch.where(chosen == without, 3, chosen), weights)
    return (y - 1).square().mean()


def train(model: Any, callback: Any, *, situation: str = "", sgd: bool = False, steps: int = 4) -> Any:
    """What a Trainer does with a callback, by hand, in one of the situations of HEALTHY."""
    if situation == "checkpointed":
        inner, own = model.base_model.model, model.base_model.model.forward
        inner.forward = lambda *args: checkpoint(own, *args, use_reentrant=False)
    if situation == "frozen A":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = 1e-4 if sgd else 1e-2
    optimizer = torch.optim.SGD(trained, lr=rate) if sgd else torch.optim.AdamW(trained, lr=rate, weight_decay=0)
    callback.on_train_begin(None, STATE, None, model=model, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=situation == "GradScaler")
    without = 2 if situation == "without tokens" else 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if situation == "warm-up" and step < 2 else rate
        for _ in range(3 if situation == "accumulation" else 1):
            loss = loss_of(model, without)
            scaler.scale(loss * (1e38 if situation == "GradScaler" and step < 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update(2.0**20)
        optimizer.zero_grad()
        callback.on_step_end(None, STATE, None, model=model, optimizer=optimizer)
    callback.on_train_end(None, STATE, None, model=model, optimizer=optimizer)
    return callback.report


def hooks(model: nn.Module) -> int:
    """How many forward hooks its modules have."""
    return sum(len(module._forward_hooks) for module in model.modules())


HEALTHY = ("plain", "warm-up", "accumulation", "GradScaler", "frozen A", "without tokens", "checkpointed", "short")
CONFIGURATIONS = 56


def test_no_alarm_over_many_right_runs(seed: int) -> None:
    """Every method and family in every situation, drawn until there are enough: stop=True would
    raise.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    kinds, situations = (random.sample(list(of), len(of)) for of in (METHODS, HEALTHY))
    for number in range(CONFIGURATIONS):
        kind, situation = kinds[number % len(kinds)], situations[(number + number // len(kinds)) % len(situations)]
        model = METHODS[kind]()
        said = f"{kind}, {situation}, configuration {number}"
        accelerated, sgd = random.random() < 0.5, random.random() < 0.3
        if accelerated and kind not in ("goat", "ether+"):
            dk.accelerate(model)
        before = hooks(model)
        callback = dk.TrainingReportCallback(steps=9 if situation == "short" else 2, stop=True)
        try:
            report = train(model, callback, situation=situation, sgd=sgd)
        except RuntimeError as error:
            raise AssertionError(f"{said}: {error}") from error
        assert report.alarms == (), said
        assert report.steps == {"short": 4}.get(situation, 2), said
        assert any(each.change > 0 for each in report.tensors), said
        assert hooks(model) == before, said


def _packing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ParamWrapper.get_delta_factors

    def wrong(self: Any, name: str) -> Any:
        _, rhs, scale = own(self, name)
        B = self.lora_B[name].weight
        return B.view(B.shape[0], self.num_experts, -1).permute(1, 0, 2), rhs, scale

    monkeypatch.setattr(ParamWrapper, "get_delta_factors", wrong)


def _no_effect(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """B is 0 and frozen: A's gradient is 0 for ever."""
    model.base_model.model.second.lora_B.default.weight.requires_grad_(False)


def _not_finite(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.base_model.model.second.lora_A.default.weight.register_hook(lambda grad: grad * float("nan"))


def _detached(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = model.base_model.model.second
    layer.forward = layer.base_layer.forward


FAULTS: dict[str, tuple[str, Any, str, int]] = {
    "packing": ("qwen3_moe", _packing, "off PEFT's packing by", 0),
    "no effect": ("lora", _no_effect, "second.lora_A.default.weight: its partner factor is 0 and does not train", 0),
    "not finite": ("lora", _not_finite, "second.lora_A.default.weight: it holds NaN or Inf", 2),
    "detached": ("lora", _detached, "second.lora_B.default.weight: it got no gradient, although tokens came", 2),
}
"""Fault → what trains, how it is planted, the alarm, the steps after which it is seen."""


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_warn_and_stop(
    fault: str, seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    kind, plant, text, steps = FAULTS[fault]
    model = METHODS[kind]()
    plant(model, monkeypatch)
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        report = train(model, dk.TrainingReportCallback(steps=2))
    assert any(text in alarm for alarm in report.alarms), report
    assert report.steps == steps
    (record,) = caplog.records
    assert (record.levelno, record.message) == (logging.WARNING, str(report))
    with pytest.raises(RuntimeError, match="TrainingReportCallback: stop=True, and an adapter does not train"):
        train(model, dk.TrainingReportCallback(steps=2, stop=True))
    assert hooks(model) == 0


def test_a_step_below_what_a_dtype_tells_apart_is_no_alarm(seed: int) -> None:
    """SGD's at a rate of 1e-30 moves nothing; AdamW's at 1e-2 would, and is held back here."""
    torch.manual_seed(seed)
    model = METHODS["lora"]()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    reports = []
    for kind, rate in ((torch.optim.SGD, 1e-30), (torch.optim.AdamW, 1e-2)):
        optimizer = kind(parameters, lr=rate)
        with dk.watch_training(model, optimizer):
            loss_of(model, 0).backward()
            before = [parameter.detach().clone() for parameter in parameters]
            optimizer.step()
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
        reports.append(dk.training_report(model))
    assert [len(report.alarms) for report in reports] == [0, len(parameters)]


def test_in_a_trainer(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside AccelerateCallback, with the optimizer that accelerate wraps, and a warm-up from 0."""
    callback = dk.TrainingReportCallback(steps=2, stop=True)
    model = llama("lora", seed, blocks=1)
    run = trainer(tmp_path, model, seed, [dk.AccelerateCallback(strict=True), callback], warmup_steps=1)
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        run.train()
    assert callback.report is not None
    assert callback.report.steps == 2  # the first of the four ran at 0
    assert all(each.change > 0 and each.steps == 2 and each.tokens > 0 for each in callback.report.tensors)
    (record,) = [each for each in caplog.records if each.name == integration.__name__]
    assert (record.levelno, record.message) == (logging.INFO, str(callback.report))
    assert capsys.readouterr().out.count("delora-kernels: 14 of 14 adapter tensors moved in 2 steps") == 1


def test_without_adapters(seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = dk.TrainingReportCallback()
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        for event in ("on_train_begin", "on_step_end", "on_train_end"):
            getattr(callback, event)(None, STATE, None, model=nn.Linear(2, 2))
    assert [each.levelno for each in caplog.records] == [logging.WARNING]
    assert callback.report is None


def test_is_quiet_beside_the_main_process(caplog: pytest.LogCaptureFixture) -> None:
    callback, model = dk.TrainingReportCallback(), METHODS["lora"]()
    state = transformers.TrainerState(is_world_process_zero=False)
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        callback.on_train_begin(None, state, None, model=model)  # type: ignore[arg-type]
        callback.on_train_end(None, state, None, model=model)  # type: ignore[arg-type]
    assert callback.report is not None
    assert caplog.records == []


def test_arguments() -> None:
    with pytest.raises(TypeError, match="TrainingReportCallback: steps must be an int, got str"):
        dk.TrainingReportCallback(steps="5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        dk.TrainingReportCallback(steps=0)
    with pytest.raises(TypeError, match="stop must be a bool, got int"):
        dk.TrainingReportCallback(stop=1)  # type: ignore[arg-type]
