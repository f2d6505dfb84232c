"""export_lora on a pretrained model: SmolLM2-135M with DeLoRA on all its linears, exported and
loaded by PEFT.
"""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("gguf", reason="reading the model of the demo needs gguf")
pytest.importorskip("accelerate", reason="loading the model of the demo needs accelerate")

import peft

from benchmarks.finetune.config import Problem
from benchmarks.finetune.model import find, load
from delora_kernels.integrations.peft.export.export_lora import export_lora

SENTENCE = "The export of a folded adapter computes what the adapter computed, in Paris as in Tübingen."


@pytest.mark.smollm2
def test_logits_and_probabilities_are_those_of_the_exported_model(tmp_path: Path, seed: int) -> None:
    try:
        source = find(None)
    except Problem as problem:
        pytest.skip(str(problem))
    wanted: Any = SimpleNamespace(dtype="fp32", device="cpu", quantise=None)  # what load() reads of the demo's settings
    base, tokenizer = load(source, wanted)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(copy.deepcopy(base), peft.DeloraConfig(**options)).eval()
    for name, parameter in made.named_parameters():
        if "delora_B" in name:
            nn.init.normal_(parameter)
    export = export_lora(made, tmp_path)
    assert set(export.ranks.values()) == {16}
    assert len(export.ranks) == 210
    tokens = tokenizer(SENTENCE, return_tensors="pt")
    with torch.no_grad():
        unadapted = base.eval()(**tokens).logits.double()
        expected = made(**tokens).logits.double()
        got = peft.PeftModel.from_pretrained(base, export).eval()(**tokens).logits.double()
    logit = (got - expected).abs().max() / expected.abs().max()
    probability = (got.softmax(-1) - expected.softmax(-1)).abs().max()
    print(f"{export}; differences: logits {logit:.2e} of the largest, probabilities {probability:.2e}")
    assert logit <= 1e-5
    assert probability <= 1e-5
    assert (expected - unadapted).abs().max() > 0.1 * expected.abs().max()  # the adapter does something
