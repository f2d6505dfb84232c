"""DistributedDataParallel over a small Qwen3-MoE with adapters on its experts: the gradients of
every rank are PEFT's of one process on the whole batch.
"""

import copy

import peft
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import delora_kernels as dk
from delora_kernels.testing import relative_error
from distributed.passes import gradients

SIZES = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 5, "num_experts_per_tok": 2, "vocab_size": 32}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    frozen = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, experts_implementation="eager")).double()
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(r=3, target_modules=[], target_parameters=targets, init_lora_weights=False)
    made: nn.Module = peft.get_peft_model(frozen, settings)
    return made


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens).logits.square().mean()
    return loss


def train(rank: int, seed: int) -> int:
    """A pass, then two that are accumulated; how many blocks of experts are fused."""
    made = model(seed)
    tokens = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(seed))
    expected = copy.deepcopy(made)
    loss_of(expected, tokens).backward()
    want = gradients(expected)
    report = dk.accelerate(made, strict=True)
    wrapped = DistributedDataParallel(made)
    mine = tokens.chunk(2)[rank]
    loss_of(wrapped, mine).backward()
    _compare(gradients(wrapped), want)
    wrapped.zero_grad()
    first, second = mine.chunk(2)
    with wrapped.no_sync():
        (loss_of(wrapped, first) / 2).backward()
    (loss_of(wrapped, second) / 2).backward()
    _compare(gradients(wrapped), want)
    return len(report.fused)


def _compare(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    assert any(value.any() for value in want.values())
    for name, grad in want.items():
        assert relative_error(found[name], grad) <= 1e-9, name
