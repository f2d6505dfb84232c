"""GoatModel: puts GOAT layers into a model, as PEFT's tuners do."""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from delora_kernels import checks
from delora_kernels.integrations.goat.layer import PeftGoatLinear


class GoatModel(BaseTuner):
    """PEFT's tuner of GOAT: `get_peft_model` makes it.

    Args:
        model: The base model.
        config: A GoatConfig.
        adapter_name: Of the adapter.

    Raises:
        TypeError: a target is neither nn.Linear nor Transformers' Conv1D.
        ValueError: a layer's options do not fit its size; the text names them and the remedy.
    """

    prefix = "goat_"
    tuner_layer_cls = PeftGoatLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

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
        key = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        r = peft_config.rank_pattern.get(key, peft_config.r)
        if isinstance(target, PeftGoatLinear):
            target.update_layer(adapter_name, peft_config, r)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)) or base.weight.dtype not in checks.FLOATS:
            got = f"{type(base).__name__} ({getattr(getattr(base, 'weight', None), 'dtype', 'without a weight')})"
            expected = "nn.Linear or Transformers' Conv1D with a float weight"
            remedy = "leave it out of target_modules"
            raise checks.fail(TypeError, "GoatModel", f"target module {current_key!r}", expected, got, remedy)
        layer = PeftGoatLinear(target, adapter_name, peft_config, r)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter does not train until it is chosen
        self._replace_module(parent, target_name, layer, target)
