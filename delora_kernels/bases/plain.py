"""A base whose weight is a plain dense tensor, and why a module may do more than that: hooks,
shards, patches.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as all_modules
from torch.utils.module_tracker import ModuleTracker

from delora_kernels.checks import FLOATS, PLAIN

_HOOKS_OF_ALL_MODULES: tuple[Any, ...] = (
    all_modules._global_forward_hooks,
    all_modules._global_forward_pre_hooks,
    all_modules._global_backward_hooks,
    all_modules._global_backward_pre_hooks,
)


class PlainBase(NamedTuple):
    """y = x Wᵀ + bias with a weight that the adapter never writes.

    Args:
        weight: [N, K], any float dtype and strides.
        bias: [N] or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Say why the base inside `module` can't be read, or None if `of` can.

        Only an unhooked nn.Linear or Transformers Conv1D (whose weight is [K, N], seen here as its
        transpose) with a plain local tensor is read: whatever a subclass, hook or shard adds would
        be lost.
        """
        kind = type(module)
        if kind is not nn.Linear and not _is_conv1d(kind):
            return f"the base layer is {kind.__module__}.{kind.__qualname__}, not nn.Linear or Transformers' Conv1D"
        reason = why_not_plain(module, "base layer") or why_not_any_module()
        if reason is not None:
            return reason
        weight, bias = parameter(module, "weight"), parameter(module, "bias")
        return why_not_local(weight, "base weight") or (None if bias is None else why_not_local(bias, "base bias"))

    @classmethod
    def of(cls, module: nn.Module) -> "PlainBase":
        """Read the base inside `module`, which `why_not` has nothing against."""
        weight = parameter(module, "weight")
        return cls(weight.t() if _is_conv1d(type(module)) else weight, parameter(module, "bias"))

    @property
    def shape(self) -> torch.Size:
        """N, K."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """Where the weight lives."""
        return self.weight.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [N, K] in `dtype`: itself where that is its dtype, else a copy that
        nobody keeps.
        """
        return dense(self.weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the frozen output x Wᵀ + bias, [..., K] → [..., N]."""
        return nn.functional.linear(x, self.weight, self.bias)


def dense(weight: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] of a call in `dtype`: of a tensor itself or a cast copy, of a stored
    base what it is dequantised to; nobody keeps either.
    """
    if not isinstance(weight, Tensor):
        made: Tensor = weight.dense(dtype)
        return made
    return weight if weight.dtype == dtype else weight.to(dtype)


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def parameter(module: nn.Module, name: str) -> Any:
    """`module`'s attribute `name`: from its parameters, or where a wrapper has put something else
    in their place.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def parameters_of(modules: Mapping[str, nn.Module], name: str) -> dict[str, Any]:
    """`parameter` of each of `modules`."""
    found = {}
    for role, module in modules.items():
        found[role] = parameter(module, name)
    return found


def why_not_plain(module: nn.Module, name: str) -> str | None:
    """Why calling `module` may do more than its class says (hooks, a patched forward), or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"the {name} has hooks"
    if has_other_forward(module):
        return f"the {name} has a forward of its own"
    return None


def why_not_any_module() -> str | None:
    """Why calling any module may do more than its class says: hooks for all, but those that only
    count FLOPs.
    """
    for hooks in _HOOKS_OF_ALL_MODULES:
        for hook in hooks.values():
            if not isinstance(getattr(hook, "__self__", None), ModuleTracker):
                return "hooks are registered for all modules"
    return None


def any_module_has_hooks() -> bool:
    """Whether hooks are registered for all modules, be it only to count."""
    return any(_HOOKS_OF_ALL_MODULES)


def has_other_forward(module: nn.Module) -> bool:
    """Whether calling `module` runs something else than its class's forward.

    A hook of Hugging Face accelerate that only moves inputs to where the weights are already
    (`device_map` without offloading) is not something else: callers compare devices themselves.
    """
    forward = module.__dict__.get("forward")
    if forward is None or is_own_forward(module, forward):
        return False
    hook: Any = module.__dict__.get("_hf_hook")
    only_aligns = (
        (type(hook).__module__, type(hook).__name__) == ("accelerate.hooks", "AlignDevicesHook")
        and getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks"
        and not (hook.offload or hook.place_submodules or hook.no_grad)
    )
    return not (only_aligns and is_own_forward(module, module.__dict__.get("_old_forward")))


def is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether `forward` is the bound forward of `module`'s own class."""
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward


class _WithoutData(threading.local):
    """Whether this thread judges modules of the meta device, whose tensors have no data yet."""

    on = False


_without_data = _WithoutData()


@contextmanager
def without_data() -> Iterator[None]:
    """Judge tensors on the meta device as those that will be in their place."""
    _without_data.on = True
    try:
        yield
    finally:
        _without_data.on = False


class NotLocal(str):
    """The reason of a tensor that is not whole and plain now; later it may be."""


def why_not_local(tensor: Tensor, name: str) -> "NotLocal | None":
    """Why `tensor` is not a plain local 2-D weight or 1-D bias (shards, quantised subclasses,
    meta), or None.
    """
    # a compiler that runs the module itself (torch.export) puts fakes in the place of plain tensors
    if type(tensor) not in PLAIN and not (type(tensor) is FakeTensor and torch.compiler.is_compiling()):
        return NotLocal(f"the {name} is a {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        return NotLocal(f"the {name} has dtype {tensor.dtype}")
    if tensor.layout != torch.strided:
        return NotLocal(f"the {name} has layout {tensor.layout}")
    if tensor.is_meta and not _without_data.on:
        return NotLocal(f"the {name} is on the meta device")
    if tensor.numel() == 0:
        return NotLocal(f"the {name} is empty (sharded away, or a layer without features)")
    # FSDP1 leaves views of memory that it has freed, never parameters; a transform's tensors can't
    # be asked
    is_view = type(tensor) is Tensor and not torch.compiler.is_compiling()
    if is_view and not torch._C._are_functorch_transforms_active() and tensor.untyped_storage().size() == 0:
        return NotLocal(f"the {name} has no memory now (sharded away)")
    return None
