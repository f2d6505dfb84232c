"""What the PEFT methods of this library share: a config that names layers, a layer that says what
runs it, and a tuner for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.bases.plain import PlainBase
from delora_kernels.bases.read import base_in, stored_form
from delora_kernels.bases.stored import Broken, StoredBase, refuses
from delora_kernels.integrations.peft.methods.adapted_base import can_be_adapted
from delora_kernels.integrations.peft.methods.merging import MergesAndKeeps
from delora_kernels.integrations.peft.verdict import ON_PURPOSE, State, Verdict, log_once, verdict_of_own

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
    """Move one adapter's parameter, where it has one, and leave its dtype: PEFT's own way casts it
    to the base's.
    """
    if adapter_name in parts and parts[adapter_name].device != device:
        old = parts[adapter_name]
        parts[adapter_name] = nn.Parameter(old.detach().to(device), old.requires_grad)


class OwnLayer(MergesAndKeeps):
    """A tuner layer of this library, which runs fused of itself and says where it does not.

    Comes before nn.Module and BaseTunerLayer among the bases of a layer, whose adapters' configs
    are in `options`.
    """

    fused_method: ClassVar[str]
    """What `accelerate` reports."""
    why_not_low_rank: ClassVar[tuple[str, str]]
    """What `export_lora` says of it, and the remedy."""
    own_forward: ClassVar[str]
    """What happens, in the log, where the layer does not run fused."""
    beside_base: ClassVar[State]
    """What it does where its base can't be read."""

    disable_adapters: bool
    active_adapters: list[str]
    options: dict[str, Any]

    def verdict(self) -> Verdict:
        """Say how much of the layer runs fused as it stands, and why not all of it."""
        return verdict_of_own(self, self._active(), self.beside_base)

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.options]

    def _to_run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], str | None]:
        """Return the adapters that act in a forward pass, and why it does not run fused; None: it
        does.

        Args:
            x: The input; of one on the meta device the log says nothing.
            args, kwargs: What the layer is called with beside x.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        _, reason, _ = self.verdict()
        names = [] if reason in ON_PURPOSE else self._active()
        if isinstance(reason, Broken) and refuses(reason, x):
            raise RuntimeError(f"a {type(self).__name__} on {self.get_base_layer()} can't run: {reason}")
        if reason is None and (args or kwargs):
            reason = f"it is called with {', '.join(kwargs) or 'positional arguments'}"
        if reason is None:
            reason = self._why_not_input(x)
        if reason is not None and not (names and x.is_meta):
            log_once(self.own_forward, reason)
        return names, reason

    def _base(self, x: Tensor) -> PlainBase | StoredBase | None:
        """Return the base, read for x; None: it runs its own forward."""
        base = base_in(self.base_layer)
        return None if isinstance(base, str) or self._why_not_input(x) is not None else base

    def _why_not_input(self, x: Tensor) -> str | None:
        """Say why a stored base multiplies x itself, or None."""
        if stored_form(self.base_layer) is None:
            return None
        base = base_in(self.base_layer)
        return base.why_not_input(x) if isinstance(base, StoredBase) else None


class LinearTuner(BaseTuner):
    """A tuner whose layers stand around nn.Linear, Transformers' Conv1D and stored linears, and
    take `_options`.
    """

    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _options(self, config: Any, key: str) -> tuple[Any, ...]:
        """Return what the layer named `key` is made with, besides its base and the adapter's
        name.
        """
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
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        self._check_called(parent, base, target_name, current_key)
        if isinstance(target, kind):
            with _naming(current_key):
                target.update_layer(adapter_name, *options)
            return
        if not can_be_adapted(base):
            got = f"{type(base).__name__} ({_described(getattr(base, 'weight', None))})"
            expected = "nn.Linear or Transformers' Conv1D with a float weight"
            remedy = "leave it out of target_modules, or name it in exclude_modules"
            raise checks.fail(TypeError, type(self).__name__, f"target module {current_key!r}", expected, got, remedy)
        with _naming(current_key):
            layer = kind(target, adapter_name, *options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter does not train until it is chosen
        self._replace_module(parent, target_name, layer, target)

    def _check_called(self, parent: nn.Module, base: nn.Module, target_name: str, key: str) -> None:
        """Refuse a layer whose module reads its weight and never calls it: an adapter there would
        do nothing.
        """
        kind = type(parent).__name__
        reason = None
        if isinstance(parent, nn.MultiheadAttention):
            reason = "takes its weight, and never calls it"
        elif hasattr(parent, "A_log") and target_name in _STATE_SPACE:
            reason = "takes its weight, in its fast path at least, and does not call it"
        elif isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            reason = "takes its weight in evaluation (its fast path), and does not call it"
        if reason is not None:
            remedy = f"leave it out of target_modules, or pass exclude_modules=[{target_name!r}]"
            if isinstance(parent, nn.TransformerEncoderLayer):
                remedy += ", or call torch.backends.mha.set_fastpath_enabled(False) first"
            got = f"one of a {kind}, which {reason}"
            expected = "a layer that is called"
            raise checks.fail(ValueError, type(self).__name__, f"target module {key!r}", expected, got, remedy)


_STATE_SPACE = ("x_proj", "dt_proj", "out_proj")
"""What Mamba's kernels are given the weights of."""


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Make an error of an option that does not fit a layer say which layer, and how to leave it
    out.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        last = key.rpartition(".")[2]
        remedy = f"to leave it as it is, take it out of target_modules or pass exclude_modules=[{last!r}]"
        raise type(error)(f"target module {key!r}: {error}; {remedy}") from error


def _described(weight: Any) -> str:
    if weight is None:
        return "without a weight"
    return str(weight.dtype) if type(weight) in checks.PLAIN else f"a {type(weight).__name__}"
