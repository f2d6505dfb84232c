"""The axolotl plugin, as axolotl loads and calls it."""

import sys
from pathlib import Path
from typing import Any

import axolotl_stand_in
import peft_models
import pytest
import tiny_llama
import torch

import delora_kernels as dk

NAME = "delora_kernels.integrations.axolotl.DeloraKernelsPlugin"
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@pytest.fixture(autouse=True)
def axolotl(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydantic")
    axolotl_stand_in.put_in_place(monkeypatch)


def test_axolotls_own_kernels_stay_off() -> None:
    _, cfg = axolotl_stand_in.prepared({"plugins": [NAME], "adapter": "lora"})
    assert [cfg[name] for name in KERNELS] == [False] * 4
    _, without = axolotl_stand_in.prepared({"plugins": []})
    assert [without[name] for name in KERNELS] == [True] * 4


@pytest.mark.parametrize("name", KERNELS)
def test_both_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"got {name} on; set them to false, or take the plugin out"):
        axolotl_stand_in.prepared({"plugins": [NAME], name: True})


@pytest.mark.parametrize("strict", [None, False, True])
def test_its_callback_accelerates_the_trainers_model(strict: bool | None, seed: int, tmp_path: Path) -> None:
    import transformers

    written: dict[str, Any] = {"plugins": [NAME]} | ({} if strict is None else {"delora_kernels_strict": strict})
    (plugin,), cfg = axolotl_stand_in.prepared(written)
    model = tiny_llama.llama("lora", seed, blocks=1)
    (callback,) = plugin.add_callbacks_pre_trainer(cfg=cfg, model=model)
    assert isinstance(callback, dk.AccelerateCallback)
    assert callback.strict is bool(strict)
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    ids = tiny_llama.tokens(seed, 4, 6)
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(str(tmp_path), **options), train_dataset=data, callbacks=[callback]
    )
    trainer.train()
    assert callback.report is not None
    assert len(callback.report.fused) == 7


def test_nothing_else_imports_it() -> None:
    peft_models.model("lora", 0)
    assert dk.AccelerateCallback
    assert "delora_kernels.integrations.axolotl" not in sys.modules
    assert torch is not None
