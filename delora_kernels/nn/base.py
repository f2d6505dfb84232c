"""What the adapter modules share: the frozen base, dtypes, merging and the state dict."""

import inspect
import math
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from delora_kernels import checks
from delora_kernels.bases.plain import PlainBase, why_not_plain
from delora_kernels.bases.read import base_in
from delora_kernels.bases.stored import StoredBase
from delora_kernels.dtypes import accumulate_dtype

_CHUNK_ELEMENTS = 1 << 22
"""Elements of W' that `merge` holds in the wider dtype at a time: 16 MiB in float32."""


class BaseOptions(TypedDict, total=False):
    """The options that every module has, with the defaults that `MergeableLinear` gives them."""

    bias: bool
    dropout_p: float
    adapter_dtype: torch.dtype | None
    device: torch.device | str | int | None
    dtype: torch.dtype | None


class MergeableLinear(nn.Module):
    """A frozen linear with an adapter that can be merged into its weight: the base class of every
    module here.

    The base is `weight` `[N, K]` and `bias` `[N]`, which ask for no gradient. On a linear of a
    quantisation library `weight` is None, and `stored` that linear.

    The state dict is that of the module as it stands: a merged one holds W' as `weight` and W as
    `base_weight`, a key that is there only if merged. Loading follows it: the module becomes
    merged, or unmerged, as the saved one was.

    Args:
        in_features: K.
        out_features: N.
        bias: Give the base a bias.
        dropout_p: Probability of dropping an element of the adapter's input, in [0, 1); only in
            training mode.
        adapter_dtype: Dtype of what is trained. None: float32 for a float16 or bfloat16 base, else
            the base's.
        device: Device of every tensor.
        dtype: Dtype of the base.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    base_weight: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        dtype = _float_dtype(kind, "dtype", torch.get_default_dtype() if dtype is None else dtype)
        default = accumulate_dtype(dtype)
        adapter_dtype = _float_dtype(kind, "adapter_dtype", default if adapter_dtype is None else adapter_dtype)
        self._trained_as: dict[str, Any] = {"device": device, "dtype": adapter_dtype}
        self.in_features, self.out_features = in_features, out_features
        self.dropout_p = checks.probability(kind, dropout_p)

        self._hold(*self._new_base(bias, device, dtype))
        self.register_parameter("base_weight", None)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show in the signature of each module what its `**base`, `*mixture` or `**options` stands
        for.
        """
        super().__init_subclass__(**kwargs)
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        names, shown = {each.name for each in own}, []
        for each in own:
            if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
                above = MergeableLinear if each.annotation == Unpack[BaseOptions] else cls.__base__
                kind = each.KEYWORD_ONLY if each.kind is each.VAR_KEYWORD else each.POSITIONAL_OR_KEYWORD
                more = inspect.signature(above).parameters.values()  # type: ignore[arg-type]
                shown += [other for other in more if other.kind is kind and other.name not in names]
            else:
                shown.append(each)
        cls.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]

    @classmethod
    def from_linear(cls, linear: nn.Module, *arguments: Any, **options: Any) -> Self:
        """Make the adapter on the weight and bias of `linear`: the same tensors, frozen.

        Neither training nor merging writes to them; load_state_dict does, as into any shared
        tensor.

        Args:
            linear: A plain nn.Linear (no subclass, hooks or shards) or Transformers Conv1D; itself
                left as it is. Or a linear that a library stores in few bits (docs/stored-bases.md):
                the module then holds it, and can't be merged.
            *arguments, **options: As for the class, without in_features, out_features, bias, device
                and dtype, which `linear` decides.

        Returns:
            The module, on linear's device and in its training mode.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        """
        base = base_of(f"{cls.__name__}.from_linear", linear)
        N, K = base.shape
        decided: dict[str, Any] = {"bias": base.bias is not None, "device": "meta", "dtype": base.weight.dtype}
        module = cls(K, N, *arguments, **decided, **options)
        for name in ("weight", "bias"):
            module.register_parameter(name, None)
        module.to_empty(device=base.device)
        module._hold(base.weight if isinstance(base, PlainBase) else None, base.bias)
        if not isinstance(base, PlainBase):
            module._modules["stored"] = linear
        module.reset_parameters()
        return module.train(linear.training)

    def _new_base(self, bias: bool, device: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return a weight and a bias initialised as nn.Linear's."""
        base = nn.Linear(self.in_features, self.out_features, bias, device, dtype)
        return base.weight, base.bias

    def _hold(self, weight: Tensor | None, bias: Tensor | None) -> None:
        self.register_parameter("weight", None if weight is None else _frozen(weight))
        self.register_parameter("bias", None if bias is None else _frozen(bias))

    @property
    def stored(self) -> nn.Module | None:
        """The linear of a quantisation library that is the base, or None: `weight` is."""
        return self._modules.get("stored")

    @property
    def merged(self) -> bool:
        """Whether `weight` is W' and the forward pass the bare linear."""
        return self.base_weight is not None

    def reset_parameters(self) -> None:
        """Start the adapter anew from `weight` as it is now; weight and bias stay.

        Call it after loading base weights into a module that was constructed without them.

        Raises:
            RuntimeError: the adapter is merged.
        """
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.reset_parameters: the adapter is merged; call unmerge() first")
        if self.stored is None:
            self._reset_adapter()
            return
        self.weight = _frozen(base_of(type(self).__name__, self.stored).dense(torch.float32))
        try:
            self._reset_adapter()
        finally:
            self.weight = None  # type: ignore[assignment]

    def _call_weight(self) -> Any:
        """Return what the functions take as the weight."""
        return self.weight if self.stored is None else base_of(type(self).__name__, self.stored).weight

    def forward(self, x: Tensor) -> Tensor:
        """Compute the adapted output, `[..., K]` → `[..., N]`, differentiable once; when merged, x
        W'ᵀ + bias.
        """
        if self.merged:
            return nn.functional.linear(x, self.weight, self.bias)
        return self._adapted(x, self.dropout_p if self.training else 0.0)

    def merge(self, *, check_finite: bool = True, keep_weight: bool = True) -> None:
        """Put the adapter into the weight: from now on `weight` is W' and the forward pass costs
        one linear.

        W' is a new tensor, computed in float32 (float64 for float64) and rounded once; W itself is
        never written to. Changes of the adapter have no effect, and it gets no gradient, until
        `unmerge`.

        Args:
            check_finite: Check that every element of W', in weight's dtype, is finite.
            keep_weight: Keep W as `base_weight`, so that `unmerge` brings back every bit of it.
                False: let it go (the memory of one weight, where nobody else holds it); `unmerge`
                is then refused.

        Raises:
            ValueError: W' is not finite, or the weight has no data, or few bits; nothing has
                changed.
            RuntimeError: the adapter is merged already.
        """
        name = f"{type(self).__name__}.merge"
        if self.merged:
            raise RuntimeError(f"{name}: the adapter is merged already; call unmerge() first")
        if self.stored is not None:
            remedy = "keep it beside the base, or make the adapter on the linear in 16 bits and merge there"
            got = f"one stored by a {type(self.stored).__name__}, whose bits would round the adapter away"
            raise checks.fail(ValueError, name, "the weight", "dense", got, remedy)
        checks.tensor(name, "weight", self.weight)
        # as a plain tensor in its own dtype, whatever mode the caller is in
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            merged = self._merged_weight()
        if check_finite and not all(bool(chunk.isfinite().all()) for chunk in _row_chunks(merged)):
            remedy = "look for NaN, Inf or huge values in the adapter, or pass check_finite=False"
            raise checks.fail(ValueError, name, "the merged weight", "finite", "NaN or Inf", remedy)
        self.base_weight = self.weight if keep_weight else _dropped(self.weight)
        self.weight = _frozen(merged)

    def unmerge(self) -> None:
        """Take the adapter out of the weight: `weight` is again the very tensor that it was before
        `merge`.

        Raises:
            RuntimeError: the adapter is not merged, or was merged with keep_weight=False.
        """
        name = f"{type(self).__name__}.unmerge"
        if self.base_weight is None:
            raise RuntimeError(f"{name}: the adapter is not merged; call merge() first")
        if _is_dropped(self.base_weight):
            raise RuntimeError(f"{name}: merge(keep_weight=False) let the weight go; load it from its checkpoint")
        self.weight, self.base_weight = self.base_weight, None

    def extra_repr(self) -> str:
        """Show the arguments that made the module, as nn.Linear prints its own."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}, dropout_p={self.dropout_p}"
        return text + (", merged=True" if self.merged else "")

    def _adapted(self, x: Tensor, dropout_p: float) -> Tensor:
        """Return the forward pass of the unmerged module."""
        raise NotImplementedError

    def _reset_adapter(self) -> None:
        """Initialise every tensor of the adapter."""
        raise NotImplementedError

    def _merged_weight(self) -> Tensor:
        """W', a new tensor in weight's dtype."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if any(prefix + name in state_dict for name in (*self._parameters, *self._buffers)):
            reason = self._follow(state_dict.get(f"{prefix}base_weight"), f"{prefix}weight" in state_dict)
            if reason is not None:
                raise RuntimeError(f"{type(self).__name__}.load_state_dict ({prefix or 'the whole module'}): {reason}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _follow(self, saved: Tensor | None, has_weight: bool) -> str | None:
        """Become merged or unmerged like a state dict whose `base_weight` is `saved`; returns why
        that can't be done.

        Where a tensor about to be loaded belongs to the other state, or to the caller's linear, it
        is a new one then.
        """
        if saved is None:
            if self.base_weight is not None and not _is_dropped(self.base_weight):
                self.unmerge()
            elif self.base_weight is not None and not has_weight:
                return "the adapter is merged with keep_weight=False; load a state dict that has the weight"
            self.base_weight = None
            return None
        if not has_weight:
            return "the state dict has base_weight (it was merged when saved) but no weight; save the whole module"
        if self.base_weight is None:
            self.weight, self.base_weight = _frozen(torch.empty_like(self.weight)), self.weight
        if saved.dim() != self.base_weight.dim():
            lean = _is_dropped(saved)
            self.base_weight = _dropped(self.weight) if lean else _frozen(torch.empty_like(self.weight))
        return None


class AdapterLinear(MergeableLinear):
    """A frozen linear with a low-rank adapter: the base class of LoRALinear, DoRALinear,
    DeLoRALinear and the mixtures.

    The adapter's factors are `A` `[r, K]` and `B` `[N, r]`. A method's vectors and scalars are
    float32 (float64 beside float64) whatever the factors' dtype.

    Args:
        in_features, out_features, bias, dropout_p, adapter_dtype, device, dtype: as in
            `MergeableLinear`.
        r: Rank, ≥ 1.
        experts: E: A is `[E, r, K]` and B `[E, N, r]`; None: one pair.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
    """

    scale = 1.0
    _function: Any
    """The method's function in `functional`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        experts: int | None = None,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(in_features, out_features, **base)
        kind = type(self).__name__
        if isinstance(r, bool) or not isinstance(r, int):
            raise checks.fail(TypeError, kind, "r", "an int", type(r).__name__, "pass the rank")
        if r < 1:
            raise checks.fail(ValueError, kind, "r", "≥ 1", r, "use nn.Linear for a layer without an adapter")
        self.r, lead = r, () if experts is None else (experts,)
        self.A = nn.Parameter(torch.empty(*lead, r, in_features, **self._trained_as))
        self.B = nn.Parameter(torch.empty(*lead, out_features, r, **self._trained_as))

    @property
    def _vector_dtype(self) -> torch.dtype:
        """Dtype of the method's vectors and of merging."""
        return accumulate_dtype(torch.promote_types(self.weight.dtype, self.A.dtype))

    def extra_repr(self) -> str:
        """Show the arguments that made the module, as nn.Linear prints its own."""
        return super().extra_repr().replace(", bias=", f", r={self.r}, bias=", 1)

    def _reset_adapter(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def _adapted(self, x: Tensor, dropout_p: float) -> Tensor:
        tensors = (x, self._call_weight(), self.A, self.B)
        y: Tensor = type(self)._function(*tensors, bias=self.bias, dropout_p=dropout_p, **self._arguments())
        return y

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of `_function` beyond x, weight, A, B, bias, dropout_p and seed."""
        raise NotImplementedError

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """Â [R, K], B̂ [N, R] and s of the update s · B̂ Â, in `dtype`."""
        return self.A.to(dtype), self.B.to(dtype), self.scale

    def _rescaled(self, updated: Tensor, rows: slice) -> Tensor:
        """Rows of W' from the same rows of W + s · B̂ Â."""
        return updated

    def _merged_weight(self) -> Tensor:
        dtype = self._vector_dtype
        A_hat, B_hat, scale = self._factors(dtype)
        merged = torch.empty_like(self.weight)
        start = 0
        for chunk in _row_chunks(merged):
            rows = slice(start, start := start + chunk.shape[0])
            updated = torch.addmm(self.weight[rows].to(dtype), B_hat[rows], A_hat, alpha=scale)
            chunk.copy_(self._rescaled(updated, rows))
        return merged


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _dropped(weight: Tensor) -> nn.Parameter:
    """`base_weight` after merge(keep_weight=False): 1-D and empty."""
    return _frozen(weight.new_empty(0))


def _is_dropped(base_weight: Tensor) -> bool:
    return base_weight.dim() == 1


def _row_chunks(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1])))


def _float_dtype(kind: str, argument: str, dtype: torch.dtype) -> torch.dtype:
    if dtype not in checks.FLOATS:
        raise checks.fail(TypeError, kind, argument, f"one of {checks.FLOATS}", dtype, "pass a float dtype")
    return dtype


def base_of(function: str, linear: Any) -> PlainBase | StoredBase:
    """Return the weight and bias that an adapter can be put on, or the TypeError that says why
    there are none.
    """
    if type(linear) is nn.Linear and linear.weight.is_meta and why_not_plain(linear, "base layer") is None:
        return PlainBase(linear.weight, linear.bias)
    base = base_in(linear) if isinstance(linear, nn.Module) else f"it is a {type(linear).__name__}"
    if not isinstance(base, str):
        return base
    remedy = "adapt a layer whose forward pass is x Wᵀ + bias and nothing else"
    raise checks.fail(TypeError, function, "linear", "a plain nn.Linear", f"one that can't be read: {base}", remedy)
