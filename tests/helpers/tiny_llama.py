"""A small PEFT Llama with adapters on all its linears, its tokens, its trainable parameters."""

from typing import Any

import peft
import torch
import transformers
from peft_models import config
from torch import Tensor

BLOCKS = 2
LAYERS = 7 * BLOCKS
VOCABULARY = 97


def base(seed: int, dtype: torch.dtype = torch.float32, blocks: int = BLOCKS) -> Any:
    """A random Llama without adapters, of seven linears a block."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "vocab_size": VOCABULARY, "num_hidden_layers": blocks}
    settings = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(settings).to(dtype)


def llama(
    method: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.0,
    blocks: int = BLOCKS,
    target_modules: str | list[str] = "all-linear",
) -> Any:
    """A PEFT Llama in training mode, with random adapters of rank 4 on all its linears, or on
    these.
    """
    options = {"r": 4, "target_modules": target_modules, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(base(seed, dtype, blocks), config(method, dropout_p=dropout_p, **options)).train()


def tokens(seed: int, *shape: int) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def trainable(made: Any) -> dict[str, Tensor]:
    """Copies of the trainable parameters, in float64."""
    return {name: p.detach().double().clone() for name, p in made.named_parameters() if p.requires_grad}
