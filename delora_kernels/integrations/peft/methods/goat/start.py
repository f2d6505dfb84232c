"""The start of a GOAT adapter that its layer subtracts: kept beside the adapter, saved, or made
again and checked.

With `save_start` it is saved as it is. Without, the file holds a probe of it instead, z_j = Σ_e s_e
B⁰_e A⁰_e q_j for two fixed vectors q_j: loading makes the start anew from the base weight, and
refuses it if its probe is another. An SVD is not quite the same on every machine (singular values
that nearly coincide); another base model is another start.
"""

import math
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from delora_kernels.integrations.peft.methods.adapted_base import device_of, dtype_of
from delora_kernels.integrations.peft.methods.base import move_parameters
from delora_kernels.integrations.peft.methods.goat.config import GoatConfig
from delora_kernels.nn.goat_start import Start, moe_start

TOLERANCE = 1e-3
"""Largest relative difference of a probe: rounding gives 1e-5, another weight about 1."""


class Starts(BufferDict):
    """PEFT's dictionary of buffers, of which those in `unsaved` are not part of a state dict."""

    def __init__(self) -> None:
        super().__init__({}, persistent=True)
        self.unsaved: set[str] = set()

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=key not in self.unsaved)


def make_start(config: GoatConfig, r: int, weight: Tensor) -> Start:
    """Return the factors and scales of `config` on `weight` [N, K]; "random" has those of
    "zero".
    """
    return moe_start(
        weight,
        config.num_experts,
        r,
        "zero" if config.start == "random" else config.start,
        config.scaling,
        alpha=config.alpha,
        eta=config.eta,
        rho=config.rho,
        svd=config.svd,
    )


def probe(scale: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """z [2, N], float32, of s [E], A⁰ [E, r, K] and B⁰ [E, N, r]."""
    K = A.shape[-1]
    q = torch.stack([torch.cos(torch.arange(K, dtype=torch.float64) * step) for step in (math.sqrt(2), math.e)])
    q = (q / math.sqrt(K)).to(A.device, torch.float32)
    return torch.einsum("e,enr,erk,jk->jn", scale.float(), B.float(), A.float(), q).contiguous()


class StartedLayer(nn.Module):
    """What a layer does with the starts of its adapters: `options`, `r` and PEFT's dictionaries are
    the layer's.
    """

    options: dict[str, GoatConfig]
    r: dict[str, int]
    goat_A: nn.ParameterDict
    goat_B: nn.ParameterDict
    goat_router: nn.ParameterDict
    goat_lambda: nn.ParameterDict
    goat_magnitude: nn.ParameterDict
    goat_scale: BufferDict
    goat_w_norm: BufferDict
    goat_start_A: Starts
    goat_start_B: Starts
    goat_probe: BufferDict
    _missing: set[str]
    get_base_layer: Any

    def _base_weight(self) -> Tensor:
        raise NotImplementedError

    def _keep_start(self, name: str, A: Tensor, B: Tensor) -> None:
        """Keep A⁰ and B⁰, and their probe if they are not saved."""
        for starts, value in ((self.goat_start_A, A), (self.goat_start_B, B)):
            (starts.unsaved.discard if self.options[name].save_start else starts.unsaved.add)(name)
            starts[name] = value
        if not self.options[name].save_start:
            self.goat_probe[name] = probe(self.goat_scale[name], A, B)

    def _reserve(self, name: str) -> None:
        """Constants for loading to fill; a start that the file leaves out waits in `_missing`."""
        c, A, B = self.options[name], self.goat_A[name], self.goat_B[name]
        device = device_of(self.get_base_layer())  # PEFT moves constants, which it can't from the meta device
        if c.normalize:
            self.goat_w_norm[name] = A.new_zeros(A.shape[-1], device=device)
            return
        self.goat_scale[name] = A.new_zeros(len(B), device=device, dtype=torch.float32)
        if c.start not in ("zero", "random"):
            zeros = (torch.zeros_like(value, device=device, requires_grad=False) for value in (A, B))
            self._keep_start(name, *zeros)
            if not c.save_start:
                self._missing.add(name)

    def _make_again(self, name: str) -> None:
        """Return the start that a file leaves out, from the base weight; refused if it is not the
        saved adapter's.
        """
        dtype = dtype_of(self.get_base_layer())  # rounded as it was when it was made
        A, B = (
            value.to(dtype).to(self.goat_A[name].dtype)
            for value in make_start(self.options[name], self.r[name], self._base_weight())[:2]
        )
        self._check_start(name, self.goat_probe[name], self.goat_scale[name], A, B)
        self._keep_start(name, A, B)

    def _check_start(self, name: str, saved: Tensor, scale: Tensor, A: Tensor, B: Tensor) -> None:
        ours = probe(scale, A, B)
        error = float((ours - saved.to(ours)).norm() / ours.norm())
        if not error <= TOLERANCE:
            raise RuntimeError(
                f"the start of adapter {name!r} can't be made again from this base weight: its probe differs by "
                f"{error:.2g}, more than {TOLERANCE:g}; load it on the base model it was trained on, or save it with "
                "save_start=True"
            )

    def _check_given(self, name: str, key: str, state_dict: Any) -> None:
        if key not in state_dict:
            raise RuntimeError(
                f"adapter {name!r} subtracts its start, and the state dict that it should load has none ({key}), so it "
                "is another adapter's or incomplete; make the model with the config it was trained with, and take the "
                "state dict from state_dict() or get_peft_model_state_dict(), with its buffers"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name, start in self.goat_start_A.items():
            saved = state_dict.get(f"{prefix}goat_probe.{name}")
            if saved is not None and name not in self._missing:
                self._check_start(name, saved, self.goat_scale[name], start, self.goat_start_B[name])
            elif saved is None and f"{prefix}goat_A.{name}" in state_dict:
                self._check_given(name, f"{prefix}goat_start_A.{name}", state_dict)
        for name in self.goat_magnitude:
            if f"{prefix}goat_A.{name}" in state_dict and f"{prefix}goat_magnitude.{name}" not in state_dict:
                raise RuntimeError(
                    f"adapter {name!r} has use_dora=True, and the state dict that it should load has no magnitude "
                    f"({prefix}goat_magnitude.{name}); make the model with the config it was trained with"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's hook after it has filled an adapter that it made on the meta device."""
        if adapter_name not in self.goat_A or self.goat_A[adapter_name].is_meta:
            return
        device = device_of(self.get_base_layer()) if device is None else device
        for parts in (self.goat_A, self.goat_B, self.goat_router, self.goat_lambda, self.goat_magnitude):
            move_parameters(parts, adapter_name, device)
        for constants in (self.goat_scale, self.goat_w_norm, self.goat_probe, self.goat_start_A, self.goat_start_B):
            if adapter_name in constants:
                constants[adapter_name] = constants[adapter_name].to(device)
        if adapter_name in self._missing:
            self._make_again(adapter_name)
            self._missing.remove(adapter_name)
