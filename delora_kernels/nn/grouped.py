"""GroupedLoRALinear, GroupedDoRALinear, GroupedDeLoRALinear: the frozen linears of an expert model
in one parameter, each expert with an adapter of its own.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from delora_kernels import checks, functional
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.functional.grouped import check_grouped, run_routed
from delora_kernels.functional.grouped_delora import normalised
from delora_kernels.nn.base import BaseOptions, MergeableLinear
from delora_kernels.nn.dora import row_norms
from delora_kernels.nn.lora import lora_scale


class _GroupedLinear(MergeableLinear):
    """The frozen linears of E experts and the factors of their adapters: `weight` `[E, N, K]`,
    `bias` `[E, N]`, `A` `[E, r, K]`, `B` `[E, N, r]`.
    """

    _function: Any

    def __init__(self, in_features: int, out_features: int, experts: int, r: int, **base: Unpack[BaseOptions]) -> None:
        kind = type(self).__name__
        for name, value in (("experts", experts), ("r", r)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise checks.fail(TypeError, kind, name, "an int", type(value).__name__, "pass how many")
            if value < 1:
                raise checks.fail(ValueError, kind, name, "≥ 1", value, "use the frozen linears alone")
        self.experts, self.r = experts, r
        super().__init__(in_features, out_features, **base)
        self.A = nn.Parameter(torch.empty(experts, r, in_features, **self._trained_as))
        self.B = nn.Parameter(torch.empty(experts, out_features, r, **self._trained_as))

    def _new_base(self, bias: bool, device: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        bound, shape = 1 / math.sqrt(self.in_features), (self.experts, self.out_features, self.in_features)
        weight = torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound)
        return weight, torch.empty(shape[:2], device=device, dtype=dtype).uniform_(-bound, bound) if bias else None

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, *arguments: Any, **options: Any) -> Self:
        """Make the adapters on experts that are there: the same tensors, frozen.

        Neither training nor merging writes to them; load_state_dict does, as into any shared
        tensor.

        Args:
            weight: `[E, N, K]`, any strides: `weight.mT` of one that is `[E, K, N]`.
            bias: `[E, N]` or None.
            *arguments, **options: As for the class, without in_features, out_features, experts,
                bias, device and dtype, which `weight` decides.

        Returns:
            The module, on weight's device.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        """
        name = f"{cls.__name__}.from_weight"
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            got = f"shape {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
            raise checks.fail(ValueError, name, "weight", "3-D [E, N, K]", got, "use from_linear of a class for one")
        E, N, K = weight.shape
        if bias is not None:
            checks.shape(name, "bias", checks.tensor(name, "bias", bias), (E, N), "[E, N]", "one row for each expert")
        decided: dict[str, Any] = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
        make: Any = cls
        module = make(K, N, E, *arguments, **decided, **options)
        for held in ("weight", "bias"):
            module.register_parameter(held, None)
        module.to_empty(device=weight.device)
        module._hold(weight, bias)
        module.reset_parameters()
        return module

    @classmethod
    def from_linear(cls, linear: nn.Module, *arguments: Any, **options: Any) -> Self:
        """Refused: a linear is not an expert model's.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{cls.__name__}.from_linear: experts are one tensor [E, N, K]; use from_weight")

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the adapted outputs, differentiable once; when merged, the bare linears'.

        Args:
            x: `[T, K]`, sorted by expert.
            offsets: `[E]`, int32 or int64: where the rows of each expert end.

        Returns:
            y, `[T, N]`; 0 in rows behind the last offset.
        """
        if self.merged:
            check_grouped(type(self)._function.__name__, x, self.weight, self.A, self.B, offsets, self.bias)
            return run_routed(x, self.weight, self.bias, None, offsets)
        p = self.dropout_p if self.training else 0.0
        rest = {"offsets": offsets, "bias": self.bias, "dropout_p": p}
        y: Tensor = type(self)._function(x, self.weight, self.A, self.B, **rest, **self._arguments())
        return y

    def extra_repr(self) -> str:
        """Show the arguments that made the module, as nn.Linear prints its own."""
        return super().extra_repr().replace(", bias=", f", experts={self.experts}, r={self.r}, bias=", 1)

    @property
    def _vector_dtype(self) -> torch.dtype:
        """Dtype of the method's vectors and of merging."""
        return accumulate_dtype(torch.promote_types(self.weight.dtype, self.A.dtype))

    @torch.no_grad()
    def _reset_adapter(self) -> None:
        for expert in self.A:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of `_function` that are the method's own."""
        raise NotImplementedError

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """Â [E, r, K], B̂ [E, N, r] and s of the updates s · B̂ Â, in `dtype`."""
        return self.A.to(dtype), self.B.to(dtype), 1.0

    def _rescaled(self, updated: Tensor, expert: int) -> Tensor:
        """W'_e from W_e + s · B̂_e Â_e."""
        return updated

    def _merged_weight(self) -> Tensor:
        dtype, merged = self._vector_dtype, torch.empty_like(self.weight)
        A_hat, B_hat, scale = self._factors(dtype)
        for e, W in enumerate(self.weight):  # one expert at a time in the wider dtype
            merged[e] = self._rescaled(torch.addmm(W.to(dtype), B_hat[e], A_hat[e], alpha=scale), e)
        return merged


