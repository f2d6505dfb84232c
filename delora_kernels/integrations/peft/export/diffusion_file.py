"""The adapters of diffusion models as one file that diffusers, or those who read kohya-ss's format,
load: linears and convolutions, LoRA, folded DeLoRA, DoRA with its magnitude.

diffusers  <component>.<layer>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector, and each
           component's LoraConfig in the file's metadata; the scale is 1
kohya      lora_unet_<layer with _ for .>.lora_down.weight, .lora_up.weight, .alpha, .dora_scale
           (text encoders: lora_te_, or of SDXL lora_te1_ and lora_te2_); the names of layers are
           diffusers', and alpha is one number for the whole file, for diffusers' own converter
           mistakes alphas that differ
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.integrations.peft.export.lora_folder import lora_config, replaced
from delora_kernels.integrations.peft.export.low_rank_terms import Pair, Survey, adapters_of, pair_of, survey
from delora_kernels.integrations.peft.export.refusal import FUNCTION, refuse
from delora_kernels.integrations.peft.export.used_configs import check_adapter, used_configs
from delora_kernels.integrations.peft.export.written import written
from delora_kernels.nn import AdapterLinear

FORMATS = ("diffusers", "kohya")
FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
"""A pipeline's names of what holds adapters."""

_METADATA = "lora_adapter_metadata"
"""diffusers' key of the configs in a file."""

_SDXL = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
"""diffusers' names of layers that its own converter knows by those of SDXL's first code alone."""

_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


class _Component(NamedTuple):
    """What is written of one model: a pair for each layer, shapes of the kernels, and the
    LoraConfig as a dictionary.
    """

    pairs: dict[str, Pair]
    kernels: dict[str, torch.Size]
    config: dict[str, Any]


def export_diffusion(
    models: nn.Module | Mapping[str, nn.Module], path: Path, adapter: str | None, dtype: torch.dtype | None, format: str
) -> tuple[dict[str, int], int]:
    """Write the file.

    Args:
        models: One model of a pipeline, or several by the pipeline's names for them.
        path: The folder.
        adapter, dtype: As export_lora takes them.
        format: One of FORMATS.

    Returns:
        The rank of each layer, by its name behind its component's, and the file's size in bytes.
    """
    surveys = {name: survey(model) for name, model in _named(models).items()}
    check_adapter(surveys, adapter)
    trunks = {name: found.base[""] for name, found in surveys.items()}
    components = {name: _component(found, adapter) for name, found in surveys.items()}
    components = {name: made for name, made in components.items() if made.pairs}
    if not components:
        remedy = "add adapters to a model (add_adapter), and activate them"
        raise checks.fail(ValueError, FUNCTION, "model", "one with DeLoRA or LoRA layers", "none", remedy)
    ranks = {
        f"{name}.{layer}": pair.A.shape[0] for name, made in components.items() for layer, pair in made.pairs.items()
    }
    tensors: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    if format == "kohya":
        prefixes = _prefixes(components, trunks)
        for name, made in components.items():
            tensors |= _as_kohya(prefixes[name], name, made, max(ranks.values()), dtype)
    else:
        configs = {f"{name}.{key}": value for name, made in components.items() for key, value in made.config.items()}
        metadata[_METADATA] = json.dumps(configs, indent=2, sort_keys=True)
        for name, made in components.items():
            tensors |= _as_diffusers(name, made, dtype)
    path.mkdir(parents=True, exist_ok=True)
    with replaced(path / FILE) as beside:
        save_file(tensors, beside, metadata=metadata)
    return ranks, (path / FILE).stat().st_size


def _named(models: Any) -> dict[str, nn.Module]:
    """Return the models by their pipeline's names."""
    if not isinstance(models, Mapping):
        trunk = type(survey(models).base[""])
        name = {"UNet": "unet"}.get(trunk.__name__[:4], "transformer" if "Transformer" in trunk.__name__ else None)
        if name is None or not trunk.__module__.startswith("diffusers."):
            remedy = 'pass {"text_encoder": model}, or the name that it has in the pipeline'
            raise checks.fail(ValueError, FUNCTION, "model", "one of diffusers'", f"a {trunk.__name__}", remedy)
        return {name: models}
    for name, model in models.items():
        if name not in COMPONENTS or not isinstance(model, nn.Module):
            got = f"{name!r}: a {type(model).__name__}"
            remedy = "pass the pipeline's models by their names there"
            raise checks.fail(ValueError, FUNCTION, "model", f"models by names of {COMPONENTS}", got, remedy)
    return dict(models)


