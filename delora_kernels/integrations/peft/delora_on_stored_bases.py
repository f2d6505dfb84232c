"""allow_delora_on_stored_bases(): PEFT's DeLoRA on quantised models, where PEFT itself raises.

PEFT takes the column norms of the packed weight, which is no matrix. Its layer is right but for
that: here it sees the dequantised weight while an adapter is made, and nothing dense afterwards.
"""

from typing import Any

from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.delora.model import DeloraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import float32, nn

from delora_kernels.bases.read import base_in, stored_form
from delora_kernels.bases.stored import StoredBase, why_not_merged


def allow_delora_on_stored_bases() -> None:
    """Let `peft.DeloraConfig` adapt linears of bitsandbytes' 4-bit, HQQ and torchao.

    Call it once, before `get_peft_model` or `PeftModel.from_pretrained`; again is harmless. Other
    layers are PEFT's own as before. Adapters are saved and loaded as PEFT's. Merging into a stored
    base raises: it would round the adapter away.
    """
    DeloraModel._create_new_module = staticmethod(_create_new_module)  # type: ignore[method-assign]


_peft_create_new_module = DeloraModel._create_new_module


def _create_new_module(delora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if stored_form(base_layer) is None:
        made: nn.Module = _peft_create_new_module(delora_config, adapter_name, target, **kwargs)
        return made
    return StoredDeloraLinear(target, adapter_name, config=delora_config, **kwargs)


class StoredDeloraLinear(DeloraLinear):
    """PEFT's DeLoRA linear around a stored base."""

    _starts = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._starts = False

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, with the column norms of the dequantised weight."""
        self._starts = True
        try:
            super().update_layer(*args, **kwargs)
        finally:
            self._starts = False

    def get_base_layer(self) -> nn.Module:
        """Return the base layer; while an adapter is made, an nn.Linear of its dense weight."""
        layer: nn.Module = super().get_base_layer()
        return _dense(layer) if self._starts else layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise: the base is stored in few bits.

        Raises:
            ValueError: always.
        """
        export = "; delora_kernels.export_lora makes a LoRA adapter of it"
        raise ValueError(f"DeLoRA {why_not_merged(super().get_base_layer())}{export}")


def _dense(layer: nn.Module) -> nn.Linear:
    """Make an nn.Linear of the same weight, dequantised."""
    base = base_in(layer)
    if not isinstance(base, StoredBase):
        raise TypeError(f"DeLoRA needs the weight of its base layer, a {type(layer).__name__}, but {base}")
    N, K = base.shape
    made = nn.Linear(K, N, bias=False, device="meta", dtype=float32)
    made.weight = nn.Parameter(base.dense(float32), requires_grad=False)
    return made
