"""compare(): the numbers of its columns, what it leaves as it was, and what it makes of trouble."""

import json
import random
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import peft
import peft_models
import pytest
import tiny_llama
import torch
from fused_count import counted
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.integrations.peft.compare import Column, Comparison, run
from delora_kernels.integrations.peft.compare.forms import Forms
from delora_kernels.integrations.peft.compare.problem import Problem
from delora_kernels.integrations.peft.fused import layers
from delora_kernels.integrations.peft.fused.groups import PLACE
from delora_kernels.integrations.peft.fused.report import Report


def llama(method: str, seed: int, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    ids = tiny_llama.tokens(seed, 2, 6)
    return tiny_llama.llama(method, seed, blocks=1, **options), {"input_ids": ids, "labels": ids}


def state(model: nn.Module) -> list[Any]:
    """All of a model that compare() could change, as comparable values."""
    found: list[Any] = [type(module) for module in model.modules()]
    found += [module.training for module in model.modules()]
    found += [module.__dict__.get(PLACE) for module in model.modules()]
    found += [getattr(module, "_disable_adapters", None) for module in model.modules()]
    found += [(p.requires_grad, p.grad is None or id(p.grad), p._version) for p in model.parameters()]
    found += [bytes(p.grad.flatten().view(torch.uint8).tolist()) for p in model.parameters() if p.grad is not None]
    found += [id(buffer) for buffer in model.buffers()]
    return found + [buffer.clone().tolist() for buffer in model.buffers()]


def random_numbers() -> tuple[float, float]:
    return torch.rand(()).item(), random.random()


class Counting(nn.Module):
    """A model whose buffers change in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(2, 3).t())

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        y: Tensor = self.second(self.norm(self.first(x))).square().mean()
        return y


@pytest.mark.parametrize("accelerated", [False, True])
def test_leaves_everything_as_it_was(accelerated: bool, seed: int) -> None:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["first", "second"], lora_dropout=0.1)
    model = peft.get_peft_model(Counting(), config).train()
    x = torch.randn(5, 6)
    if accelerated:
        dk.accelerate(model)
    model(x).backward()
    before = state(model)
    kept = torch.get_rng_state(), random.getstate()
    expected = random_numbers()
    torch.set_rng_state(kept[0])
    random.setstate(kept[1])
    dk.compare(model, x, steps=1)
    assert random_numbers() == expected
    assert state(model) == before


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_the_three_forms(method: str, seed: int) -> None:
    """Without adapters the base model's own output, PEFT's to the bit, and ours by fused passes."""
    model, batch = llama(method, seed)
    with torch.no_grad():
        peft_logits = model(**batch).logits
        with model.disable_adapter():
            base_logits = model(**batch).logits
    found: dict[str, Tensor] = {}
    with Forms(model) as forms:
        for form in ("fused", "peft", "frozen", "fused"):
            with forms.as_form(form), counted() as passes, torch.no_grad():
                found[form] = model(**batch).logits
            assert len(passes) == (7 if form == "fused" else 0)
    assert torch.equal(found["frozen"], base_logits)
    assert torch.equal(found["peft"], peft_logits)
    assert not torch.equal(found["frozen"], found["peft"])
    assert torch.allclose(found["fused"], peft_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("called_with", ["input_ids", "inputs_embeds"])
def test_the_frozen_form_goes_back_as_far_as_pefts(called_with: str, seed: int) -> None:
    """To the outputs of the first adapter layers, whatever the model is called with."""
    model, batch = llama("lora", seed)
    if called_with == "inputs_embeds":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    seen: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.endswith("base_layer"):

            def back(module: Any, dx: Any, dy: Any, name: str = name) -> None:
                seen[name] = seen.get(name, 0) + sum(each is not None for each in dx)

            module.register_full_backward_hook(back)
    problem, found = Problem(model, batch, None), {}
    with Forms(model) as forms:
        for form in ("peft", "frozen"):
            seen.clear()
            with forms.as_form(form):
                problem.run()
            found[form] = dict(seen)
    assert sum(found["frozen"].values()) >= 4
    assert found["frozen"] == found["peft"]


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_a_comparison(method: str, seed: int) -> None:
    model, batch = llama(method, seed, dtype=torch.float64, dropout_p=0.0 if method == "dora" else 0.2)
    found = dk.compare(model, batch, steps=3)
    assert [column.form for column in found.columns] == ["frozen", "peft", "fused"]
    assert all(len(column.milliseconds) == 3 and column.peak_mib == 3.0 for column in found.columns)
    assert found.tokens == 12
    assert [each.what for each in found.differences[:2]] == ["loss", "output"]
    assert all(each.error < 1e-9 for each in found.differences), found.differences
    assert found.differences[2].what.startswith("gradient of base_model.")
    assert any(len(group) == 3 for group in found.report.groups)
    json.dumps(found.to_dict(), allow_nan=False)
    text = str(found)
    for word in (
        "LlamaForCausalLM, 7 adapter layers, r=4",
        "fused 7 of 7",
        "of PEFT's overhead gone",
        found.facts["machine"],
    ):
        assert word in text


def test_what_the_times_give() -> None:
    columns = (Column("frozen", (10.0,) * 5, 1.0), Column("peft", (18.0,) * 5, 4.0), Column("fused", (12.0,) * 5, 2.0))
    found = Comparison(columns, (), Report(()), {}, tokens=24)
    assert found.overhead_gone == pytest.approx((0.75, 0.75, 0.75))
    assert found.ratio("fused", "frozen") == pytest.approx((1.2, 1.2, 1.2))
    assert found.ratio("fused", "peft") == pytest.approx((2 / 3,) * 3)
    row = next(line for line in str(found).splitlines() if line.startswith("delora-kernels"))
    assert row.split(maxsplit=4)[1:] == ["12.0", "2000", "2", "1.20 (1.20 to 1.20) 0.67 (0.67 to 0.67)"]
    given = found.to_dict()
    assert given["columns"]["peft"]["median_ms"] == 18.0
    assert given["columns"]["frozen"]["over_frozen"] == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("rounds", "now", "up"),
    [
        (0, 90.0, False),  # one round is always taken
        (2, 8.0, False),  # a round takes 2, the five passes behind the rounds 10 / 3: 13.3
        (2, 14.0, True),  # a round takes 5, the rest 25 / 3: 27.3
        (4, 12.9, False),  # 2.225, 3.708: 18.8
        (4, 13.9, True),  # 2.475, 4.125: 20.5
    ],
)
def test_rounds_end_in_time(rounds: int, now: float, up: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """20 seconds from 0; the rounds begin at 4."""
    problem = Problem(*llama("lora", seed), None)
    clock = SimpleNamespace(perf_counter=lambda: 0.0)
    monkeypatch.setattr(run, "time", clock)
    measuring = run._Run(problem, 5, 20.0)
    clock.perf_counter = lambda: now
    measuring.rounds = rounds
    assert measuring._time_is_up(4.0, 3) is up


def test_fewer_rounds_are_said(seed: int) -> None:
    model, batch = llama("lora", seed)
    passes = [0]
    model.register_forward_hook(lambda *call: passes.append(passes.pop() + 1))
    for seconds, rounds, taken in ((1e-6, 1, 3 + 2 + 4 + 2), (None, 2, 3 * (3 + 2 + 1) + 2)):
        passes[:] = [0]
        found = dk.compare(model, batch, steps=2, seconds=seconds)
        assert passes == [taken]
        assert all(column.peak_mib == 3.0 for column in found.columns)
        assert {len(column.milliseconds) for column in found.columns} == {rounds}
        assert found.facts["pass"] == f"forward + backward, median of {rounds}"
        assert re.fullmatch(r"\d+ s", found.facts["took"])
    wrong: Any
    for wrong, error in ((0, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="compare: seconds must be"):
            dk.compare(model, batch, seconds=wrong)


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_a_wrong_layer_is_named(fault: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A wrong output shows in the model's and in gradients of all layers; a wrong gradient of one
    factor in nothing but that gradient, twice too large here.
    """
    model, batch = llama("lora", seed)
    wrong = model.base_model.model.model.layers[0].mlp.up_proj
    right, calls = layers.FusedLoraLinear.forward, []

    def forward(layer: Any, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        y = right(layer, x, *rest, **options)
        if layer is not wrong:
            return y
        calls.append(layer)
        if fault == "output":
            return 1.5 * y
        with torch.no_grad():
            h = layer.scaling["default"] * layer.lora_A["default"](x)
        again: Tensor = layer.lora_B["default"](h)
        return y + (again - again.detach())

    monkeypatch.setattr(layers.FusedLoraLinear, "forward", forward)
    found = {each.what: each.error for each in dk.compare(model, batch, steps=1).differences}
    assert calls
    *_, (worst, error) = found.items()
    if fault == "output":
        assert found["output"] > 1e-3
        assert worst.startswith("gradient of")
        assert error > 1e-2
    else:
        name = next(name for name, module in model.named_modules() if module is wrong)
        assert worst == f"gradient of {name}.lora_B.default.weight"
        assert error == pytest.approx(1.0, rel=1e-3)
        assert found["output"] < 1e-5


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, when: Callable[[Any, int], bool]) -> None:
    """Make a pass raise when its model and its number say so."""
    passes: Iterator[int] = iter(range(10**6))
    run_one = Problem.forward_backward

    def forward_backward(problem: Problem) -> Any:
        if when(problem.model, next(passes)):
            raise error
        return run_one(problem)

    monkeypatch.setattr(Problem, "forward_backward", forward_backward)


def is_fused(model: nn.Module) -> bool:
    return any(layers.peft_class(type(module)) is not type(module) for module in model.modules())


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()],
)
@pytest.mark.parametrize("late", [False, True])
def test_out_of_memory_is_a_result(error: Exception, late: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    model, batch = llama("lora", seed)
    before = state(model)
    failing(monkeypatch, error, lambda model, number: not is_fused(model) and _runs(model) and number >= 10 * late)
    found = dk.compare(model, batch, steps=2)
    assert found.column("peft") == Column("peft", note="out of memory")
    assert len(found.column("fused").milliseconds) == len(found.column("frozen").milliseconds) == 2
    assert (found.overhead_gone, found.differences) == (None, ())
    assert "PEFT              out of memory" in str(found)
    assert state(model) == before


def _runs(model: nn.Module) -> bool:
    return not any(getattr(module, "_disable_adapters", False) for module in model.modules())


def test_another_error_is_raised_with_the_model_put_back(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    model, batch = llama("lora", seed)
    before = state(model)
    failing(monkeypatch, RuntimeError("something else"), lambda model, number: number == 4)
    with pytest.raises(RuntimeError, match="something else"):
        dk.compare(model, batch)
    assert state(model) == before


@pytest.mark.parametrize("number", [0, 11, 14])
def test_ctrl_c_gives_what_is_known(number: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    model, batch = llama("lora", seed)
    before = state(model)
    failing(monkeypatch, KeyboardInterrupt(), lambda model, count: count == number)
    found = dk.compare(model, batch, steps=4)
    assert found.interrupted
    assert sum(len(column.milliseconds) for column in found.columns) == max(0, number - 9)
    assert "interrupted" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)
    assert state(model) == before


def test_layers_of_this_library_have_no_column_of_pefts(seed: int) -> None:
    torch.manual_seed(seed)
    dk.register_peft_methods()
    model = peft.get_peft_model(peft_models.Small(False), dk.EtherConfig(target_modules=["first", "third"]))
    found = dk.compare(model, torch.randn(5, 12), steps=1, loss=lambda y: y.square().mean())
    assert found.column("peft").note.startswith("not measured")
    assert len(found.column("fused").milliseconds) == 1


def test_checkpointing_and_a_wrapper(seed: int) -> None:
    model, batch = llama("lora", seed)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(each.error < 1e-4 for each in dk.compare(model, batch, steps=1).differences)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": "a model"}, TypeError, "compare: model must be a PEFT model, got str"),
        ({"model": nn.Linear(2, 2)}, ValueError, "one with PEFT adapter layers, got a Linear without any"),
        ({"batch": 3}, TypeError, "compare: batch must be a mapping of keyword arguments, or a tensor, got int"),
        ({"steps": 0}, ValueError, "compare: steps must be an integer ≥ 1, got 0"),
        ({"steps": True}, ValueError, "compare: steps must be an integer ≥ 1, got True"),
        ({}, ValueError, "the model's output must be a scalar, or hold a loss, got shape [5, 9]"),
        ({"loss": 3}, TypeError, "compare: loss must be a function of the output, or None, got int"),
        ({"loss": lambda y: torch.tensor(1.0)}, ValueError, "the loss must be one with a gradient, got a constant"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], text: str, seed: int) -> None:
    model = peft_models.model("lora", seed)
    before = state(model)
    arguments: dict[str, Any] = {"model": model, "batch": torch.randn(5, 12), "steps": 1} | change
    with pytest.raises(error) as raised:
        dk.compare(**arguments)
    assert text in str(raised.value)
    assert state(model) == before


def test_what_does_not_train_is_refused(seed: int) -> None:
    model, x = peft_models.model("lora", seed), torch.randn(5, 12)
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients must be on, got no_grad or inference_mode"):
        dk.compare(model, x, loss=torch.sum)
    handle = next(p for p in model.parameters() if p.requires_grad).register_post_accumulate_grad_hook(print)
    with pytest.raises(ValueError, match="got hooks on accumulated gradients; take away what steps the optimizer"):
        dk.compare(model, x, loss=torch.sum)
    handle.remove()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="got no parameter that does; load the adapter with is_trainable=True"):
        dk.compare(model, x, loss=torch.sum)


