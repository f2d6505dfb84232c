"""The folder of a LoRA adapter: its config, whose patterns match exactly the adapted layers, its
weights, its card.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from delora_kernels.version import __version__

PREFIX = "base_model.model."
"""What PEFT's keys start with."""

_CARD = """---
{base}library_name: peft
tags:
- lora
---

LoRA adapter, r = {r}, folded from DeLoRA or LoRA adapters by delora-kernels {version}. Its scale is 1: `lora_alpha` is
the rank. Load it with `peft.PeftModel.from_pretrained(base_model, folder)` or a LoRA server.
"""


def lora_config(
    base: dict[str, nn.Module],
    ranks: dict[str, int],
    configs: list[Any],
    saved: list[str],
    bias: str,
    parameters: dict[str, int],
    parts: list[str],
) -> peft.LoraConfig:
    """Return the config of an adapter whose layers have `ranks` and scale 1, in the model whose
    modules are `base`.

    Args:
        base: Every module of the base model by name; "" is the model itself.
        ranks: Rank of each adapted layer by name.
        configs: The PEFT configs that it comes from: base model, revision and task are theirs.
        saved: Names for modules_to_save.
        bias: "none", "lora_only" or "all".
        parameters: Rank of each adapted parameter of experts by name.
        parts: Names of the linears that single experts are written as; []: they are one parameter.
    """
    r = max([*ranks.values(), *parameters.values()])
    # PEFT looks for a pattern at the end of a layer's name; ^ ties it to the whole of it
    named = ranks if parts else ranks | parameters
    pattern = {f"^{re.escape(name)}": rank for name, rank in named.items() if rank != r}

    def first(field: str) -> Any:
        return next((value for config in configs if (value := getattr(config, field, None)) is not None), None)

    trunk = base[""]
    name_or_path = first("base_model_name_or_path") or getattr(trunk, "name_or_path", None)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        bias=bias,  # type: ignore[arg-type]
        fan_in_fan_out=any(type(base.get(name)).__name__ == "Conv1D" for name in ranks),
        modules_to_save=saved or None,
        task_type=first("task_type"),
        base_model_name_or_path=name_or_path if isinstance(name_or_path, str) and name_or_path else None,
        revision=first("revision"),
        inference_mode=True,
    )
    config.target_modules = _targets(ranks.keys(), base)  # in this order, which LoraConfig's set would lose
    if parts and isinstance(config.target_modules, str):
        config.target_modules += rf"|.*\.({'|'.join(parts)})"
    elif parts:
        config.target_modules = [*(config.target_modules or ()), *parts]
    elif parameters:
        config.target_parameters = list(parameters)
    return config


def _targets(names: Iterable[str], base: Iterable[str]) -> list[str] | str:
    """target_modules that PEFT matches with exactly `names`: a list, or a regex where an end of a
    name is another.
    """
    wanted = set(names)
    for other in set(base) - wanted:
        parts = other.split(".")
        if any(".".join(parts[i:]) in wanted for i in range(1, len(parts))):
            return "|".join(re.escape(name) for name in names)
    return list(names)


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Give a path beside `file` to write to, which takes its place; nothing is left or changed
    where the writing raises.
    """
    beside = file.with_name(f"{file.name}.part")
    try:
        yield beside
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def write(
    path: Path,
    tensors: dict[str, Tensor],
    config: peft.LoraConfig,
    trunk: nn.Module,
    check: Callable[[Path], None],
) -> int:
    """Write weights, config and, where there is none, the model card.

    Args:
        path: The folder.
        tensors: The weights by key.
        config: Of the adapter.
        trunk: The base model.
        check: Called with the weights' file before anything in the folder is replaced; what it
            raises leaves the folder's files as they were.

    Returns:
        Size of the weights' file in bytes.
    """
    path.mkdir(parents=True, exist_ok=True)
    file = path / SAFETENSORS_WEIGHTS_NAME
    with replaced(file) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
        check(beside)
    mapping = {"base_model_class": type(trunk).__name__, "parent_library": type(trunk).__module__}
    config.save_pretrained(str(path), auto_mapping_dict=mapping if config.task_type is None else None)
    card = path / "README.md"
    if not card.exists():
        name = config.base_model_name_or_path
        base = f"base_model: {json.dumps(name)}\n" if name else ""
        card.write_text(_CARD.format(base=base, r=config.r, version=__version__), encoding="utf-8")
    return file.stat().st_size
