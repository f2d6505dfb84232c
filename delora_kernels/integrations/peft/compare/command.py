"""`python -m delora_kernels compare`: a model from a hub, a folder or its config alone, on random
tokens.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import DeloraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from delora_kernels.integrations.peft.compare.comparison import Comparison
from delora_kernels.integrations.peft.compare.run import compare

METHODS = ("lora", "rslora", "dora", "delora")
DTYPES = ("float32", "bfloat16", "float16")


class Wanted(NamedTuple):
    """What is to be compared.

    Args:
        model: A hub's name, or a folder; one that holds nothing but config.json gives random
            weights.
        adapter: Folder or name of a saved adapter; None: a new one of `method` and `rank` on all
            linears, with a random B.
        method: One of METHODS.
        rank: Of a new adapter.
        sequences, tokens: Of the batch.
        steps, seconds: As compare() takes them; what loading takes counts in `seconds`.
        device: "cpu", "cuda", ...
        dtype: Of the frozen weights, one of DTYPES; adapters are float32.
        autocast: Whether passes run under bfloat16 autocast.
        checkpointing: Whether the model's blocks are checkpointed.
    """

    model: str
    adapter: str | None
    method: str
    rank: int
    sequences: int
    tokens: int
    steps: int
    seconds: float
    device: str
    dtype: str
    autocast: bool
    checkpointing: bool


def run(wanted: Wanted) -> Comparison:
    """Load the model, give it adapters, compare.

    Raises:
        OSError, ValueError: Transformers or PEFT can't load what is named.
    """
    began = time.perf_counter()
    torch.manual_seed(0)
    model: Any = adapted(wanted)
    if wanted.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(model.config.get_text_config().vocab_size, (wanted.sequences, wanted.tokens)).to(wanted.device)
    with torch.autocast(torch.device(wanted.device).type, torch.bfloat16, enabled=wanted.autocast):
        left = max(1.0, wanted.seconds - (time.perf_counter() - began))
        return compare(model, {"input_ids": ids, "labels": ids}, steps=wanted.steps, seconds=left)


def adapted(wanted: Wanted) -> nn.Module:
    """Return the model with its adapters, on its device."""
    base = load(wanted.model, getattr(torch, wanted.dtype)).to(wanted.device)
    if wanted.adapter is not None:
        return PeftModel.from_pretrained(base, wanted.adapter, is_trainable=True)
    options: dict[str, Any] = {"r": wanted.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if wanted.method == "delora":
        return get_peft_model(base, DeloraConfig(init_weights=False, **options))
    options |= {"use_rslora": wanted.method == "rslora", "use_dora": wanted.method == "dora"}
    return get_peft_model(base, LoraConfig(lora_alpha=2 * wanted.rank, init_lora_weights=False, **options))


def load(name: str, dtype: torch.dtype) -> Any:
    """Load a causal language model; of a folder without weights, make one at random."""
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        config = transformers.AutoConfig.from_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
