"""import_goat: an adapter that GOAT's own training code has saved, as an adapter of this library.

Its file has, for each linear `m` and expert e (Facico/GOAT-PEFT,
`goat/peta/src/utils/save_and_load.py`),

    base_model.model.m.lora_A.e.weight [r, K]   ...lora_B.e.weight [N, r]
    ...lora_gating.weight [E, K]

and A and B once more under `m.moe_layer.experts.e`. What it has not is the residual that was
subtracted from the base weight, nor the scale: the first is made again from the base weight's
singular values, the second must be said.
"""

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.integrations.peft.methods.goat.config import GoatConfig
from delora_kernels.integrations.peft.methods.goat.layer import PeftGoatLinear

_NAME = "import_goat"
_LAYER = r"^(?:base_model\.model\.)?(?P<layer>.+?)"
_KEY = re.compile(_LAYER + r"\.(?:lora_(?P<role>[AB])\.(?P<expert>\d+)|(?P<router>lora_gating))\.weight$")
_COPY = re.compile(_LAYER + r"\.moe_layer\.experts\.(?P<expert>\d+)\.lora_(?P<role>[AB])\.weight$")
_STARTS = {"pissa_milora": "half", "pissa_scale": "pissa", "mole": "zero", "lora": "zero", "lora_scale": "zero"}
_STARTS |= {name: name for name in ("goat", "goat_mini", "pissa", "milora")}


def import_goat(
    model: nn.Module,
    directory: str | Path,
    *,
    scaling: str | float | Sequence[float],
    adapter_name: str = "default",
    **options: Any,
) -> Any:
    """Load a checkpoint of GOAT's source onto a base model; `save_pretrained` then saves it in
    PEFT's way.

        model = dk.import_goat(base_model, "output", scaling="alpha/r")

    Where the source wrote W − γ s B⁰A⁰ into the base weight, rounded to its dtype, W stays here and
    the start is subtracted beside it. Its dropout masks are independent for each expert, and so are
    they here.

    Args:
        model: The base model that was trained on, unchanged.
        directory: With adapter_config.json, and adapter_model.safetensors or adapter_model.bin.
        scaling: What the training run multiplied the experts by, which no file tells: "alpha/r" for
            the scripts of commit ef4d21a, "theory" for commit 64555ae, which scales a "goat" start
            by √(3 η K / r), or what the environment variable SCALING held.
        adapter_name: Of the adapter in the model.
        **options: Further fields of GoatConfig, such as eta (environment variable ETA),
            balance_coef.

    Returns:
        The PeftModel, trainable.

    Raises:
        ValueError: the folder is no such checkpoint or does not fit the model; the text says what
            and the remedy.
    """
    directory = Path(directory)
    if not (directory / "adapter_config.json").is_file():
        got = f"{str(directory)!r}" + (", which has none" if directory.is_dir() else ", where there is no folder")
        remedy = "download a checkpoint of a hub first, with huggingface_hub.snapshot_download, and pass its folder"
        raise checks.fail(ValueError, _NAME, "directory", "a local folder with adapter_config.json", got, remedy)
    source = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    if "init_type" not in source or "num_experts" not in source:
        remedy = "load an adapter of this library with PeftModel.from_pretrained"
        got = f"a config with {', '.join(sorted(source))}"
        raise checks.fail(ValueError, _NAME, "directory", "a checkpoint of GOAT's source", got, remedy)
    layers = _tensors(directory)
    config = _config(source, layers, scaling, options)
    made: Any = peft.get_peft_model(model, config, adapter_name=adapter_name)
    found = {name: layer for name, layer in made.base_model.model.named_modules() if isinstance(layer, PeftGoatLinear)}
    missing = sorted(set(layers) - set(found))
    if missing:
        raise _refuse("model", "the base model of the checkpoint", f"one without {missing[:3]}")
    ratios = []
    with torch.no_grad():
        for name, tensors in layers.items():
            ratios.append(_fill(name, found[name], adapter_name, tensors))
            found[name].reset_magnitude(adapter_name)
    _doubt_scale(config, ratios)
    return made