def _component(found: Survey, adapter: str | None) -> _Component:
    """Fold the adapters of one model."""
    made = {name: pair_of(name, layers, adapter, diffusion=True) for name, layers in found.layers.items()}
    pairs = {name: pair for name, pair in made.items() if pair is not None}
    configs = used_configs(found, adapter)
    if "" in pairs:
        refuse("", "the layer itself as the model: its name is missing", "pass the model that holds the layer")
    for name, saver in found.savers.items():
        if adapters_of(name, saver, adapter):
            refuse(name, "a module trained beside the adapters, which these files don't hold", "save it by itself")
    if any(getattr(config, "bias", "none") != "none" for config in configs):
        got, remedy = "trained biases, which these files don't hold", 'train with bias="none"'
        raise checks.fail(ValueError, FUNCTION, "model", "adapters alone", got, remedy)
    if pairs:
        _check_frozen(found)
    magnitudes = {pair.magnitude is not None for pair in pairs.values()}
    if len(magnitudes) > 1:
        other = next(name for name, pair in pairs.items() if pair.magnitude is None)
        refuse(other, "no DoRA where other layers have it; readers take all for DoRA then", "export them one by one")
    weights = {name: found.base[name].weight for name in pairs}
    kernels = {name: weight.shape[2:] for name, weight in weights.items() if isinstance(weight, Tensor)}
    config = {}
    if pairs:
        ranks = {name: pair.A.shape[0] for name, pair in pairs.items()}
        made_config = lora_config(found.base, ranks, configs, [], "none", {}, [])
        made_config.use_dora, made_config.inference_mode = magnitudes == {True}, False
        listed = made_config.to_dict().items()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in listed}
    return _Component(pairs, kernels, config)


def _check_frozen(found: Survey) -> None:
    """Refuse what trains beside the adapters and PEFT's wrappers, whose own say what is theirs."""
    for name, module in found.base.items():
        if any(name == saver or name.startswith(f"{saver}.") for saver in found.savers):
            continue
        of_base = ("weight", "bias") if isinstance(module, AdapterLinear) else tuple(module._parameters)
        for key in of_base:
            parameter = module._parameters.get(key)
            if parameter is not None and parameter.requires_grad:
                got = "one that trains, which these files don't hold"
                remedy = "save it by itself if it was trained, and freeze it (requires_grad_(False))"
                full = f"{name}.{key}" if name else key
                raise checks.fail(ValueError, FUNCTION, f"parameter {full!r}", "frozen", got, remedy)


def _as_diffusers(component: str, made: _Component, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, pair in made.pairs.items():
        key, kernel = f"{component}.{name}", made.kernels[name]
        tensors[f"{key}.lora_A.weight"] = _shaped(name, "A", pair.A, made, dtype)
        tensors[f"{key}.lora_B.weight"] = _shaped(name, "B", pair.B, made, dtype)
        if pair.magnitude is not None:
            magnitude = written(name, "m", pair.magnitude, dtype or pair.magnitude.dtype)
            tensors[f"{key}.lora_magnitude_vector"] = (
                magnitude.view(1, -1, *(1,) * len(kernel)) if kernel else magnitude
            )
    return tensors


def _as_kohya(
    prefix: str, component: str, made: _Component, alpha: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, pair in made.pairs.items():
        key = f"{prefix}_{_kohya_name(component, name)}"
        if f"{key}.alpha" in tensors:
            refuse(name, f"a second layer that is {key} in kohya's format", 'pass format="diffusers"')
        tensors[f"{key}.lora_down.weight"] = _shaped(name, "A", pair.A, made, dtype)
        tensors[f"{key}.lora_up.weight"] = _shaped(name, "B", pair.B * (pair.A.shape[0] / alpha), made, dtype)
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        if pair.magnitude is not None:
            magnitude = written(name, "m", pair.magnitude, dtype or pair.magnitude.dtype)
            tensors[f"{key}.dora_scale"] = magnitude.view(-1, 1, *(1,) * len(made.kernels[name]))
    return tensors


def _shaped(name: str, role: str, factor: Tensor, made: _Component, dtype: torch.dtype | None) -> Tensor:
    """Return a factor as it is written, A with the layer's kernel, B with one of 1."""
    kernel = made.kernels[name]
    shape = (len(factor), -1, *(kernel if role == "A" else (1,) * len(kernel)))
    return written(name, role, factor, dtype or made.pairs[name].dtype).view(shape)


def _prefixes(components: dict[str, _Component], trunks: dict[str, Any]) -> dict[str, str]:
    """Return kohya's prefix of each component, or raise where it has none of these names.

    Args:
        components: What is written.
        trunks: The models that were passed, also those without adapters: SDXL shows in them.
    """
    for name in components:
        kind = type(trunks[name]).__name__
        if not kind.startswith("UNet2DCondition" if name == "unet" else "CLIPTextModel") or name not in _KOHYA:
            got = f"a {kind} as {name!r}"
            expected = "a UNet2DConditionModel and CLIP text encoders"
            remedy = 'pass format="diffusers", for kohya\'s names of other models are not those of diffusers'
            raise checks.fail(ValueError, FUNCTION, "model", expected, got, remedy)
    sdxl = getattr(getattr(trunks.get("unet"), "config", None), "addition_embed_type", None) == "text_time"
    first = "lora_te1" if sdxl or "text_encoder_2" in trunks else "lora_te"
    return _KOHYA | {"text_encoder": first}


def _kohya_name(component: str, name: str) -> str:
    """Return a layer's name in the format; newer Transformers have lost CLIP's `text_model`."""
    if component != "unet" and not name.startswith(("text_model.", "text_projection")):
        name = f"text_model.{name}"
    return _SDXL.get(name, name.replace(".", "_"))
