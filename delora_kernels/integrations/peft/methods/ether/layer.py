"""PeftEtherLinear and PeftEtherPlusLinear: PEFT's view of a linear between reflections, run by the
fused functions.

Each adapter has its vectors in PEFT's dictionaries, named by the functions' arguments: ETHER's are
`ether_u` [n_blocks, K / n_blocks] and `ether_u_out` [n_blocks, N / n_blocks], those of ETHER+
`etherplus_u`, `etherplus_v`, `etherplus_u_out`, `etherplus_v_out`. The base layer is never written
to but by `merge`.
"""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from delora_kernels import functional, reference
from delora_kernels.autograd.reflection import reflected_weight
from delora_kernels.bases.read import base_in
from delora_kernels.bases.stored import StoredBase
from delora_kernels.functional.ether import reflected
from delora_kernels.integrations.peft.methods.adapted_base import device_of, dtype_of, shape_of
from delora_kernels.integrations.peft.methods.base import OwnLayer, move_parameters
from delora_kernels.integrations.peft.methods.ether.config import EtherConfig, EtherPlusConfig
from delora_kernels.integrations.peft.verdict import State
from delora_kernels.nn.ether import check_blocks

Config = EtherConfig | EtherPlusConfig


class _ReflectedLayer(OwnLayer, nn.Module, BaseTunerLayer):
    """A linear layer of the base model with adapters of reflections.

    Args:
        base_layer: nn.Linear, Transformers' Conv1D, or a linear stored in few bits.
        adapter_name: Of the first adapter.
        config: Its config.
    """

    other_param_names = ("options",)
    additive = False
    why_not_low_rank = ("reflections before and after the weight", "save_pretrained the adapter as it is, or merge it")
    own_forward = "an ETHER layer reflects what goes into and comes out of its base's own forward"
    beside_base = State.OWN_FORWARD
    _prefix: str
    _directions: tuple[str, ...]
    _function: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Config) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = shape_of(self.get_base_layer())
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        self.options: dict[str, Config] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: Config) -> None:
        """Add an adapter; PEFT calls it where the layer has one already."""
        base, n = self.get_base_layer(), config.n_blocks
        sides = [("", self.in_features, "output"), ("_out", self.out_features, "input")]
        sides = [(suffix, features, without) for suffix, features, without in sides if config.side != without]
        for suffix, features, _ in sides:
            check_blocks(type(config).__name__, n, features, "out_features" if suffix else "in_features")
        self.options[adapter_name] = config
        for suffix, features, _ in sides:
            for direction in self._directions:
                vectors = torch.empty(n, features // n, device=device_of(base), dtype=dtype_of(base))
                getattr(self, self._prefix + direction + suffix)[adapter_name] = nn.Parameter(vectors)
        self.reset_adapter(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_adapter(self, adapter_name: str) -> None:
        """Start an adapter's vectors anew: Kaiming uniform, and v at −u."""
        vectors = self._vectors(adapter_name)
        for name, value in vectors.items():
            if name.startswith("v") and getattr(self.options[adapter_name], "init_weights", True):
                value.copy_(-vectors[name.replace("v", "u")])
            else:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the output [..., K] → [..., N] between the active adapters' reflections; off or
        merged, the base layer's.

        Of several active adapters each stands around those before it, as merging them one by one
        does.

        Raises:
            RuntimeError: blocks="official" beside a base layer whose weight can't be read (hooks,
                shards, offloaded).
        """
        names, reason = self._to_run(x, args, kwargs)
        if names and x.is_meta:
            return self._shaped(names, x)
        base = self._base(x) if reason is None or (len(names) > 1 and not (args or kwargs)) else None
        if base is None:
            return self._around_forward(names, x, *args, **kwargs)
        for name in names:
            x = nn.functional.dropout(x, self.options[name].dropout, self.training)
        official = any(self.options[name].blocks == "official" for name in names)
        weight = base.weight
        if isinstance(base, StoredBase) and (len(names) > 1 or official):
            weight = base.dense(base.computes_in(x))
        for name in names[:-1]:  # W' of an adapter, differentiable: what the layer makes of the identity
            identity = torch.eye(self.in_features, device=x.device, dtype=weight.dtype)
            weight = self._reflected(name, identity, weight, None).to(weight.dtype).t()
        return self._reflected(names[-1], x, weight, base.bias)

    def _shaped(self, names: list[str], x: Tensor) -> Tensor:
        """Return the output on the meta device, which has shapes and dtypes alone."""
        y: Tensor = self.base_layer(x)
        for name in names:
            formula = getattr(reference, type(self)._function.__name__)
            weight = x.new_zeros(self.out_features, self.in_features)
            y = y + formula(x, weight, blocks=self.options[name].blocks, **self._vectors(name)).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put H_out W H_in of adapters into the base layer, in float32 or wider, rounded once; W
        itself is kept.

        Raises:
            RuntimeError: the base layer has adapters of its own that are not merged; nothing has
                changed.
            ValueError: `safe_merge`, and the merged weight is not finite; nothing has changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.options]
        self._merge(names, safe_merge)

    def _merged(self, weight: Tensor, adapter_names: list[str]) -> Tensor:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            for name in adapter_names:
                weight = reflected_weight(weight, self.options[name].blocks, **self._vectors(name))
        return weight

    def _around_forward(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the same around whatever the base layer's own forward does."""
        base = base_in(self.base_layer)
        reason = base if isinstance(base, str) else self._why_not_input(x) or "the call has more arguments than x"
        for name in names:
            if self.options[name].blocks == "official" and self.options[name].n_blocks > 1:
                raise RuntimeError(
                    f'{type(self).__name__}: blocks="official" of adapter {name!r} reflects parts of the base weight, '
                    f'which can\'t be read here: {reason}; use blocks="paper", or merge'
                )
            x = nn.functional.dropout(x, self.options[name].dropout, self.training)
        for name in reversed(names):
            x = self._one_side(name, x, out=False)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        names = [name for name in names if self.options[name].side != "input"]
        bias = self.get_base_layer().bias if names else None
        dtype = y.dtype
        y = y if bias is None else y - bias
        for name in names:
            y = self._one_side(name, y, out=True)
        return y if bias is None else (y + bias).to(dtype)

    def _one_side(self, name: str, x: Tensor, out: bool) -> Tensor:
        """x [..., C] reflected by one side of an adapter."""
        vectors = {k.removesuffix("_out"): v for k, v in self._vectors(name).items() if k.endswith("_out") == out}
        return reflected(x, **vectors) if vectors else x

    def _reflected(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output of one adapter on `weight`."""
        blocks = self.options[name].blocks
        y: Tensor = type(self)._function(x, weight, bias=bias, blocks=blocks, **self._vectors(name))
        return y

    def _vectors(self, name: str) -> dict[str, Tensor]:
        """Return the vectors that the adapter has, by the functions' argument names."""
        parts = {part.removeprefix(self._prefix): getattr(self, part) for part in self.adapter_layer_names}
        return {argument: values[name] for argument, values in parts.items() if name in values}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's hook after it has filled an adapter that it made on the meta device."""
        if any(value.is_meta for value in self._vectors(adapter_name).values()):
            return
        for part in self.adapter_layer_names:
            move_parameters(getattr(self, part), adapter_name, device or device_of(self.get_base_layer()))

    def __repr__(self) -> str:
        return "ether." + super().__repr__()


class PeftEtherLinear(_ReflectedLayer):
    """A linear layer of the base model with ETHER adapters."""

    adapter_layer_names = ("ether_u", "ether_u_out")
    fused_method = "ether"
    _prefix = "ether_"
    _directions = ("u",)
    _function = functional.ether_linear


class PeftEtherPlusLinear(_ReflectedLayer):
    """A linear layer of the base model with ETHER+ adapters."""

    adapter_layer_names = ("etherplus_u", "etherplus_v", "etherplus_u_out", "etherplus_v_out")
    fused_method = "ether+"
    _prefix = "etherplus_"
    _directions = ("u", "v")
    _function = functional.ether_plus_linear
