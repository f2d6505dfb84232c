"""Train DeLoRA with PEFT, then ship it: merged into the weights, or exported as a standard LoRA
adapter.

    python examples/merge_and_export.py

A folded DeLoRA adapter is a LoRA adapter, so whatever loads LoRA can serve it: PEFT, and LoRA
servers that have never heard of DeLoRA. The script loads the export with PEFT and compares the
logits. The model is a small random Llama.
"""

import copy
import json
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import delora_kernels as dk

STEPS = 20


def small_llama() -> Any:
    """Return a random Llama of two blocks that reads bytes."""
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=4, **sizes))


def train(model: Any, rows: Tensor) -> None:
    """Return a few steps; the loss is printed before and after."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(STEPS):
        batch = rows[torch.randint(len(rows), (8,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, STEPS - 1):
            print(f"step {step + 1}: loss {loss.item():.3f}")


def difference(ours: Any, theirs: Any, batch: Tensor) -> float:
    """Return the largest difference of two models' logits, relative to the largest logit."""
    with torch.no_grad():
        expected = theirs(batch).logits
        return ((ours(batch).logits - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    """Train, export, load, merge; print the differences."""
    torch.manual_seed(0)
    text = "\n\n".join(topics[key] for key in sorted(topics))[:100_000]
    rows = torch.tensor(list(text.encode())[: 700 * 128]).view(700, 128)
    base = small_llama()
    adapters = peft.DeloraConfig(r=8, delora_lambda=15, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), adapters)
    print(dk.accelerate(model, strict=True))
    train(model, rows)
    model.eval()

    with tempfile.TemporaryDirectory() as folder:
        dk.export_lora(model, folder)
        written = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        print(f"exported: a {written['peft_type']} adapter of rank {written['r']}")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    print(f"adapter off, relative difference: {difference(base, model, rows[:4]):.1e}")  # for scale: what it learned
    print(f"exported and loaded, relative difference: {difference(loaded, model, rows[:4]):.1e}")

    merged = copy.deepcopy(model).merge_and_unload()
    print(f"merged, relative difference: {difference(merged, model, rows[:4]):.1e}")


if __name__ == "__main__":
    main()