def test_out_of_memory_at_the_end_leaves_the_times(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def results(problem: Problem) -> Any:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    monkeypatch.setattr(Problem, "results", results)
    model, batch = llama("lora", seed)
    found = dk.compare(model, batch, steps=1)
    assert found.differences == ()
    assert found.overhead_gone is not None


def test_places_in_families_that_have_not_run_yet(seed: int) -> None:
    """What the passes find out about shared inputs is not left behind."""
    model, batch = llama("lora", seed)
    dk.accelerate(model)
    places = [module.__dict__[PLACE] for module in model.modules() if PLACE in module.__dict__]
    found = dk.compare(model, batch, steps=1)
    assert len(found.report.groups) == 2
    assert all(place.group is None and place.family.watched for place in places)
    assert dk.accelerate(model).groups == ()


@pytest.mark.parametrize("how", ["merged", "disabled"])
def test_adapters_that_do_not_run(how: str, seed: int) -> None:
    model = peft_models.model("lora", seed)
    if how == "merged":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"got 3 of 3 layers merged or disabled; unmerge or enable them first"):
        dk.compare(model, torch.randn(5, 12))


class InADict(nn.Module):
    """A model whose output is a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        return {"loss": y.square().mean(), "logits": y}


def test_an_output_that_is_a_dictionary(seed: int) -> None:
    """Its loss and its logits are taken by their keys."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(InADict(), peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["layer"]))
    x = torch.randn(5, 6)
    found = Problem(model, x, None).results()
    assert torch.equal(found["loss"], model(x)["loss"])
    assert torch.equal(found["output"], model(x)["logits"])
    assert not dk.compare(model, x, steps=1).interrupted