def _tensors(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Return A [E, r, K], B [E, N, r] and router [E, K] of each layer; the copies are checked to be
    copies.
    """
    if (directory / "adapter_model.safetensors").is_file():
        state = load_file(directory / "adapter_model.safetensors")
    else:
        state = torch.load(directory / "adapter_model.bin", map_location="cpu", weights_only=True)
    parts: dict[str, dict[tuple[str, int], Tensor]] = {}
    unknown = []
    for key, value in state.items():
        match = _COPY.match(key) or _KEY.match(key)
        if match is None:
            unknown.append(key)
            continue
        is_router = match.groupdict().get("router") is not None
        slot = ("router", 0) if is_router else (match["role"], int(match["expert"]))
        kept = parts.setdefault(match["layer"], {}).setdefault(slot, value)
        if not torch.equal(kept, value):
            expected = f"one with one {slot[0]} for each expert"
            raise _refuse(f"layer {match['layer']!r}", expected, f"two of expert {slot[1]}")
    if unknown or not parts:
        raise _refuse("its keys", "those of GOAT's layers", f"others: {unknown[:3]}" if unknown else "none")
    return {name: _stacked(name, slots) for name, slots in parts.items()}


def _stacked(name: str, slots: dict[tuple[str, int], Tensor]) -> dict[str, Tensor]:
    router = slots.get(("router", 0))
    if router is None:
        raise _refuse(f"layer {name!r}", "one with lora_gating", "none")
    lacking = [f"lora_{role}.{e}" for role in "AB" for e in range(len(router)) if (role, e) not in slots]
    if lacking or len(slots) != 1 + 2 * len(router):
        raise _refuse(f"layer {name!r}", f"one of {len(router)} experts", f"without {lacking}" if lacking else "more")
    stack = {role: torch.stack([slots[role, e] for e in range(len(router))]) for role in "AB"}
    return stack | {"router": router}


def _config(
    source: dict[str, Any],
    layers: dict[str, dict[str, Tensor]],
    scaling: str | float | Sequence[float],
    options: dict[str, Any],
) -> GoatConfig:
    E, kind = source["num_experts"], source["init_type"].removeprefix("rs")
    if kind not in _STARTS:
        raise _refuse("init_type", f"one of {', '.join(_STARTS)}", source["init_type"])
    if source.get("bias", "none") != "none":
        raise _refuse("bias", "'none'", source["bias"])
    ranks = {name: tensors["A"].shape[1] for name, tensors in layers.items()}
    settings: dict[str, Any] = {
        "r": source["r"] // E,
        "num_experts": E,
        "top_k": source["top_k"],
        "alpha": source["lora_alpha"],
        "scaling": list(scaling) if isinstance(scaling, (list, tuple)) else scaling,
        "init_weights": _STARTS[kind],
        "init_cof": source["init_cof"],
        "dropout": source.get("lora_dropout", 0.0),
        "dropout_kind": "independent",
        "target_modules": sorted(layers),  # not the source's: it leaves layers smaller than r alone
        "task_type": source.get("task_type"),
    }
    if set(ranks.values()) != {settings["r"]}:
        raise _refuse("the experts' rank", f"r // num_experts = {settings['r']}", sorted(set(ranks.values())))
    return GoatConfig(**settings | options)


def _fill(name: str, layer: Any, adapter: str, tensors: dict[str, Tensor]) -> float:
    """Put the tensors into a layer; returns the size of A and B over that of their start."""
    own = {"A": layer.goat_A[adapter], "B": layer.goat_B[adapter], "router": layer.goat_router[adapter]}
    start = float(own["A"].norm() * own["B"].norm())
    for role, value in tensors.items():
        if own[role].shape != value.shape:
            raise _refuse(f"{role} of layer {name!r}", str(list(own[role].shape)), list(value.shape))
        own[role].copy_(value)
    return float(own["A"].norm() * own["B"].norm()) / start if start > 0 else 1.0


def _doubt_scale(config: GoatConfig, ratios: list[float]) -> None:
    """Warn if the factors are far from as large as that scale would have made them at the start."""
    ratio = median(ratios)
    if config.start != "zero" and not 0.5 <= ratio <= 2:
        warnings.warn(
            f"{_NAME}: the checkpoint's experts are {ratio:.2g} times as large as scaling={config.scaling!r} starts "
            f"them; unless training changed them so much, its scale was {1 / ratio:.2g} times that",
            stacklevel=3,
        )


def _refuse(what: str, expected: str, got: object) -> Exception:
    remedy = "pass a folder that GOAT's training script saved, and its base model"
    return checks.fail(ValueError, _NAME, what, expected, got, remedy)
