"""LoRA on the experts of an expert model: fused, proven to train, saved, and written as servers
read it.

    python examples/experts.py
    python examples/experts.py --bits 4  # experts in bitsandbytes' nf4 (pip install bitsandbytes)

The model is a small random Qwen3-MoE that reads bytes. Its experts are 3-D parameters (Transformers
5), which PEFT adapts by `target_parameters`.
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
from safetensors.torch import load_file
from torch import Tensor

import delora_kernels as dk

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def small_qwen3_moe() -> Any:
    """Return a random Qwen3-MoE of two blocks with 8 experts each, two of them for each token."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, **sizes, **heads)
    return transformers.Qwen3MoeForCausalLM(config)


def difference(ours: Any, theirs: Any, batch: Tensor) -> float:
    """Return the largest difference of two models' logits, relative to the largest logit."""
    with torch.no_grad():
        expected = theirs.eval()(batch).logits
        return ((ours.eval()(batch).logits - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    """Train, look whether it trained, save, load, export, merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(4, 32), default=32, help="of the experts; default: 32")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()

    torch.manual_seed(0)
    text = "\n\n".join(topics[key] for key in sorted(topics)).encode()[: 300 * 64]
    rows = torch.tensor(list(text)).view(300, 64)
    base = small_qwen3_moe()
    if options.bits == 4:
        print(dk.quantize_experts(base, "nf4"))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=TARGETS)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    trains = dk.TrainingReportCallback(stop=True)  # raises where an adapter does not train as it should
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                learning_rate=1e-2,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[dk.AccelerateCallback(strict=True), trains],
        )
        trainer.train()
        report = trains.report
        assert report is not None
        experts = [each for each in report.tensors if each.expert is not None]
        print(f"{sum(each.change > 0 for each in experts)} of {len(experts)} experts' factors moved")
        print(f"{len(report.alarms)} alarms after {report.steps} steps")

        path, batch = Path(folder), rows[:4]
        model.save_pretrained(path / "adapter")  # PEFT's own folder: to train on
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), path / "adapter")
        print(f"saved and loaded by PEFT, relative difference: {difference(loaded, model, batch):.1e}")
        print(dk.export_lora(model, path / "fused"))  # PEFT's keys, the scale inside: vLLM's 3-D models
        exported = peft.PeftModel.from_pretrained(copy.deepcopy(base), path / "fused")
        print(f"exported and loaded by PEFT, relative difference: {difference(exported, model, batch):.1e}")
        dk.export_lora(model, path / "single", experts="per_expert")  # one pair for each linear of each expert
        print(f"per expert: {len(load_file(path / 'single' / 'adapter_model.safetensors'))} tensors")
        if options.bits == 4:
            return  # rounding would take the adapter away: merging raises
        merged = copy.deepcopy(model).merge_and_unload()  # for a server that reads neither
        print(f"merged, relative difference: {difference(merged, model, batch):.1e}")


if __name__ == "__main__":
    main()
