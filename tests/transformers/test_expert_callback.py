"""GOAT under Transformers' Trainer with ExpertCallback: what it logs, what it says, what it tells
the layers.
"""

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

pytest.importorskip("transformers")

from goat_models import layers
from golden_cases import relative_error
from tiny_llama import base, tokens
from trainers import trainer

import delora_kernels as dk
from delora_kernels.nn import router_parameter_groups

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


def goat(seed: int, **options: Any) -> Any:
    options = {"r": 2, "num_experts": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    return peft.get_peft_model(base(seed), dk.GoatConfig(**options)).train()


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["plain", "reentrant"],
)
def test_logs_come_with_the_routers_numbers(mode: dict[str, Any], seed: int, tmp_path: Path) -> None:
    callback = dk.ExpertCallback(by_layer="gradient_checkpointing" in mode)
    made = goat(seed, target_modules=["q_proj", "down_proj"])
    made.enable_input_require_grads()  # which reentrant checkpointing needs
    trained = trainer(tmp_path, made, seed, [callback], logging_steps=2, eval_strategy="steps", eval_steps=1, **mode)
    trained.train()
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [step for step, _ in callback.history] == [entry["step"] for entry in entries] == [2, 4]
    for entry, (_, report) in zip(entries, callback.history, strict=True):
        logged = {key: value for key, value in entry.items() if key.startswith("router/")}
        assert logged == report.summary() | (report.by_layer() if callback.by_layer else {})
        assert len(logged) == 3 + (4 * (3 + 4) if callback.by_layer else 0)  # 4 layers, 4 experts
        assert 0 < entry["router/entropy"] < 1 + 1e-9
        assert 0.5 < entry["router/balance"] <= 2  # at most E / k
        # two steps of two rows of twelve tokens; a checkpointed pass runs twice; evaluation is not
        # counted
        recomputed = 2 if "gradient_checkpointing" in mode else 1
        assert {use.tokens for use in report.layers} == {48 * recomputed}
        assert [use.name for use in report.layers] == list(layers(made))
    assert not any(layer._forward_hooks for layer in layers(made).values())


def test_balance_loss_is_the_mean_over_accumulated_batches(seed: int, tmp_path: Path) -> None:
    """One step of SGD over two micro-batches: its gradient is that of mean loss + coefficient ·
    mean balance loss.
    """
    made = goat(seed, balance_coef=0.5, target_modules=["q_proj", "down_proj"])
    want = copy.deepcopy(made)
    rows = tokens(seed, 2, 12)
    options = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    trained = trainer(tmp_path, made, seed, [dk.ExpertCallback()], **options)
    labels = rows.clone()
    labels[:, 0] = -100  # nothing predicts it; older Trainers count it where they divide the loss
    trained.train_dataset = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    trained.optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=1.0)
    trained.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trained.optimizer, lambda _: 1.0)
    before = {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}
    trained.train()
    for row in rows:
        want(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
    for name, parameter in want.named_parameters():
        if parameter.requires_grad:
            moved = before[name] - made.get_parameter(name).detach()
            # a difference of float32 numbers of about 0.1
            assert relative_error(moved, parameter.grad / 2) <= 1e-3, name


def test_says_when_experts_die(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A router of zeros chooses the first expert for every token (ties go to the lowest index), and
    learns nothing.
    """
    made = goat(seed, top_k=1, balance_coef=0.0, target_modules=["down_proj"])
    dead = "base_model.model.model.layers.1.mlp.down_proj"
    made.get_submodule(dead).goat_router["default"].data.zero_()
    made.get_submodule(dead.replace("1", "0")).goat_router["default"].data.normal_()
    callback = dk.ExpertCallback()
    trainer(tmp_path, made, seed, [callback]).train()
    for _, report in callback.history:
        assert {(dead, 1), (dead, 2), (dead, 3)} <= set(report.dead)
        assert report.layers[1].balance == pytest.approx(1.0)  # P is even: the balance loss alone does not show it
        assert report.layers[1].entropy == 0
    printed = capsys.readouterr().out
    assert f"delora-kernels: step 1: {callback.history[0][1].headline}" in printed
    changes = [set(report.dead) for _, report in callback.history]
    assert printed.count("experts dead") == 1 + sum(a != b for a, b in itertools.pairwise(changes))


def test_routers_group_trains_in_a_trainer(seed: int, tmp_path: Path) -> None:
    made = goat(seed, target_modules=["q_proj", "down_proj"])
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    optimizer = torch.optim.AdamW(router_parameter_groups(made, lr=0.0, router_lr=1e-2, weight_decay=0.0))
    trained = trainer(tmp_path, made, seed)
    trained.optimizer = optimizer
    trained.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trained.train()
    moved = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "goat_router" in name}


def test_model_without_routers_is_only_told(seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = dk.ExpertCallback()
    plain = peft.get_peft_model(base(seed), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = trainer(tmp_path, plain, seed, [callback])
    trained.train()
    assert not callback.history
    assert "the model has no routers" in caplog.text
    assert not any(key.startswith("router/") for entry in trained.state.log_history for key in entry)
