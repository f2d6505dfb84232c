"""Transformers' Trainer of the small Llama: four steps of two rows."""

from pathlib import Path
from typing import Any

import transformers
from tiny_llama import tokens
from torch import Tensor


def rows(seed: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(seed, 16, 12)]


def trainer(folder: Path, made: Any, seed: int, callbacks: Any = (), **options: Any) -> transformers.Trainer:
    """A Trainer of four steps, two rows each."""
    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": seed}
    # a large eps: Adam turns the sign of a gradient that is nothing but rounding into a full step
    settings |= {"adam_epsilon": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True}
    args = transformers.TrainingArguments(output_dir=str(folder), disable_tqdm=True, **settings | options)
    data = {"train_dataset": rows(seed), "eval_dataset": rows(seed + 1)[:4]}
    return transformers.Trainer(made, args, callbacks=list(callbacks), **data)