class GroupedLoRALinear(_GroupedLinear):
    """The frozen linears of E experts, each with a low-rank update of its own.

        y_e = x_e W_eᵀ + s · drop(x_e) A_eᵀ B_eᵀ + bias_e,   s = alpha / r (rsLoRA: alpha / √r)

    A starts random (Kaiming uniform, a = √5, each expert's by itself), B at 0: y is exactly the
    frozen linears'. `forward(x, offsets)` takes rows sorted by expert, as `functional.
    grouped_lora_linear` does. Merged: W'_e = W_e + s · B_e A_e.

    Args:
        in_features: K.
        out_features: N.
        experts: E.
        r: Rank of each, ≥ 1.
        alpha: Numerator of the scale s.
        bias: Give the experts biases.
        rslora: s = alpha / √r.
        dropout_p: Probability of dropping an element of the adapters' input, in [0, 1); only in
            training mode. Each row has a mask of its own: the copies of a token that went to
            several experts drop independently.
        adapter_dtype: Dtype of A and B. None: float32 for a float16 or bfloat16 base, else the
            base's.
        device: Device of every tensor.
        dtype: Dtype of the base, each expert of which is initialised as nn.Linear's and frozen.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Hu et al. (arXiv:2106.09685), section 4.1, for each expert; rsLoRA: Kalajdzievski
    (arXiv:2312.03732).
    """

    _function: Any = functional.grouped_lora_linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int = 8,
        r: int = 8,
        alpha: float = 8.0,
        *,
        rslora: bool = False,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(in_features, out_features, experts, r, **base)
        self.alpha, self.rslora = alpha, rslora
        self.scale = lora_scale(type(self).__name__, alpha, r, rslora)
        self._make()
        self.reset_parameters()

    def _make(self) -> None:
        """Make the tensors that a subclass has beside A and B."""

    def extra_repr(self) -> str:
        """Show the arguments that made the module, as nn.Linear prints its own."""
        return f"{super().extra_repr()}, alpha={self.alpha}, rslora={self.rslora}"

    def _arguments(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        return self.A.to(dtype), self.B.to(dtype), self.scale


class GroupedDoRALinear(GroupedLoRALinear):
    """The frozen linears of E experts, updated and rescaled to learned magnitudes.

        y_e = c_e ⊙ (x_e W_eᵀ + s · drop(x_e) A_eᵀ B_eᵀ) + bias_e,
        c_e = m_e / ‖W_e + s · B_e A_e‖ by rows, the norm detached

    `magnitude` m `[E, N]` starts at the norms, B at 0: y is the frozen linears' up to rounding.
    Merged: W'_e = c_e ⊙ (W_e + s · B_e A_e).

    Args:
        in_features, out_features, experts, r, alpha, rslora, bias, dropout_p, adapter_dtype,
            device, dtype: as in `GroupedLoRALinear`.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Liu et al. (arXiv:2402.09353), eq. 5 and section 4.3, for each expert.
    """

    _function = functional.grouped_dora_linear

    def _make(self) -> None:
        self.magnitude = nn.Parameter(self.A.new_empty((self.experts, self.out_features), dtype=self._vector_dtype))

    @torch.no_grad()
    def _reset_adapter(self) -> None:
        super()._reset_adapter()
        for m, W, A, B in zip(self.magnitude, self.weight, self.A, self.B, strict=True):
            m.copy_(row_norms(W, A, B, self.scale))

    def _arguments(self) -> dict[str, Any]:
        return {"magnitude": self.magnitude, "scale": self.scale}

    def _rescaled(self, updated: Tensor, expert: int) -> Tensor:
        norm = torch.linalg.vector_norm(updated, dim=1)
        return updated * (self.magnitude[expert].to(norm.dtype) / norm.masked_fill(norm == 0, torch.inf))[:, None]


class GroupedDeLoRALinear(_GroupedLinear):
    """The frozen linears of E experts, each with a normalised low-rank update of bounded norm.

        y_e = x_e W_eᵀ + drop(x_e) Â_eᵀ B̂_eᵀ + bias_e,
        Â_e = diag(1/‖A_e,i‖) A_e diag(n_e),   B̂_e = B_e diag(λ_e / (r ‖B_e,i‖))

    B starts at 0 and norms are clamped at 1e-4 (as PEFT's DeLoRA does): y is exactly the frozen
    linears'. `lam` λ `[E]` is a parameter; `weight_norm` n `[E, K]`, the norms of each W_e's input
    columns, a buffer, taken from the weight when the adapters start. Merged: W'_e = W_e + B̂_e Â_e.

    Args:
        in_features, out_features, experts, r, bias, dropout_p, adapter_dtype, device, dtype: as in
            `GroupedLoRALinear`.
        lam: λ of every expert at the start.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Bini et al. (arXiv:2503.18225), eqs. 5-8, for each expert.
    """

    _function = functional.grouped_delora_linear
    weight_norm: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int = 8,
        r: int = 8,
        lam: float = 15.0,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(in_features, out_features, experts, r, **base)
        self.initial_lam, self.eps = checks.number(type(self).__name__, "lam", lam), 1e-4
        self.lam = nn.Parameter(self.A.new_empty(experts, dtype=self._vector_dtype))
        self.register_buffer("weight_norm", self.A.new_empty((experts, in_features), dtype=self._vector_dtype))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Show the arguments that made the module, as nn.Linear prints its own."""
        return f"{super().extra_repr()}, initial_lam={self.initial_lam}"

    @torch.no_grad()
    def _reset_adapter(self) -> None:
        super()._reset_adapter()
        self.lam.fill_(self.initial_lam)
        self.weight_norm.copy_(torch.linalg.vector_norm(self.weight, dim=1, dtype=self.weight_norm.dtype))

    def _arguments(self) -> dict[str, Any]:
        return {"lam": self.lam, "weight_norm": self.weight_norm, "eps": self.eps}

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        return *normalised(self.A.to(dtype), self.B.to(dtype), self.lam, self.weight_norm, self.eps), 1.0
