"""Beside libraries that change a model's modules too: what the report says, and what runs."""

from collections import Counter
from types import MethodType, SimpleNamespace
from typing import Any

import peft
import peft_models
import pytest
import tiny_llama
import torch
from fused_count import counted
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import delora_kernels as dk


def function_of(module: str, name: str, body: Any) -> Any:
    """A function as it would be of another library."""
    body.__module__, body.__name__ = module, name
    return body


def block_of(model: Any) -> Any:
    return model.base_model.model.model.layers[0]


def liger_mlp(mlp: Any, x: Tensor) -> Tensor:
    """What Liger puts on an MLP: the product of gate and up is its own, the linears are called."""
    y: Tensor = mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return y


def test_liger_calls_the_layers(seed: int) -> None:
    """Norms, rotary embedding, MLP product and loss are Liger's, the adapters' layers run fused."""
    model = tiny_llama.llama("lora", seed, blocks=1)
    plain = model(tiny_llama.tokens(seed, 2, 6)).logits
    mlp = block_of(model).mlp
    mlp.forward = MethodType(function_of("liger_kernel.transformers.swiglu", "forward", liger_mlp), mlp)
    report = dk.accelerate(model)
    assert len(report.fused) == 7
    with counted() as passes:
        found = model(tiny_llama.tokens(seed, 2, 6)).logits
    assert len(passes) == 7
    assert torch.allclose(found, plain, rtol=1e-4, atol=1e-5)


def test_liger_itself(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Its modules, patched in by its own function, with torch in the place of its Triton kernels,
    which need a GPU: every layer runs fused, loss and gradients are those of PEFT's layers.
    """
    liger = pytest.importorskip("liger_kernel.transformers", reason="needs Liger: pip install --no-deps liger-kernel")
    calls: Counter[str] = Counter()

    def instead(module: str, name: str, function: Any) -> None:
        def apply(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(f"liger_kernel.transformers.{module}.{name}", SimpleNamespace(apply=apply))

    cross_entropy, linear, silu = nn.functional.cross_entropy, nn.functional.linear, nn.functional.silu
    instead("swiglu", "LigerSiLUMulFunction", lambda gate, up, *_: silu(gate) * up)
    instead("rms_norm", "LigerRMSNormFunction", lambda x, w, eps, *_: nn.functional.rms_norm(x, w.shape, w, eps))

    def loss_of(x: Tensor, w: Tensor, y: Tensor, *_: Any) -> Any:
        return cross_entropy(linear(x, w), y, ignore_index=-100), None, None, None

    instead("functional", "LigerFusedLinearCrossEntropyFunction", loss_of)
    for name in ("LlamaRMSNorm", "LlamaMLP"):  # which it replaces for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    base = tiny_llama.base(seed, blocks=1)
    liger.apply_liger_kernel_to_llama(rope=False, model=base)
    config = peft_models.config("dora", target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    ids = tiny_llama.tokens(seed, 2, 6)

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return found | {"loss": loss.detach()}

    theirs = step()
    assert len(dk.accelerate(model).fused) == 7
    with counted() as passes:
        ours = step()
    assert len(passes) == 7
    assert set(calls) == {"LigerSiLUMulFunction", "LigerRMSNormFunction", "LigerFusedLinearCrossEntropyFunction"}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), name


@pytest.mark.parametrize("library", ["unsloth.kernels.fast_lora", "axolotl.kernels.lora"])
@pytest.mark.parametrize("bound", [True, False])
def test_layers_that_are_computed_past_their_forward(library: str, bound: bool, seed: int) -> None:
    """Unsloth's and axolotl's LoRA kernels: these layers are declined, the others fused."""
    model = tiny_llama.llama("lora", seed, blocks=1)
    block = block_of(model)

    def apply(name: str, owner: Any, attribute: str) -> None:
        given = function_of(library, name, lambda module, x: x)
        setattr(owner, attribute, MethodType(given, owner) if bound else given)

    apply("apply_lora_mlp_swiglu", block.mlp, "forward")
    apply("apply_lora_qkv", block.self_attn, "apply_qkv")
    apply("original_apply_o", block.self_attn, "apply_o")
    report = dk.accelerate(model)
    assert [layer.name.rpartition(".")[2] for layer in report.fused] == ["o_proj"]
    assert {layer.code for layer in report.declined} == {"bypassed"}
    root = library.partition(".")[0]
    reasons = {layer.name.rpartition(".")[2]: layer.reason for layer in report.declined}
    assert reasons["up_proj"] == (
        f"its parent's forward is {root}'s apply_lora_mlp_swiglu, which computes it past its own forward"
    )
    assert str(reasons["q_proj"]).startswith(f"its parent's apply_qkv is {root}'s apply_lora_qkv")
    with pytest.raises(RuntimeError, match="strict=True, but not every adapter layer can be fused"):
        dk.accelerate(model, strict=True)


def test_a_replaced_forward_of_pefts_layer(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """What Unsloth's compiled modules put there runs, and the report says so."""
    seen: list[nn.Module] = []

    def unsloth_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(layer)
        y: Tensor = layer.base_layer(x)
        return y

    model = tiny_llama.llama("lora", seed, blocks=1)
    monkeypatch.setattr(LoraLinear, "forward", unsloth_forward)
    report = dk.accelerate(model)
    assert {(layer.code, layer.reason) for layer in report.layers} == {
        ("patched", "lora.layer.Linear.forward has been replaced")
    }
    model(tiny_llama.tokens(seed, 1, 3))
    assert len(seen) == 7
