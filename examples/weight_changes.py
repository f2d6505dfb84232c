"""What training does to the weights: how far lengths and directions of their rows move, over the
steps, for full fine-tuning, LoRA, DoRA and DeLoRA (the analysis of DoRA's paper, section 3.2).

    python examples/weight_changes.py  # a small random Llama, seconds on a CPU
    # a model and tokenizer of the hub or a folder; one figure for each method
    python examples/weight_changes.py --model NAME --steps 200 --plot folder

The text is the standard library's help on Python (pydoc_data.topics). What the numbers mean:
docs/weight-changes.md.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import torch
import transformers

import delora_kernels as dk

METHODS = {  # config and learning rate; None: the weights themselves train
    "full": (None, 1e-3),
    "LoRA": (peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"), 1e-2),
    "DoRA": (
        peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
        1e-2,
    ),
    "DeLoRA": (peft.DeloraConfig(r=8, delora_lambda=2, target_modules="all-linear", task_type="CAUSAL_LM"), 1e-2),
}


def model_and_tokens(name: str | None) -> tuple[Any, list[int]]:
    """Return the model `name` and the text in its tokens, or a random Llama and the text's
    bytes.
    """
    text = "\n\n".join(topics[key] for key in sorted(topics))
    if name is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return transformers.AutoModelForCausalLM.from_pretrained(name), tokenizer(text)["input_ids"]
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config), list(text[:100_000].encode())


def main() -> None:
    """Train with each method, and print what became of the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; default: a small random Llama")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64, help="length of a row; default: 64")
    parser.add_argument("--plot", type=Path, help="folder for the figures; default: none")
    options = parser.parse_args()

    torch.manual_seed(0)
    start, ids = model_and_tokens(options.model)
    rows = torch.tensor(ids[: len(ids) // options.tokens * options.tokens]).view(-1, options.tokens)
    found = {}
    for method, (config, lr) in METHODS.items():
        model = copy.deepcopy(start) if config is None else peft.get_peft_model(copy.deepcopy(start), config)
        watch = dk.WeightChangesCallback(every=max(1, options.steps // 4))
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder,
                max_steps=options.steps,
                learning_rate=lr if options.model is None else lr / 50,
                per_device_train_batch_size=4,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            trainer = transformers.Trainer(
                model,
                arguments,
                train_dataset=[{"input_ids": row, "labels": row} for row in rows],
                callbacks=[dk.AccelerateCallback(), watch] if config is not None else [watch],
            )
            trainer.train()
        found[method] = changes = watch.changes.of("proj")  # the linears of the blocks
        if options.plot is not None:
            options.plot.mkdir(parents=True, exist_ok=True)
            changes.plot(options.plot / f"{method}.png")

    print(found["DeLoRA"])
    print("\nmethod   ΔM        ΔD        |ΔW|/|W|  correlation of ΔD and ΔM: all, in a step, in a layer")
    for method, changes in found.items():
        means = changes.summary()
        numbers = [means[f"weights/{name}"] for name in ("magnitude", "direction", "update")]
        over = [changes.correlation(each) for each in ("all", "layers", "steps")]
        print(f"{method:8} " + "  ".join(f"{x:.2e}" for x in numbers) + "  " + "  ".join(f"{x:+.3f}" for x in over))


if __name__ == "__main__":
    main()
