"""Fine-tune a PEFT model with Transformers' Trainer: the one line that makes its adapters run fused
is the callback.

    python examples/peft_trainer.py  # a small random Llama, seconds on a CPU
    # a model and tokenizer of the hub or a folder
    python examples/peft_trainer.py --model NAME --method dora

The text is the standard library's help on Python (pydoc_data.topics); the small Llama reads its
bytes. TRL's SFTTrainer takes the same callback, and the config as its peft_config.
"""

import argparse
import tempfile
from pydoc_data.topics import topics
from typing import Any

import peft
import torch
import transformers

import delora_kernels as dk


def adapter_config(method: str) -> peft.PeftConfig:
    """Return a PEFT config for every linear of a causal language model."""
    if method == "delora":
        return peft.DeloraConfig(r=8, delora_lambda=15, target_modules="all-linear", task_type="CAUSAL_LM")
    dora = method == "dora"
    return peft.LoraConfig(r=8, lora_alpha=16, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM")


def model_and_tokens(name: str | None) -> tuple[Any, list[int]]:
    """Return the model `name` and the text in its tokens, or a random Llama and the text's
    bytes.
    """
    text = "\n\n".join(topics[key] for key in sorted(topics))
    if name is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return transformers.AutoModelForCausalLM.from_pretrained(name), tokenizer(text)["input_ids"]
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config), list(text[:100_000].encode())


def main() -> None:
    """Train and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; default: a small random Llama")
    parser.add_argument("--method", choices=("lora", "dora", "delora"), default="delora")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=128, help="length of a row; default: 128")
    options = parser.parse_args()

    torch.manual_seed(0)
    base, ids = model_and_tokens(options.model)
    rows = torch.tensor(ids[: len(ids) // options.tokens * options.tokens]).view(-1, options.tokens)
    model = peft.get_peft_model(base, adapter_config(options.method))
    fused = dk.AccelerateCallback()  # strict=True: raise unless every adapter layer can be fused
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=4,
                learning_rate=1e-2 if options.model is None else 1e-3,
                logging_steps=max(1, options.steps // 5),
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[fused],
        )
        trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(fused.report)
    print(f"loss of the first fifth of the steps {losses[0]:.3f}, of the last {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
