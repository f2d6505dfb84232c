"""PeftGoatLinear: PEFT's view of a linear with a mixture of low-rank experts, run by the fused
function.

Each adapter has its tensors in PEFT's dictionaries: `goat_A` [E, r, K] (or [r, K], shared),
`goat_B` [E, N, r], `goat_router` [E, K], `goat_lambda` [E], `goat_magnitude` [N]; constants are
`goat_scale` [E], `goat_w_norm` [K] and the start that is subtracted, `goat_start_A`,
`goat_start_B`. The base layer is never written to but by `merge` (`methods/merging.py`).
"""

import math
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from delora_kernels import functional, reference
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.functional.common import exporting
from delora_kernels.functional.moe import moe_rank_term
from delora_kernels.functional.router_stats import RouterStats
from delora_kernels.integrations.peft.methods.adapted_base import device_of, dtype_of, shape_of
from delora_kernels.integrations.peft.methods.base import OwnLayer
from delora_kernels.integrations.peft.methods.goat.config import GoatConfig
from delora_kernels.integrations.peft.methods.goat.magnitude import RescaledLayer
from delora_kernels.integrations.peft.methods.goat.padding import Padding
from delora_kernels.integrations.peft.methods.goat.start import StartedLayer, Starts, make_start
from delora_kernels.integrations.peft.verdict import State
from delora_kernels.nn.delora_moe import normalised_experts
from delora_kernels.nn.moe import Routed


