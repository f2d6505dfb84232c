"""export_lora: write DeLoRA and LoRA adapters as one standard LoRA adapter, the folder that PEFT
and LoRA servers load.

Folded, a DeLoRA adapter is a LoRA adapter: Δ = B̂ Â. Everything is computed and checked in memory
(`low_rank_terms.py` folds the layers, `expert_terms.py` those of expert models), then written
(`lora_folder.py`).
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.integrations.peft.export.diffusion_file import FORMATS, export_diffusion
from delora_kernels.integrations.peft.export.expert_check import check_file
from delora_kernels.integrations.peft.export.expert_terms import (
    LAYOUTS,
    ExpertNames,
    are_experts,
    expert_names,
    expert_pairs,
    fused_tensors,
    per_expert_tensors,
)
from delora_kernels.integrations.peft.export.lora_folder import PREFIX, lora_config, write
from delora_kernels.integrations.peft.export.low_rank_terms import Pair, Survey, adapters_of, pair_of, survey
from delora_kernels.integrations.peft.export.refusal import FUNCTION, refuse
from delora_kernels.integrations.peft.export.used_configs import check_adapter, used_configs
from delora_kernels.integrations.peft.export.written import carried, written


@dataclass(frozen=True)
class LoraExport:
    """What export_lora wrote; a path-like object, whose `str()` is one line of text.

    Args:
        directory: The folder.
        ranks: Rank of each layer, by its name in the base model.
        bytes: Size of the weights' file.
    """

    directory: Path
    ranks: dict[str, int]
    bytes: int

    def __fspath__(self) -> str:
        return str(self.directory)

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        text = f"r = {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        return f"LoRA adapter of {len(self.ranks)} layers, {text}, {self.bytes / 2**20:.1f} MiB: {self.directory}"


def export_lora(
    model: nn.Module | Mapping[str, nn.Module],
    directory: str | os.PathLike[str],
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    experts: str = "fused",
    format: str = "peft",
) -> LoraExport:
    """Write the DeLoRA and LoRA adapters of `model` as one standard LoRA adapter folder, or as one
    file of a diffusion model's.

        y = x Wᵀ + x A'ᵀ B'ᵀ,   A' = diag(1/max(‖A_i‖, ε)) A diag(n),
        B' = B diag(λ / (r max(‖B_i‖, ε)))

    LoRA's scale goes into B'. Several active adapters are stacked, and so is a frozen start, with a
    minus sign: ranks add up. alpha is r in every layer, so the scale is 1 also where a loader
    ignores alpha_pattern; `r` is the largest rank. The names are those of the model without
    adapters (this library's modules being nn.Linear again). modules_to_save and trained biases of
    PEFT's configs are written too; anything else that was trained is not. The model is not changed.
    What the adapter was folded from can't be got back: keep your own checkpoint for training.

    Args:
        model: A PeftModel, a model with injected PEFT layers (accelerated or not), or any module
            that holds DeLoRALinear or LoRALinear. Its adapters must be enabled and not merged. For
            the formats of diffusion models also several, by the names that they have in diffusers'
            pipeline: {"unet": ..., "text_encoder": ...}; one alone that is a U-Net or transformer
            of diffusers needs no name.
        directory: The folder, made if need be. A LoRA adapter in it is replaced, one of another
            method is not.
        adapter: Name of the PEFT adapter, which of several models one at least must have. None:
            those that are active. This library's own modules are always exported.
        dtype: Dtype of the written factors. None: that of each layer's own factors; for bfloat16
            ones float32 is exact.
        experts: Layout of adapters on the experts of expert models (`target_parameters`): "fused",
            PEFT's own keys, or "per_expert", one pair of matrices for each linear of each expert
            (docs/experts.md says which server reads which). Every expert's ΔW is read back from the
            file and compared with the model's. Files of diffusion models hold no experts.
        format: "peft", a folder of PEFT's; or one file pytorch_lora_weights.safetensors as
            "diffusers" loads it, or with "kohya" as kohya-ss's trainers write it for U-Nets and
            CLIP text encoders (docs/exporting.md). Those two also hold convolutions, and DoRA with
            its magnitude.

    Returns:
        The folder, the rank of each layer (of those two formats by its name behind the pipeline's
        name of its model) and the size of the file.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: something can't be written as a LoRA adapter (DoRA and other variants, other
            methods, `nn`'s modules for experts and ETHER, embeddings and convolutions, lora_bias,
            merged or disabled adapters, starts that changed the base weight, trainable tokens, a
            module held under two names, sharded or meta tensors, values beyond `dtype`; for
            diffusion models also whatever trains beside adapters (requires_grad), and models whose
            names the format does not know), there is nothing to export, or the folder can't be
            used; the text names the layer and the remedy. Nothing is written then.
        RuntimeError: the file would hold another update of an expert than the model. The folder's
            files are what they were then.

    Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv:2503.18225),
    eq. 9; a folded DeLoRA update is a LoRA update (docs/math.md).
    """
    path = _check_arguments(model, directory, adapter, dtype, experts, format)
    if format != "peft" or not isinstance(model, nn.Module):
        return LoraExport(path, *export_diffusion(model, path, adapter, dtype, format))
    found = survey(model)
    linears = {name: layers for name, layers in found.layers.items() if not are_experts(layers)}
    pairs = {name: pair_of(name, layers, adapter) for name, layers in linears.items()}
    configs = used_configs(found, adapter)
    check_adapter({"": found}, adapter)
    factors = {name: _cast(name, pair, dtype) for name, pair in pairs.items() if pair is not None}
    of_experts = _experts(found, adapter, dtype, experts)
    if not factors and not of_experts.ranks:
        got = f"a {type(model).__name__} without any"
        remedy = "wrap it with peft.get_peft_model or use delora_kernels.nn, and activate the adapter"
        raise checks.fail(ValueError, FUNCTION, "model", "one with DeLoRA or LoRA layers", got, remedy)
    if "" in factors:
        refuse("", "the layer itself as the model: its name is missing", "pass the model that holds the layer")
    saved, saved_tensors = _modules_to_save(found, adapter)
    bias, biases = _biases(found, factors.keys(), configs)

    tensors = {f"{PREFIX}{name}.lora_{role}.weight": t for name, AB in factors.items() for role, t in AB.items()}
    tensors |= {PREFIX + key: tensor for key, tensor in of_experts.tensors.items()} | saved_tensors | biases
    ranks = {name: AB["A"].shape[0] for name, AB in factors.items()}
    config = lora_config(found.base, ranks, configs, saved, bias, of_experts.ranks, of_experts.parts)

    def check(file: Path) -> None:
        for name, wrappers in found.layers.items():
            if name in of_experts.names:
                check_file(file, PREFIX, name, wrappers, adapter, of_experts.names[name])

    size = write(path, tensors, config, found.base[""], check)
    return LoraExport(path, ranks | of_experts.ranks, size)


class _Experts(NamedTuple):
    """What is written of experts: tensors by key, the rank of each parameter by its name, names of
    single experts' linears for target_modules, and for each module how its checkpoints name them.
    """

    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    parts: list[str]
    names: dict[str, dict[str, ExpertNames]]


def _experts(found: Survey, adapter: str | None, dtype: torch.dtype | None, layout: str) -> _Experts:
    """Fold the adapters of every experts module into the layout's tensors."""
    made = _Experts({}, {}, [], {})
    model_type = getattr(getattr(found.base[""], "config", None), "model_type", None)
    for name, wrappers in found.layers.items():
        pairs = expert_pairs(name, wrappers, adapter) if are_experts(wrappers) else {}
        for parameter, pair in pairs.items():
            made.names.setdefault(name, {})
            if layout == "per_expert":
                names = made.names[name][parameter] = expert_names(model_type, name, parameter)
                tensors = per_expert_tensors(name, pair, names)
                made.parts.extend(part for part in names.parts if part not in made.parts)
            else:
                tensors = fused_tensors(name, pair)
            for key, tensor in tensors.items():
                made.tensors[key] = written(f"{name}.{parameter}", key.split(".")[-2][-1], tensor, dtype or pair.dtype)
            made.ranks[f"{name}.{parameter}"] = pair.A.shape[1]
    return made


