"""GOAT, a mixture of low-rank experts, with PEFT and Transformers' Trainer: train, see whether the
experts live, save.

    python examples/goat_trainer.py  # a small random Llama, seconds on a CPU
    python examples/goat_trainer.py --model NAME --steps 500  # a model of the hub or a folder

The text is the standard library's help on Python (pydoc_data.topics). What the options mean:
docs/goat.md.
"""

import argparse
import copy
import tempfile
from pydoc_data.topics import topics
from typing import Any

import peft
import torch
import transformers

import delora_kernels as dk
from delora_kernels.nn import router_parameter_groups


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
    """Train, report, save, load, merge approximately."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; default: a small random Llama")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=128, help="length of a row; default: 128")
    parser.add_argument("--lr", type=float, help="default: 1e-2 for the small Llama, else 1e-4")
    options = parser.parse_args()

    torch.manual_seed(0)
    base, ids = model_and_tokens(options.model)
    untouched = copy.deepcopy(base)
    rows = torch.tensor(ids[: len(ids) // options.tokens * options.tokens]).view(-1, options.tokens)
    lr = options.lr or (1e-2 if options.model is None else 1e-4)
    config = dk.GoatConfig(
        r=4,  # of each of the 8 experts: 32 together
        num_experts=8,
        top_k=2,
        eta=2e-5 / lr,  # the learning rate of full fine-tuning over this one; it sets the scale
        balance_coef=1e-2,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW(router_parameter_groups(model, lr=lr, router_lr=lr / 2), weight_decay=0.0)
    experts = dk.ExpertCallback()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            logging_steps=max(1, options.steps // 5),
            save_strategy="no",
            report_to=[],
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[experts],
            optimizers=(optimizer, None),
        )
        trainer.train()
        model.eval().save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(untouched, folder).to(model.device)
        batch = {"input_ids": rows[:4].to(model.device)}
        with torch.no_grad():
            same = torch.equal(loaded(**batch).logits, model(**batch).logits)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss of the first fifth of the steps {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    report = experts.history[-1][1]
    print(report)  # report.plot("experts.png") draws it
    print(f"balance {report.summary()['router/balance']:.3f} (1 is even)")
    print(f"saved and loaded, the same bits: {same}")
    print(dk.merge_mean_gate(model, batch))


if __name__ == "__main__":
    main()
