"""What the PEFT methods of this library share: a config that names layers, a tuner for them, merging that keeps W."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from delora_kernels import checks

NEEDS = "pip install delora-kernels; before loading: import delora_kernels; delora_kernels.register_peft_methods()"


@dataclass
class TargetedConfig(PeftConfig):
    """The options that say which layers are adapted, as in PEFT's LoraConfig.

    Args:
        needs: What PEFT alone can't tell who opens a saved folder: its method comes from here.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    needs: str = field(default=NEEDS, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            remedy = "list the modules, or leave layers_to_transform out"
            raise self._fail(
                "layers_to_transform", "None with a string as target_modules", self.layers_to_transform, remedy
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise self._fail("layers_to_transform", "given with layers_pattern", None, "say which layers")

    def _check_positive(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise checks.fail(TypeError, type(self).__name__, name, "an int", type(value).__name__, "pass an int")
        if value < 1:
            raise self._fail(name, "≥ 1", value, "leave the layer out of target_modules to leave it as it is")

    def _fail(self, argument: str, expected: str, got: object, remedy: str) -> Exception:
        return checks.fail(ValueError, type(self).__name__, argument, expected, got, remedy)


def move_parameters(parts: nn.ParameterDict, adapter_name: str, device: torch.device) -> None:
    """Move one adapter's parameter, where it has one, and leave its dtype: PEFT's own way casts it to the base's."""
    if adapter_name in parts and parts[adapter_name].device != device:
        old = parts[adapter_name]
        parts[adapter_name] = nn.Parameter(old.detach().to(device), old.requires_grad)


class LinearTuner(BaseTuner):
    """A tuner whose layers stand around nn.Linear and Transformers' Conv1D, and take `_options`."""

    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _options(self, config: Any, key: str) -> tuple[Any, ...]:
        """What the layer named `key` is made with, besides its base and the adapter's name."""
        return (config,)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        kind: Any = self.tuner_layer_cls
        options = self._options(peft_config, current_key)
        if isinstance(target, kind):
            target.update_layer(adapter_name, *options)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)) or base.weight.dtype not in checks.FLOATS:
            got = f"{type(base).__name__} ({getattr(getattr(base, 'weight', None), 'dtype', 'without a weight')})"
            expected = "nn.Linear or Transformers' Conv1D with a float weight"
            remedy = "leave it out of target_modules"
            raise checks.fail(TypeError, type(self).__name__, f"target module {current_key!r}", expected, got, remedy)
        layer = kind(target, adapter_name, *options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter does not train until it is chosen
        self._replace_module(parent, target_name, layer, target)


class MergesAndKeeps:
    """What a tuner layer does with its base's weight: read it as [N, K], put a merged one there, and give it back.

    Comes before BaseTunerLayer among the bases of a layer.
    """

    merged: bool
    merged_adapters: list[str]
    get_base_layer: Any
    _unmerged: Tensor | None = None

    def unmerge(self) -> None:
        """Give the base layer its own weight back, bit for bit."""
        if not self.merged or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.get_base_layer().weight.data, self._unmerged = self._unmerged, None
        self.merged_adapters.clear()

    @torch.no_grad()
    def _put(self, merged: Tensor, adapter_names: list[str], safe_merge: bool) -> None:
        """Make `merged` [N, K], rounded to its dtype, the base's weight, and keep the base's own for `unmerge`."""
        base = self.get_base_layer()
        merged = merged.to(base.weight.dtype)
        if safe_merge and not bool(merged.isfinite().all()):
            raise ValueError(f"NaNs detected in the merged weights: an adapter of {adapter_names} seems to be broken")
        if self._unmerged is None:
            self._unmerged = base.weight.data
        base.weight.data = merged.t().contiguous() if self._transposed else merged.contiguous()
        self.merged_adapters.extend(adapter_names)

    @property
    def _transposed(self) -> bool:
        return type(self.get_base_layer()).__name__ == "Conv1D"

    def _base_weight(self) -> Tensor:
        """W, [N, K]."""
        weight: Tensor = self.get_base_layer().weight.detach()
        return weight.t() if self._transposed else weight