def _check_arguments(model: Any, directory: Any, adapter: Any, dtype: Any, experts: Any, format: Any) -> Path:
    if format not in ("peft", *FORMATS):
        expected = f"one of {('peft', *FORMATS)}"
        raise checks.fail(ValueError, FUNCTION, "format", expected, repr(format), "pass one of these")
    if not isinstance(model, nn.Module) and not (isinstance(model, Mapping) and format in FORMATS):
        raise checks.fail(TypeError, FUNCTION, "model", "a torch.nn.Module", type(model).__name__, "pass the model")
    if not isinstance(directory, str | os.PathLike):
        raise checks.fail(TypeError, FUNCTION, "directory", "a path", type(directory).__name__, "pass a folder")
    if adapter is not None and not isinstance(adapter, str):
        remedy = "pass one, or activate several with set_adapter"
        raise checks.fail(TypeError, FUNCTION, "adapter", "a name or None", type(adapter).__name__, remedy)
    if dtype is not None and dtype not in checks.FLOATS:
        raise checks.fail(TypeError, FUNCTION, "dtype", f"None or one of {checks.FLOATS}", dtype, "pass a float dtype")
    if experts not in LAYOUTS:
        raise checks.fail(ValueError, FUNCTION, "experts", f"one of {LAYOUTS}", repr(experts), "pass one of these")
    if format in FORMATS and experts != "fused":
        remedy = 'leave it out, or pass format="peft"'
        expected = "'fused' with a file of a diffusion model, which holds no experts"
        raise checks.fail(ValueError, FUNCTION, "experts", expected, repr(experts), remedy)
    if not os.fspath(directory):
        raise checks.fail(
            ValueError, FUNCTION, "directory", "a path", "an empty one", "pass '.' for the current folder"
        )
    path = Path(directory)
    if any(part.exists() and not part.is_dir() for part in (path, *path.parents)):
        raise checks.fail(ValueError, FUNCTION, "directory", "a folder or new", "a file", "pass another path")
    if (path / CONFIG_NAME).is_file():
        try:
            kind = dict(json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))).get("peft_type")
        except (ValueError, TypeError):  # no JSON, or no object
            kind = "broken"
        if kind != "LORA":
            got, remedy = f"a folder with a {kind} adapter", "pass another path, or remove that adapter"
            raise checks.fail(ValueError, FUNCTION, "directory", "free or a LoRA adapter's", got, remedy)
    return path


