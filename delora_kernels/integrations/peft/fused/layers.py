"""The fused classes that accelerate() gives to PEFT's layers, and what a call of one does.

Each call asks `verdict_of` anew what computes the layer, so that everything PEFT or a trainer does
to it later is seen.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from types import MethodType
from typing import Any

import torch
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, ParamWrapper
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from delora_kernels.bases.plain import is_own_forward, parameter
from delora_kernels.bases.stored import CASTABLE, refuses
from delora_kernels.checks import active_transform
from delora_kernels.functional.common import exporting
from delora_kernels.integrations.peft.delora_on_stored_bases import StoredDeloraLinear
from delora_kernels.integrations.peft.fused.beside_base import BesideRun
from delora_kernels.integrations.peft.fused.convolution import FusedConv1d, FusedConv2d, FusedConv3d
from delora_kernels.integrations.peft.fused.embedding import FusedEmbedding
from delora_kernels.integrations.peft.fused.experts import FusedParamWrapper
from delora_kernels.integrations.peft.fused.groups import handed_out, ran_alone, run, run_planned
from delora_kernels.integrations.peft.fused.mixed_batch import mixed_verdict_of
from delora_kernels.integrations.peft.fused.one_call import PlannedRun
from delora_kernels.integrations.peft.fused.plan import verdict_of
from delora_kernels.integrations.peft.fused.quick_plan import delora_run, lora_run, run_delora, run_lora
from delora_kernels.integrations.peft.fused.stored_bases import CLASSES, StoredRun, is_on_stored_base
from delora_kernels.integrations.peft.fused.straight import is_same_delora, is_same_lora, read_delora, read_lora
from delora_kernels.integrations.peft.fused.variants import ActivatedRun
from delora_kernels.integrations.peft.verdict import log_once


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA or DoRA linear with a fused forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs):
            y = handed_out(self, x, is_same_lora)
            if y is not None:
                return y
            call = read_lora(self, x)
            if call is not None:
                return run(self, x, call)
            y = run_lora(self, x)
            if y is not None:
                return y
        return _forward(self, LoraLinear.forward, x, args, kwargs)

    read_call, read_run = staticmethod(read_lora), staticmethod(lora_run)

    def read_plan(self, x: Tensor) -> PlannedRun | None:
        return _planned_run(self, x)

    def _get_name(self) -> str:
        return peft_class(type(self)).__name__  # PEFT's layer status reads the type off the repr

    def extra_repr(self) -> str:
        return "fused by delora_kernels"


class FusedDeloraLinear(DeloraLinear):
    """PEFT's DeLoRA linear with a fused forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs):
            y = handed_out(self, x, is_same_delora)
            if y is not None:
                return y
            call = read_delora(self, x)
            if call is not None:
                return run(self, x, call)
            y = run_delora(self, x)
            if y is not None:
                return y
        return _forward(self, DeloraLinear.forward, x, args, kwargs)

    read_call, read_run = staticmethod(read_delora), staticmethod(delora_run)
    read_plan = FusedLoraLinear.read_plan

    _get_name, extra_repr = FusedLoraLinear._get_name, FusedLoraLinear.extra_repr


