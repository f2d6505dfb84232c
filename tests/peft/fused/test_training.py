"""A small Llama trained with eager and with fused adapters: the same loss curve, in every mode
people train in.
"""

from typing import Any

import peft
import pytest
import torch
from peft_models import config
from torch import Tensor

import delora_kernels as dk

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oldest_peft
STEPS = 15


def llama(method: str, seed: int, dtype: torch.dtype, checkpointing: bool) -> Any:
    """A PEFT Llama of one block with adapters on its seven linears."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "vocab_size": 97, "num_hidden_layers": 1}
    settings = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    base = transformers.LlamaForCausalLM(settings).to(dtype)
    made = peft.get_peft_model(base, config(method, r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        made.enable_input_require_grads()
        made.gradient_checkpointing_enable()
    return made.train()


def nudge(made: Any, eps: float) -> None:
    """Move every trainable number by up to one rounding error."""
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter *= 1 + eps * (torch.rand_like(parameter) - 0.5)


def losses(made: Any, batches: Tensor, autocast: bool, lr: float, nudged_by: float = 0.0) -> Tensor:
    """The loss of each training step."""
    # a large eps: Adam turns the sign of a gradient that is nothing but rounding into a full step
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=lr, eps=1e-3)
    curve = []
    for batch in batches:
        nudge(made, nudged_by)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = made(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.detach().double())
    return torch.stack(curve)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_same_loss_curve(method: str, precision: str, seed: int) -> None:
    """Fused, and fused with checkpointing, which changes no number of the eager run."""
    dtype = getattr(torch, precision)
    batches = torch.randint(97, (3, 4, 24), generator=torch.Generator().manual_seed(seed)).repeat(STEPS // 3, 1, 1)
    curves, eps = {}, torch.finfo(dtype).eps
    for run in ("eager", "nudged", "fused", "fused, checkpointing"):
        made = llama(method, seed, dtype, "checkpointing" in run)
        if run.startswith("fused"):
            report = dk.accelerate(made, strict=True)
            assert len(report.fused) == 7
        # DeLoRA learns directions: its factors must turn
        lr = 6e-2 if method == "delora" else 3e-3
        curves[run] = losses(
            made, batches, autocast=dtype == torch.bfloat16, lr=lr, nudged_by=eps if run == "nudged" else 0.0
        )
    eager, nudged, *fused = curves.values()
    assert eager[-3:].mean() < eager[:3].mean() - 0.02  # it learns
    # rounding differences grow with the steps, as do those of a run whose adapters are rounded once
    # more at each step
    spread = (eager - nudged).abs().mean() + 8 * eps
    for curve in fused:
        assert (eager - curve).abs().mean() <= 8 * spread
