"""GoatModel: puts GOAT layers into a model, as PEFT's tuners do."""

from typing import Any

from peft.utils.other import get_pattern_key

from delora_kernels.integrations.goat.layer import PeftGoatLinear
from delora_kernels.integrations.own_method import LinearTuner


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