class FusedStoredDeloraLinear(StoredDeloraLinear):
    """PEFT's DeLoRA linear around a stored base, with a fused forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _forward(self, DeloraLinear.forward, x, args, kwargs)

    read_plan = FusedLoraLinear.read_plan

    _get_name, extra_repr = FusedLoraLinear._get_name, FusedLoraLinear.extra_repr


_FUSED: dict[type, type] = {
    LoraLinear: FusedLoraLinear,
    DeloraLinear: FusedDeloraLinear,
    StoredDeloraLinear: FusedStoredDeloraLinear,
    ParamWrapper: FusedParamWrapper,
    Conv1d: FusedConv1d,
    Conv2d: FusedConv2d,
    Conv3d: FusedConv3d,
    Embedding: FusedEmbedding,
}
_PEFT: dict[type, type] = {fused: original for original, fused in _FUSED.items()}
_derived: dict[tuple[type, ...], type] = {}


def fused_class(kind: type) -> type:
    """Return the class that accelerate() gives to a layer of class `kind`; `kind` itself where
    there is none.
    """
    if is_on_stored_base(kind) and kind not in _FUSED:
        _FUSED[kind] = _fused_on_stored_base(kind)
        _PEFT[_FUSED[kind]] = kind
    return _swapped(kind, _FUSED)


def peft_class(kind: type) -> type:
    """Return the class that restore() gives back to a layer of class `kind`; `kind` itself where it
    is not fused.
    """
    return _swapped(kind, _PEFT)


def _fused_on_stored_base(kind: Any) -> type:
    """Make the fused class of one of PEFT's LoRA layers on stored bases."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _forward(self, kind.forward, x, args, kwargs)

    own = {name: getattr(FusedLoraLinear, name) for name in ("read_plan", "_get_name", "extra_repr")} | {
        "forward": forward
    }
    return type(f"Fused{kind.__name__}", (kind,), own | {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Find the fused class of a PEFT layer on a stored base by its name, for a pickle."""
    for path in CLASSES:
        module, _, kind = path.rpartition(".")
        if name == f"Fused{kind}":
            return fused_class(getattr(importlib.import_module(module), kind))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _swapped(kind: type, classes: Mapping[type, type]) -> type:
    """`kind` by the table, also inside a class that FSDP2's fully_shard has derived as (FSDPModule,
    kind).
    """
    if kind in classes:
        return classes[kind]
    wrapper, *rest = kind.__bases__
    if len(rest) != 1 or rest[0] not in classes or not wrapper.__module__.startswith("torch.distributed."):
        return kind
    bases = (wrapper, classes[rest[0]])
    if bases not in _derived:
        name = kind.__name__.replace(rest[0].__name__, bases[1].__name__)
        own = {key: value for key, value in vars(kind).items() if key == "__deepcopy__"}  # refuses, as fully_shard's
        _derived[bases] = type(name, bases, own)
    return _derived[bases]


def swap_class(layer: nn.Module, kind: type) -> None:
    """Give `layer` another class, and a forward that a device hook has put aside the new class's
    forward.
    """
    own = [name for name in ("forward", "_old_forward") if is_own_forward(layer, layer.__dict__.get(name))]
    layer.__class__ = kind
    for name in own:
        layer.__dict__[name] = MethodType(kind.forward, layer)  # type: ignore[attr-defined]


def _forward(layer: Any, peft_forward: Callable[..., Tensor], x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    # an exported program must run without this library; where Dynamo makes it (strict), it can read
    # the plan, whose functions are plain torch then, but not PEFT's DoRA
    if exporting() and not torch.compiler.is_dynamo_compiling():
        return peft_forward(layer, x, *args, **kwargs)
    names = None if isinstance(layer, DeloraLinear) else kwargs.get("adapter_names")
    _, reason, fused = verdict_of(layer) if names is None else mixed_verdict_of(layer, names, x)
    if fused is not None:
        others = kwargs if names is None else {**kwargs, "adapter_names": None}
        reason = None  # of a fused rank term: why the base runs by itself
        planned = fused.run if isinstance(fused, StoredRun) else fused
        if isinstance(planned, ActivatedRun):
            offsets = kwargs.get("alora_offsets")
            others = {**others, "alora_offsets": None}
            reason, planned = planned.why_not(x, offsets), planned.at(offsets)
            fused = replace(fused, run=planned) if isinstance(fused, StoredRun) else planned
        reason = reason or _why_not_call(layer, fused, x, args, others)
        if reason is None:
            return run_planned(layer, x, fused.run_on(x) if isinstance(fused, StoredRun) else fused)
    if reason is not None and refuses(reason, x):
        raise RuntimeError(f"an accelerated layer on {layer.get_base_layer()} can't run: {reason}")
    log_once("an accelerated layer runs PEFT's own forward", str(reason))
    y = peft_forward(layer, x, *args, **kwargs)
    ran_alone(layer, y)
    return y


def _planned_run(layer: Any, x: Tensor) -> PlannedRun | None:
    """Read what computes `layer`, if it is one call of a public function."""
    read_run = getattr(type(layer), "read_run", None)
    found = None if read_run is None else read_run(layer, x)
    if found is not None:
        return found if isinstance(found, PlannedRun) else None
    _, _, fused = verdict_of(layer)
    if fused is None or _why_not_call(layer, fused, x, (), {}) is not None:
        return None
    run = fused.run_on(x) if isinstance(fused, StoredRun) else fused
    return run if isinstance(run, PlannedRun) else None


def _why_not_call(layer: Any, fused: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Why this call needs PEFT's own forward, or None."""
    if args or any(value is not None for value in kwargs.values()):
        return f"it is called with {', '.join(kwargs) or 'positional arguments'}"
    if type(x) not in (Tensor, nn.Parameter):
        return f"its input is a {type(x).__name__}"
    if x.layout != torch.strided or x.is_nested:
        return "its input is nested" if x.is_nested else f"its input has layout {x.layout}"
    if x.dim() < 2 and getattr(layer, "lora_variant", None):
        return "its input is one token without a dimension for it"  # to which PEFT's DoRA adds one
    transform = active_transform(chain((x,), layer.parameters()))
    if transform is not None:
        return f"{transform} are under way"
    if isinstance(fused, StoredRun | BesideRun):
        return fused.why_not(x)
    weight = parameter(layer._modules["base_layer"], "weight")
    if x.device != weight.device:
        return "its input is on another device"
    if x.dtype != weight.dtype and not (
        torch.is_autocast_enabled(x.device.type) and x.dtype in CASTABLE and weight.dtype in CASTABLE
    ):
        return f"its input is {x.dtype}, its base {weight.dtype}"
    return None