class PeftGoatLinear(RescaledLayer, OwnLayer, StartedLayer, BaseTunerLayer, Routed):  # type: ignore[override]
    """A linear layer of the base model with GOAT adapters.

    Args:
        base_layer: nn.Linear, Transformers' Conv1D, or a linear stored in few bits.
        adapter_name: Of the first adapter.
        config: Its config.
        r: Rank of each of its experts in this layer.

    Attributes:
        router_stats: The detached `RouterStats` of each adapter's last forward pass.
        padding: What tells the layer which tokens are padding; None outside a model.
    """

    adapter_layer_names = ("goat_A", "goat_B", "goat_router", "goat_lambda", "goat_magnitude")
    other_param_names = (
        "goat_scale",
        "goat_w_norm",
        "goat_start_A",
        "goat_start_B",
        "goat_probe",
        "r",
        "options",
        "router_stats",
    )
    fused_method = "goat"
    why_not_low_rank = ("a mixture, whose update is another for every token", "save_pretrained the adapter as it is")
    own_forward = "a GOAT layer runs its base layer's own forward, its rank term fused beside it"
    beside_base = State.RANK_TERM

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: GoatConfig, r: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = shape_of(self.get_base_layer())
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        self.goat_scale = BufferDict({}, persistent=True)
        self.goat_w_norm = BufferDict({}, persistent=True)
        self.goat_start_A, self.goat_start_B = Starts(), Starts()
        self.goat_probe = BufferDict({}, persistent=True)
        self.r: dict[str, int] = {}
        self.options: dict[str, GoatConfig] = {}
        self.router_stats: dict[str, RouterStats] = {}
        self.padding: Padding | None = None
        self._missing: set[str] = set()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r)

    def update_layer(self, adapter_name: str, config: GoatConfig, r: int) -> None:
        """Add an adapter; PEFT calls it where the layer has one already."""
        base, E, K, N = self.get_base_layer(), config.num_experts, self.in_features, self.out_features
        if config.use_dora and isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                "use_dora must be False around a layer with adapters of its own, got a "
                f"{type(self.base_layer).__name__}: merging those would change the norms that the output is divided "
                "by; merge_and_unload() them first"
            )

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device_of(base), dtype=dtype_of(base)))

        self.r[adapter_name], self.options[adapter_name] = r, config
        self.goat_A[adapter_name] = parameter(r, K) if config.shared_A else parameter(E, r, K)
        self.goat_B[adapter_name] = parameter(E, N, r)
        self.goat_router[adapter_name] = parameter(E, K)
        if config.normalize:
            self.goat_lambda[adapter_name] = parameter(E)
        if config.use_dora:
            magnitude = torch.empty(N, device=device_of(base), dtype=accumulate_dtype(dtype_of(base)))
            self.goat_magnitude[adapter_name] = nn.Parameter(magnitude)
        self.reset_adapter(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_adapter(self, adapter_name: str) -> None:
        """Start an adapter anew from the base weight; on the meta device only its constants' places
        are made.
        """
        c, A, B = self.options[adapter_name], self.goat_A[adapter_name], self.goat_B[adapter_name]
        if A.is_meta:
            self._reserve(adapter_name)
            return
        if c.start in ("zero", "random") and not (c.normalize or c.use_dora):  # a base that can't be read will do
            weight = A.new_zeros(1, 1).expand(self.out_features, self.in_features)
        else:
            weight = self._base_weight()
        start = make_start(c, self.r[adapter_name], weight)
        A.copy_(start.A[0] if c.shared_A else start.A)
        B.copy_(torch.randn_like(start.B) / math.sqrt(B.shape[2]) if c.start == "random" else start.B)
        nn.init.kaiming_uniform_(self.goat_router[adapter_name], a=math.sqrt(5))
        if c.normalize:
            self.goat_lambda[adapter_name].fill_(c.goat_lambda)
            norm = torch.linalg.vector_norm(weight, dim=0, dtype=accumulate_dtype(weight.dtype))
            self.goat_w_norm[adapter_name] = norm.to(A.dtype)
        else:
            self.goat_scale[adapter_name] = start.scale
        if c.start not in ("zero", "random"):
            self._keep_start(adapter_name, A.detach().clone(), B.detach().clone())
        self.reset_magnitude(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the output of the active adapters, [..., K] → [..., N]; disabled or merged, the
        base layer's alone.
        """
        names, reason = self._to_run(x, args, kwargs)
        if names and x.is_meta:
            return self._shaped(names, x)
        base = self._base(x) if reason is None or (len(names) > 1 and not (args or kwargs)) else None
        if base is not None:
            y = self._mixed(names.pop(0), x, base.weight, base.bias)
        else:
            y = self.base_layer(x, *args, **kwargs)
        for name in names:  # what acts beside the first, or beside a base that runs its own forward
            y = self.beside(name, x, y, getattr(self.get_base_layer(), "bias", None))
        return y

    def _shaped(self, names: list[str], x: Tensor) -> Tensor:
        """Return the output on the meta device, which has shapes and dtypes alone."""
        y: Tensor = self.base_layer(x)
        for name in names:
            c, zeros = self.options[name], x.new_zeros(self.out_features, self.in_features)
            options: dict[str, Any] = {"top_k": c.top_k, "renormalize": c.renormalize} | self._mixture(name)
            y = y + reference.moe_lora_linear_dense(x, zeros, **options)[0].to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters of one expert into the weight; a mixture is refused.

        Raises:
            RuntimeError: an adapter has several experts.
            ValueError: `safe_merge`, and the merged weight is not finite; nothing has changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.goat_A]
        for name in names:
            if self.options[name].num_experts > 1:
                raise RuntimeError(
                    f"merge: adapter {name!r} weighs its {self.options[name].num_experts} experts anew for every token "
                    f"(top_k = {self.options[name].top_k}), so there is no single weight to merge into; "
                    "dk.merge_mean_gate(model, inputs) merges their mean, an approximation, and measures it"
                )
        self.merge_mean_gate(names, safe_merge)

    def merge_mean_gate(self, adapter_names: list[str], safe_merge: bool = False) -> None:
        """Put W + Σ_e s_e B_e A_e / E − γ Σ_e s_e B⁰_e A⁰_e into the base layer, once for each
        adapter; with a magnitude its rows have that length.

        It is exact for one expert, else an approximation: every token gets the gate 1/E for every
        expert. W itself is kept, for `unmerge`.

        Raises:
            ValueError: `safe_merge`, and the merged weight is not finite; nothing has changed.
        """
        self._merge(adapter_names, safe_merge)

    def _merged(self, weight: Tensor, adapter_names: list[str]) -> Tensor:
        dtype = accumulate_dtype(weight.dtype)
        merged = weight.to(dtype)
        for name in adapter_names:
            merged = merged + self.mean_update(name).to(dtype)
            if name in self.goat_magnitude:
                merged = self.column_scale(name).detach().to(dtype)[:, None] * merged
        return merged

    @torch.no_grad()
    def mean_update(self, adapter_name: str) -> Tensor:
        """Σ_e s_e B_e A_e / E − γ Σ_e s_e B⁰_e A⁰_e, [N, K]: the adapter's update where every gate
        is 1/E.
        """
        m = self._mixture(adapter_name)
        E = self.options[adapter_name].num_experts
        A = m["A"].expand(E, *m["A"].shape[-2:])
        update = torch.einsum("e,enr,erk->nk", m["scale"].to(A.dtype) / E, m["B"], A)
        if "frozen_A" in m:
            update -= torch.einsum("e,enr,erk->nk", m["residual"].to(A.dtype), m["frozen_B"], m["frozen_A"])
        return update

    def _mixed(self, name: str, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """Return the output of one adapter on `weight`; None: its term alone."""
        c = self.options[name]
        options: dict[str, Any] = {"token_mask": self.counted_tokens(x), "top_k": c.top_k, "renormalize": c.renormalize}
        options |= {"dropout_p": c.dropout if self.training else 0.0, "dropout": c.dropout_kind}
        options |= self._losses(c.balance_coef, c.z_coef, c.balance, c.chosen) | self._mixture(name)
        if weight is None:
            y, stats = moe_rank_term(x, self.out_features, **options)
        else:
            magnitude = self.goat_magnitude.get(name)
            y, stats = functional.moe_lora_linear(x, weight, bias=bias, magnitude=magnitude, **options)
        if not exporting():
            self.router_stats[name] = stats.detach()
        return y

    def counted_tokens(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """Which tokens of x [..., K] count in losses and statistics, `[...]`, bool; None: all."""
        mask = None if self.padding is None or hasattr(self, "_is_replica") else self.padding.mask
        return None if mask is None or mask.shape != x.shape[:-1] else mask.to(x.device)

    def _mixture(self, name: str) -> dict[str, Any]:
        """Return the tensors of the call, but the base layer's."""
        A, B = self.goat_A[name], self.goat_B[name]
        mixture: dict[str, Any] = {"router": self.goat_router[name]}
        if name in self.goat_lambda:
            return {**mixture, **normalised_experts(A, B, self.goat_lambda[name], self.goat_w_norm[name])}
        scale = self.goat_scale[name].to(accumulate_dtype(A.dtype))
        mixture.update(A=A, B=B, scale=scale)
        if name in self.goat_start_A:
            mixture.update(frozen_A=self.goat_start_A[name], frozen_B=self.goat_start_B[name])
            mixture["residual"] = self.options[name].residual * scale
        return mixture

    def __repr__(self) -> str:
        return "goat." + super().__repr__()
