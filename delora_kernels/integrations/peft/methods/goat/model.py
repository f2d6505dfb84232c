"""GoatModel: puts GOAT layers into a model, as PEFT's tuners do."""

from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from delora_kernels.integrations.peft.methods.base import LinearTuner
from delora_kernels.integrations.peft.methods.goat.layer import PeftGoatLinear
from delora_kernels.integrations.peft.methods.goat.padding import Padding


class GoatModel(LinearTuner):
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

    def _options(self, config: Any, key: str) -> tuple[Any, ...]:
        pattern = get_pattern_key(config.rank_pattern.keys(), key)
        return config, config.rank_pattern.get(pattern, config.r)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model, and let its layers know which tokens are padding."""
        super().inject_adapter(model, *args, **kwargs)
        layers = [layer for layer in model.modules() if isinstance(layer, PeftGoatLinear)]
        padding = next((layer.padding for layer in layers if layer.padding is not None), None)
        if layers and padding is None:
            padding = Padding(model)
        for layer in layers:
            layer.padding = padding

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; with the last one go the hooks that told the layers of padding."""
        super().delete_adapter(adapter_name)
        layers = [layer for layer in self.model.modules() if isinstance(layer, PeftGoatLinear)]
        if any(layer.options for layer in layers):
            return
        for padding in {layer.padding for layer in layers if layer.padding is not None}:
            padding.forget()
        for layer in layers:
            layer.padding = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model's own output; PEFT 0.18 calls its forward past its hooks."""
        return self.model(*args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        paddings = {layer.padding for layer in self.model.modules() if isinstance(layer, PeftGoatLinear)}
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for padding in paddings:
            if padding is not None:
                padding.forget()
        return model