def _cast(name: str, pair: Pair, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return A' and B' as they are written."""
    return {role: written(name, role, factor, dtype or pair.dtype) for role, factor in (("A", pair.A), ("B", pair.B))}


def _modules_to_save(found: Survey, adapter: str | None) -> tuple[list[str], dict[str, Tensor]]:
    """Return the modules trained beside the adapters: their names, and their tensors under PEFT's
    keys.
    """
    names: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name, saver in found.savers.items():
        for chosen in adapters_of(name, saver, adapter)[:1]:  # its forward takes the first
            if not isinstance(saver, ModulesToSaveWrapper):
                refuse(name, f"a {type(saver).__name__}, whose trained rows are no low-rank term")
            names.append(name)
            state = saver.modules_to_save[chosen].state_dict()
            tensors |= {f"{PREFIX}{name}.{key}": carried(f"{name}.{key}", tensor) for key, tensor in state.items()}
    return names, tensors


def _biases(found: Survey, exported: Iterable[str], configs: list[Any]) -> tuple[str, dict[str, Tensor]]:
    """LoraConfig's `bias` and the base biases that it says were trained, under PEFT's keys."""
    kinds = {getattr(config, "bias", "none") for config in configs}
    bias = "all" if "all" in kinds else "lora_only" if kinds - {"none"} else "none"
    names = list(exported)
    if not configs:
        for name in names:
            trained = getattr(found.base.get(name), "bias", None)
            if trained is not None and trained.requires_grad:
                remedy = "pass the model that PEFT adapted, or freeze the bias if it was not trained"
                refuse(name, "a bias that trains, and no PEFT config that says which biases do", remedy)
    wanted = {"none": [], "lora_only": names, "all": list(found.base)}[bias]
    tensors: dict[str, Tensor] = {}
    for name in wanted:
        value = found.base[name]._parameters.get("bias") if name in found.base else None
        if value is not None and not any(name == saver or name.startswith(f"{saver}.") for saver in found.savers):
            inner = [name] if name else []
            key = ".".join([*inner, "base_layer", "bias"] if name in names else [*inner, "bias"])
            tensors[PREFIX + key] = carried(key, value)
    return bias, tensors
