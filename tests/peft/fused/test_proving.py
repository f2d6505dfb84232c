"""accelerate() and warmup() prove a model's kernels before training: which, what comes of a wrong
one, and that nothing else changes.
"""

import logging
from types import SimpleNamespace
from typing import Any

import expert_models
import peft
import peft_models
import pytest
import stand_in_backends
import tiny_llama
import torch
from stand_in_backends import wrong

import delora_kernels as dk
from delora_kernels import dispatch
from delora_kernels.backends import eager
from delora_kernels.diagnostics import proof
from delora_kernels.integrations.peft.fused import layers

WRONG = "the triton kernels of lora_linear in float32 on cpu: its kernels failed on cpu: y of lora: error"


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Backends of a GPU that run on a CPU; only the tiny sizes prove them, for time."""
    monkeypatch.setattr(proof, "SIZES", proof.SIZES[1:])
    return stand_in_backends.put_in_place(monkeypatch)


def classes(model: torch.nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_kernels_are_proved_before_the_first_call(method: str, stand_ins: dict[str, Any], seed: int) -> None:
    """Of every kind, with dropout and without, and not again."""
    model = tiny_llama.llama(method, seed, blocks=1, dropout_p=0.1)
    before = torch.get_rng_state()
    report = dk.accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(report).splitlines()[0] == f"fused 7 of 7 adapter layers (7 {method}) on the triton backend"
    assert [(each.backend, each.function, each.reason) for each in report.proofs] == [
        ("triton", f"{method}_linear", None)
    ] * 2
    assert {case.drops for case in proof._verdicts} == {True, False}
    assert "kernels proved right before their first call: 2 kinds, in" in str(report)
    known = dict(proof._verdicts)
    batch = {"input_ids": tiny_llama.tokens(seed, 2, 6)}
    model.train()(**batch).logits.sum().backward()
    model.eval()(**batch)
    assert proof._verdicts == known
    assert len(dk.warmup(model).proofs) == 2
    assert report.to_dict()["proofs"][0]["function"] == f"{method}_linear"


def test_under_autocast_other_kernels_are_proved(stand_ins: dict[str, Any], seed: int) -> None:
    model = peft_models.model("lora", seed)
    dk.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        dk.warmup(model)
    assert {case.compute_dtype for case in proof._verdicts} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", ""])
def test_the_callback_knows_the_trainers_autocast(dtype: str, stand_ins: dict[str, Any], seed: int) -> None:
    args: Any = SimpleNamespace(bf16=dtype == "bf16", fp16=dtype == "fp16")
    state: Any = SimpleNamespace(is_world_process_zero=False)
    dk.AccelerateCallback().on_init_end(args, state, Any, model=peft_models.model("lora", seed))
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "": torch.float32}[dtype]
    assert {case.compute_dtype for case in proof._verdicts} == {expected}


def test_several_adapters_are_one_call(stand_ins: dict[str, Any], seed: int) -> None:
    """Of the rank of all."""
    model = peft_models.model("lora", seed, r=10)
    model.add_adapter("other", peft_models.config("lora", 10, target_modules=["first", "second", "third"]))
    model.base_model.set_adapter(["default", "other"])
    dk.accelerate(model)
    assert {(case.function, case.rank) for case in proof._verdicts} == {("lora_linear", 32)}
    model(torch.randn(5, 12)).sum().backward()
    assert {case.rank for case in proof._verdicts} == {32}


@pytest.mark.parametrize("method", ["goat", "ether"])
def test_layers_of_the_librarys_own_methods(method: str, stand_ins: dict[str, Any], seed: int) -> None:
    dk.register_peft_methods()
    targets = {"target_modules": ["first", "third"]}
    config: Any = (
        dk.EtherConfig(**targets)
        if method == "ether"
        else dk.GoatConfig(r=2, num_experts=2, top_k=1, dropout=0.1, **targets)
    )
    torch.manual_seed(seed)
    model: Any = peft.get_peft_model(peft_models.Small(False), config)
    before = torch.get_rng_state()
    report = dk.accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(report).startswith(f"fused 2 of 2 adapter layers (2 {method}) on the triton backend")
    known = dict(proof._verdicts)
    for mode in (True, False):
        model.train(mode)(torch.randn(5, 12)).sum().backward()
    assert proof._verdicts == known
    assert {case.function for case in known} == {"ether_linear" if method == "ether" else "moe_lora_linear"}


def test_experts_are_one_call_of_their_outermost_wrapper(stand_ins: dict[str, Any], seed: int) -> None:
    model = expert_models.adapted(expert_models.block(seed=seed))
    report = dk.accelerate(model)
    assert {(case.function, case.rank) for case in proof._verdicts} == {("grouped_lora_linear", 16)}
    assert {layer.backend for layer in report.layers} == {"triton"}
    known = dict(proof._verdicts)
    expert_models.step(model, expert_models.routed(6, seed))
    assert proof._verdicts == known


def test_a_wrong_kernel_is_named_and_used_nowhere(
    stand_ins: dict[str, Any], caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    """Planted: the next backend takes all layers at once, and `strict` raises before anything is
    changed.
    """
    stand_ins["triton"].expand = wrong(eager.expand, 0, 1.1)
    model = peft_models.model("lora", seed)
    before = classes(model)
    with pytest.raises(RuntimeError, match="accelerate: strict=True, but kernels failed") as raised:
        dk.accelerate(model, strict=True)
    assert WRONG in str(raised.value)
    assert classes(model) == before
    report = dk.accelerate(model)
    assert f"  not used: {WRONG}" in str(report)
    assert {layer.backend for layer in report.fused} == {"cuda"}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["y of lora" in warning for warning in warnings] == [True, True]  # with a bias and without
    found = report.to_dict()["proofs"]
    assert [(each["backend"], each["code"]) for each in found] == 2 * [("triton", "kernels-wrong"), ("cuda", None)]
    stand_ins["cuda"].expand = stand_ins["triton"].expand
    proof._verdicts.clear()
    assert {layer.backend for layer in dk.warmup(model).fused} == {"eager"}
    with pytest.raises(RuntimeError, match="warmup: strict=True, but kernels failed"):
        dk.warmup(model, strict=True)


def test_a_requested_backend_is_proved_on_request(stand_ins: dict[str, Any], seed: int) -> None:
    """It runs whatever comes of it; without `prove` nothing is proved."""
    stand_ins["triton"].expand = wrong(eager.expand, 0, 1.1)
    model = peft_models.model("lora", seed)
    with dispatch.use_backend("triton"):
        assert dk.accelerate(model).proofs == ()
        found = dk.accelerate(model, prove=True).proofs  # with a bias and without
        assert [str(each).startswith(WRONG) for each in found] == [True, True]
        assert {layer.backend for layer in dk.accelerate(model).fused} == {"triton"}
    assert dk.accelerate(model, prove=False).proofs == ()


def test_memory_that_comes_later(stand_ins: dict[str, Any], seed: int) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stand_ins["triton"].project = full
    model = peft_models.model("lora", seed)
    report = dk.accelerate(model)
    assert (report.backend, report.to_dict()["proofs"][0]["code"]) == ("cuda", "kernels-unproved")
    stand_ins["triton"].project = eager.project
    assert dk.warmup(model).backend == "triton"


def test_moments_for_no_proof(stand_ins: dict[str, Any], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    model = peft_models.model("lora", seed)
    raised: list[str] = []

    def hook(grad: torch.Tensor) -> None:
        try:
            dk.warmup(model)
        except RuntimeError as error:
            raised.append(str(error))

    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(hook)
    y.sum().backward()
    assert raised[0].startswith("warmup: kernels can't prove themselves in a backward pass")
    with pytest.raises(ValueError, match="warmup: model must hold PEFT adapter layers"):
        dk.warmup(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="accelerate: prove must be True, False or None, got str"):
        dk.accelerate(model, prove="yes")  # type: ignore[arg-type]
    assert not any(layers.peft_class(kind) is not kind for kind in classes(model))


def test_on_a_cpu_there_is_nothing_to_prove(seed: int) -> None:
    report = dk.accelerate(peft_models.model("lora", seed), prove=True)
    assert (report.proofs, report.backend) == ((), "eager")
