"""Tiny diffusion models from configs, with random weights in float64, and what one pass of them
gives: an SDXL-like U-Net, SD3's and Flux's transformers, a text encoder.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft_models import config
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (make test-diffusers)")

LINEAR = (nn.Linear,)
ALL = (nn.Linear, nn.Conv2d)


def unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=(2, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
        **options,
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    )


def text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=12,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=9,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {"unet": unet, "sd3": sd3, "flux": flux, "text_encoder": text_encoder}


def inputs(kind: str, seed: int) -> dict[str, Any]:
    """A call of a model; its tensors want gradients where pictures or texts are embedded."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, wants: bool = False) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(wants)

    timestep = torch.tensor([3.0, 5.0], dtype=torch.float64)
    text = {"encoder_hidden_states": drawn(2, 5, 12, wants=True), "timestep": timestep}
    if kind == "unet":
        added = {"text_embeds": drawn(2, 10), "time_ids": drawn(2, 6)}
        return text | {"sample": drawn(2, 4, 8, 8, wants=True), "added_cond_kwargs": added}
    if kind == "sd3":
        return text | {"hidden_states": drawn(2, 4, 8, 8, wants=True), "pooled_projections": drawn(2, 10)}
    if kind == "flux":
        places = {"img_ids": drawn(9, 3), "txt_ids": drawn(5, 3)}
        return text | places | {"hidden_states": drawn(2, 9, 4, wants=True), "pooled_projections": drawn(2, 10)}
    return {"input_ids": torch.randint(2, 50, (2, 7), generator=generator)}


def targets(model: nn.Module, kinds: tuple[type, ...] = ALL) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def base_of(kind: str, seed: int) -> Any:
    """The model without adapters."""
    torch.manual_seed(seed)
    return MODELS[kind]().double().requires_grad_(False)


def adapt(model: Any, method: str, name: str = "default", **options: Any) -> Any:
    """Add an adapter on every linear, and but for DeLoRA on every convolution, by the model's own
    `add_adapter`; DoRA's magnitudes are moved off the norms.
    """
    names = targets(model, LINEAR if method == "delora" else ALL)
    names = [each.replace(".base_layer", "") for each in names if "lora_" not in each]
    made = config(method, **{"target_modules": names} | options)
    if hasattr(model, "load_lora_adapter"):
        model.add_adapter(made, adapter_name=name)
    else:  # Transformers' add_adapter renames layers of some models
        peft.inject_adapter_in_model(made, model, adapter_name=name)
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if f"magnitude_vector.{name}" in each:
                parameter *= 0.5 + torch.rand_like(parameter)
    return model


def output(model: Any, call: dict[str, Any]) -> Tensor:
    y: Tensor = model(**call)[0]
    return y


def step(model: Any, call: dict[str, Any]) -> dict[str, Tensor]:
    """The output and every gradient of one pass, by name."""
    model.zero_grad(set_to_none=True)
    asked = {name: value for name, value in call.items() if isinstance(value, Tensor) and value.requires_grad}
    for value in asked.values():
        value.grad = None
    y = output(model, call)
    y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | {name: value.grad.clone() for name, value in asked.items()} | grads


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Up to the roundings of a hundred layers in float64, each of size 2e-16, and what norms and
    softmaxes make of them. What cancels, as a key's bias does in a softmax, is compared with the
    largest gradient.
    """
    assert ours.keys() == theirs.keys()
    largest = max(value.abs().max() for name, value in theirs.items() if name != "y")
    for name, value in theirs.items():
        scale = torch.maximum(value.abs().max(), 1e-5 * largest)
        assert (ours[name] - value).abs().max() <= 1e-9 * scale, name
