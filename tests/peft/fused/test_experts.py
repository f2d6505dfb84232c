"""Adapters on the experts of expert models: what accelerate() computes is what PEFT computes, for
every family of experts modules, and nothing of the size of all experts' weights is kept.
"""

from typing import Any

import expert_models as em
import peft
import pytest
import torch
import torch._dynamo.testing
from expert_models import FAMILIES, IMPLEMENTATIONS, adapted, assert_close, block, routed, step, up_name
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import delora_kernels as dk


def experts_of(model: Any) -> Any:
    return model.base_model.model.experts.get_base_layer()


def inputs_of(model: Any, T: int, seed: int, **options: Any) -> Any:
    return routed(T, seed, experts=experts_of(model).num_experts, **options)


def both(model: Any, inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """PEFT's results, then those of the same model accelerated."""
    theirs = step(model, inputs)
    dk.accelerate(model, strict=True)
    return step(model, inputs), theirs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, implementation: str, seed: int) -> None:
    """y and the gradients of x, of the routing weights and of both projections' factors."""
    model = adapted(block(family, implementation, seed), seed=seed + 1)
    inputs = inputs_of(model, 11, seed)
    ours, theirs = both(model, inputs)
    assert len(theirs) == 7
    assert_close(ours, theirs)


@pytest.mark.parametrize("target", ["up", "down"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_single_projection(family: str, target: str, seed: int) -> None:
    made = block(family, seed=seed)
    model = adapted(made, (up_name(made) if target == "up" else "down_proj",), seed=seed + 1)
    ours, theirs = both(model, inputs_of(model, 11, seed))
    assert len(theirs) == 5
    assert_close(ours, theirs)


@pytest.mark.parametrize("r", [1, 8, 64])
def test_ranks(r: int, seed: int) -> None:
    model = adapted(block(seed=seed), r=r, seed=seed + 1)
    assert_close(*both(model, inputs_of(model, 11, seed)))


def test_float64_and_a_trained_base(seed: int) -> None:
    """In float64 to rounding, with the gradients of weights and biases too."""
    model = adapted(block("gpt_oss", "eager", seed), seed=seed + 1).double()
    for parameter in model.parameters():
        parameter.requires_grad_()
    ours, theirs = both(model, inputs_of(model, 9, seed, dtype=torch.float64))
    assert len(theirs) == 11
    assert_close(ours, theirs, limit=1e-12)


@pytest.mark.parametrize("T", [0, 1, 7])
def test_few_tokens_and_all_on_one_expert(T: int, seed: int) -> None:
    model = adapted(block(seed=seed), seed=seed + 1)
    x, chosen, weights = inputs_of(model, T, seed)
    chosen = torch.full_like(chosen, 3)
    if T == 0:  # PEFT with Transformers' grouped GEMM raises; the eager forward gives nothing
        dk.accelerate(model)
        found = step(model, (x, chosen, weights))
        assert found["y"].shape == x.shape
        assert not any(value.any() for value in found.values())
        return
    assert_close(*both(model, (x, chosen, weights)))


def test_the_packing_by_one_token_of_each_expert(seed: int) -> None:
    """W_e + s · B_e A_e with A_e = lora_A's rows e·r … and B_e = lora_B's columns e, e + E, ..."""
    model = adapted(block(seed=seed), ("down_proj",), r=3, seed=seed + 1)
    wrapper, experts = model.base_model.model.experts, experts_of(model)
    A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    dk.accelerate(model, strict=True)
    x, _, _ = inputs_of(model, em.E, seed)
    chosen = torch.arange(em.E)[:, None]
    y = model(x, chosen, torch.ones(em.E, 1))
    for e in range(em.E):
        W = experts.down_proj[e].double() + 5 / 3 * B[:, e :: em.E].double() @ A[3 * e : 3 * e + 3].double()
        gate, up = (experts.gate_up_proj[e].double() @ x[e].double()).chunk(2)
        expected = W @ (torch.nn.functional.silu(gate) * up)
        assert float((y[e].double() - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_a_life_of_adapters(seed: int) -> None:
    """One of two, both, the other, disabled, merged, unmerged: each time what PEFT computes."""
    model = adapted(block(seed=seed), seed=seed + 1)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=7, **_targets()))
    em.randomise(model, seed + 2)
    inputs = inputs_of(model, 11, seed)

    def compare(fused: int) -> None:
        dk.restore(model)
        theirs = step(model, inputs)
        report = dk.accelerate(model)
        assert len(report.fused) == fused, report
        assert_close(step(model, inputs), theirs)

    compare(fused=2)
    model.base_model.set_adapter(["default", "second"])
    compare(fused=2)
    model.set_adapter("second")
    compare(fused=2)
    with model.disable_adapter():
        compare(fused=0)
    before = step(model, inputs)
    model.merge_adapter()
    compare(fused=0)
    assert_close({"y": step(model, inputs)["y"]}, {"y": before["y"]})
    model.unmerge_adapter()
    compare(fused=2)


def _targets() -> dict[str, Any]:
    return {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize("state", ["merged", "disabled", "other adapter"])
@pytest.mark.parametrize("which", ["outer", "inner"])
def test_wrappers_in_different_states(which: str, state: str, seed: int) -> None:
    """The factors of each wrapper count, or do not, for themselves."""
    model = adapted(block(seed=seed), seed=seed + 1)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=7, **_targets()))
    em.randomise(model, seed + 2)
    outer = model.base_model.model.experts
    wrapper = outer if which == "outer" else outer.base_layer
    if state == "merged":
        wrapper.merge()
    elif state == "disabled":
        wrapper._disable_adapters = True
    else:
        wrapper.set_adapter("second")
    assert_close(*both(model, inputs_of(model, 11, seed)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_accumulation(reentrant: bool, seed: int) -> None:
    model = adapted(block(seed=seed), seed=seed + 1)
    inputs = inputs_of(model, 11, seed)
    expected = step(model, inputs)
    dk.accelerate(model, strict=True)
    x, chosen, weights = inputs[0].clone().requires_grad_(), inputs[1], inputs[2].clone().requires_grad_()
    dy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(7))
    model.zero_grad()
    for _ in range(2):
        y = checkpoint(model, x, chosen, weights, use_reentrant=reentrant)
        y.backward(dy)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad} | grads
    assert_close(found, {name: value * (1 if name == "y" else 2) for name, value in expected.items()})


def test_without_gradients(seed: int) -> None:
    model = adapted(block(seed=seed), seed=seed + 1).eval()
    inputs = inputs_of(model, 11, seed)
    expected = step(model, inputs)["y"]
    dk.accelerate(model, strict=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = model(*inputs)
        assert not y.requires_grad
        assert_close({"y": y.clone()}, {"y": expected})


def test_nothing_of_the_weights_size_is_kept(seed: int) -> None:
    """PEFT keeps W' of every projection; here all that is kept but the weights themselves has the
    size of tokens or factors.
    """
    model = adapted(block(seed=seed, num_experts=32), r=2, seed=seed + 1)
    experts = experts_of(model)
    inputs = inputs_of(model, 4, seed)
    least = min(experts.gate_up_proj.numel(), experts.down_proj.numel())
    weights = {experts.gate_up_proj.data_ptr(), experts.down_proj.data_ptr()}

    def largest() -> int:
        kept: list[Tensor] = []
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            model(*(each.clone().requires_grad_(each.is_floating_point()) for each in inputs))
        return max(t.untyped_storage().nbytes() // 4 for t in kept if t.data_ptr() not in weights)

    assert largest() >= least
    dk.accelerate(model, strict=True)
    assert largest() < least // 2


class _Sorts(TorchDispatchMode):
    """Counts the sorts."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(function).startswith(("aten.sort", "aten.argsort"))
        return function(*args, **(kwargs or {}))


def test_tokens_are_sorted_once(seed: int) -> None:
    model = adapted(block(seed=seed), seed=seed + 1)
    dk.accelerate(model, strict=True)
    with _Sorts() as sorts:
        step(model, inputs_of(model, 11, seed))
    assert sorts.count == 1


def test_rows_of_other_processes(seed: int) -> None:
    """Expert parallelism gives experts of another process the number E, with weight 0."""
    model = adapted(block(seed=seed), seed=seed + 1)
    experts_of(model)._is_expert_parallel = True
    x, chosen, weights = inputs_of(model, 11, seed)
    elsewhere = torch.zeros_like(chosen, dtype=torch.bool)
    elsewhere[::3, 1] = elsewhere[4] = True
    inputs = x, chosen.masked_fill(elsewhere, em.E), weights.masked_fill(elsewhere, 0.0)
    ours, theirs = both(model, inputs)
    assert_close(ours, theirs)
    assert not ours["y"][4].any()
    assert not ours["x"][4].any()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast(implementation: str, seed: int) -> None:
    """Transformers' grouped GEMM ignores autocast, the eager forward follows it: so does each
    here. Against float64, no worse than twice PEFT's error, and a rounding.
    """
    model = adapted(block(implementation=implementation, seed=seed), seed=seed + 1)
    inputs = inputs_of(model, 11, seed)
    exact = (
        step(model.double(), (inputs[0].double(), inputs[1], inputs[2].double())) if implementation == "eager" else {}
    )
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = both(model, inputs)
    if implementation == "grouped_mm":
        assert ours["y"].dtype == theirs["y"].dtype == torch.float32
        return
    for name, value in exact.items():
        errors = [float((each[name].double() - value).abs().max() / value.abs().max()) for each in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps, name


def test_bfloat16_model_with_float32_adapters(seed: int) -> None:
    """PEFT's default on a narrow base: against float64, no worse than twice PEFT's error, and a
    rounding.
    """
    model = adapted(block(seed=seed).bfloat16(), seed=seed + 1)
    assert model.base_model.model.experts.lora_A["default"].weight.dtype == torch.float32
    inputs = inputs_of(model, 11, seed, dtype=torch.bfloat16)
    ours, theirs = both(model, inputs)
    dk.restore(model)
    experts_of(model).config._experts_implementation_internal = "eager"
    exact = step(model.double(), (inputs[0].double(), inputs[1], inputs[2].double()))
    assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in theirs.items()}
    for name, value in exact.items():
        errors = [float((each[name].double() - value).abs().max() / value.abs().max()) for each in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps, name


def test_one_graph_where_the_frozen_experts_are_one(seed: int) -> None:
    torch._dynamo.reset()
    model = adapted(block(seed=seed), seed=seed + 1)
    dk.accelerate(model, strict=True)
    inputs = inputs_of(model, 11, seed)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    theirs = step(model, inputs)
    ours = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, inputs).items()}
    assert_close(ours, theirs, limit=1e-6)


def test_state_dict_restore_and_registry(seed: int) -> None:
    """Nothing but the forward changes."""
    model = adapted(block(seed=seed), seed=seed + 1)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    registered = dict(ALL_EXPERTS_FUNCTIONS.items())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text, classes = repr(model), [type(module) for module in model.modules()]
    dk.accelerate(model, strict=True)
    step(model, inputs_of(model, 5, seed))
    assert experts_of(model).config._experts_implementation == "grouped_mm"
    assert dict(ALL_EXPERTS_FUNCTIONS.items()) == registered
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert repr(model) == text
    assert dk.restore(model) == 2
    assert [type(module) for module in model.modules()] == classes
