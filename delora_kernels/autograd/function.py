"""What the autograd Functions share: how a call is run, with autocast off, and how its gradients
come back.

A family gives two functions of a call's tensors and of the ops that run it. `compute` says what is
kept for backward, `gradients` makes of that and dy whatever gradients are wanted; neither sees
autograd, autocast or a dtype that it has not chosen itself.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from delora_kernels import ops
from delora_kernels.backends import tape
from delora_kernels.dtypes import allow_tf32


class Computed(NamedTuple):
    """What a forward pass leaves.

    Args:
        outputs: The results, the tokens of the first one as rows.
        saved: The tensors kept for backward, a `saved_type`; None where no wanted gradient needs
            them.
        depends_on: Tensors that the gradients are computed from besides `saved`.
    """

    outputs: tuple[Tensor, ...]
    saved: Any
    depends_on: tuple[Tensor | None, ...] = ()


def _by_stages(call: Any, backend: str) -> None:
    return None


class Family(NamedTuple):
    """What `differentiable` was given."""

    call_type: Any
    saved_type: Any
    compute: Callable[[Any, Tensor, Any, Any], Computed]
    gradients: Callable[..., dict[str, Any]]
    constant: int | None


class Kind(NamedTuple):
    """What a call's backward pass knows of it besides tensors.

    Args:
        backend: Name of the backend that ran it.
        options: The call's.
        shape: Of its x.
        need: For each field of the call, whether its gradient is wanted.
        wanted: For each field the dtype of its gradient, None where none is wanted.
    """

    backend: str
    options: Any
    shape: torch.Size
    need: tuple[bool, ...]
    wanted: tuple[torch.dtype | None, ...]


def kind_of(backend: str, inputs: Sequence[Any], need: tuple[bool, ...]) -> Kind:
    """Return the kind of a call of these fields."""
    wanted = tuple([value.dtype if wanted else None for value, wanted in zip(inputs, need, strict=True)])
    return Kind(backend, inputs[-1], inputs[0].shape, need, wanted)


def differentiable(
    name: str,
    call_type: Any,
    saved_type: Any,
    compute: Callable[[Any, Tensor, Any, Any], Computed],
    gradients: Callable[..., dict[str, Any]],
    constant: int | None = None,
    direct: Callable[[Any, str], Tensor | None] = _by_stages,
) -> type[torch.autograd.Function]:
    """Make the autograd Function of a family; its inputs are the name of a backend and the fields
    of a call.

    Args:
        name: Of the Function, which profilers and graphs show.
        call_type: NamedTuple of the tensors of a call, `options` last.
        saved_type: NamedTuple of the tensors that are kept.
        compute: (call, x, need, stages) → `Computed`; x is the call's in its compute dtype, `need`
            a call_type of booleans: whose gradient is wanted.
        gradients: (options, need, saved, stages, *douts) → field name → gradient, of all that
            `need` names.
        constant: Place of the output that has no gradient, if there is one.
        direct: (call, backend) → the one output of a call that needs no stages; None of any other.
    """
    family = Family(call_type, saved_type, compute, gradients, constant)

    def computed(backend: str, inputs: tuple[Any, ...], need: tuple[bool, ...]) -> Computed:
        return _computed(family, inputs, need, backend)

    def forward(ctx: Any, backend: str, *inputs: Any) -> Any:
        ctx.kind = kind_of(backend, inputs, ctx.needs_input_grad[1:])
        outputs, saved, ctx.depends_on = _computed(family, inputs, ctx.kind.need, backend)
        ctx.stored = None
        if _is_stored(inputs[1]):  # a base that backward makes dense again
            ctx.stored, saved = saved.weight, saved._replace(weight=None)
        ctx.save_for_backward(*saved)
        if constant is not None:
            ctx.mark_non_differentiable(outputs[constant])
        return outputs if len(outputs) > 1 else outputs[0]

    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        return None, *input_gradients(family, ctx.kind, ctx.stored, ctx.saved_tensors, douts, ctx.depends_on)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    methods |= {"family": family, "computed": staticmethod(computed), "direct": staticmethod(direct)}
    return type(name, (torch.autograd.Function,), methods)


def input_gradients(
    family: Family, kind: Kind, stored: Any, saved: Any, douts: Any, depends_on: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradient of each field of a call, None where none is wanted; differentiated again
    they raise.

    Args:
        family, kind: The call's.
        stored: The stored base that stands for its weight, or None.
        saved: What was kept.
        douts: The outputs' gradients.
        depends_on: As `Computed` says.
    """
    if not torch.is_grad_enabled():
        return _in_their_dtypes(family, kind, stored, saved, douts)
    with torch.no_grad():
        grads = _in_their_dtypes(family, kind, stored, saved, douts)
    return refuse_second_derivatives(kind.options.method, grads, (*douts, *saved, *depends_on))


def _in_their_dtypes(
    family: Family, kind: Kind, stored: Any, saved: Any, douts: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    batched = not torch.compiler.is_compiling() and any(map(is_batched, douts))
    stages = ops.registered(kind.backend) if batched else ops.stages(kind.backend, (*douts, *saved))
    call_type, saved_type, o, shape = family.call_type, family.saved_type, kind.options, kind.shape

    def found() -> tuple[Tensor | None, ...]:
        kept = saved_type(*saved) if stored is None else saved_type(*saved)._replace(weight=stored)
        grad = family.gradients(o, call_type(*kind.need), kept, stages, *douts)
        if kind.need[0] and len(shape) > 2:
            grad["x"] = grad["x"].view(shape)
        fields = zip(call_type._fields, kind.wanted, strict=True)
        return tuple([None if dtype is None else _cast(grad[field], dtype) for field, dtype in fields])

    key = None if stored is not None else partial(backward_key, family, kind)
    grads: tuple[Tensor | None, ...] = done(found, key, (*saved, *douts), stages, douts[0].device.type)
    return grads


def run(function: Any, call: Any, backend: str, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Run a call: its outputs, the first one with x's leading dimensions, differentiable once where
    a tensor is.

    Args:
        function: What `differentiable` made.
        call: The call.
        backend: Name of the backend that takes it.
        shape: Of x as it came, [..., K].
    """
    y = function.direct(call, backend)
    if y is not None:
        return (in_shape(y, shape),)
    if torch.is_grad_enabled() and any_requires_grad(call):
        outputs = function.apply(backend, *call)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    else:
        outputs = function.computed(backend, tuple(call), (False,) * len(call)).outputs
    y = outputs[0]
    return outputs if len(shape) == 2 else (in_shape(y, shape), *outputs[1:])


def in_shape(y: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an output with x's leading dimensions; made without gradients it is no view: into one
    nothing that requires them could be written.
    """
    if y.dim() == len(shape):
        return y
    size = (*shape[:-1], y.shape[-1])
    shaped: Tensor = y.view(size) if torch.is_grad_enabled() else torch.ops.aten._unsafe_view(y, size)
    return shaped


def unseen() -> bool:
    """Whether nobody sees, changes or records what torch computes now."""
    return not (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or _C._get_tracing_state() is not None
        or _C._len_torch_dispatch_stack() > 0
        or _C._len_torch_function_stack() > 0
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def any_requires_grad(values: Iterable[Any]) -> bool:
    """Return whether one of `values` is a tensor that requires grad."""
    for value in values:  # noqa: SIM110, a generator is another frame
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


def _computed(family: Family, inputs: tuple[Any, ...], need: tuple[bool, ...], backend: str) -> Computed:
    """Compute with autocast off: a call's options, the last of the inputs, hold every dtype."""
    tensors, o = inputs[:-1], inputs[-1]
    stored = _is_stored(inputs[1])
    if stored:
        tensors = tensors[:1] + tensors[2:]
    stages = ops.stages(backend, tensors)

    def found() -> Computed:
        call_type = family.call_type
        return family.compute(call_type(*inputs), _cast(inputs[0], o.compute_dtype), call_type(*need), stages)

    key = None if stored else partial(forward_key, family, backend, o, need)
    computed: Computed = done(found, key, tensors, stages, inputs[0].device.type)
    return computed


def forward_key(family: Family, backend: str, o: Any, need: tuple[bool, ...]) -> tuple[Any, ...]:
    """Return all that decides what a forward pass does, besides its tensors."""
    return family.compute, backend, o, need, products_in_tf32(o)


def backward_key(family: Family, kind: Kind) -> tuple[Any, ...]:
    """Return all that decides what a backward pass does, besides its tensors."""
    return family.gradients, kind, products_in_tf32(kind.options)


def products_in_tf32(o: Any) -> bool:
    """Whether a call's rank-space products may be made as tf32 now."""
    return o.rank_dtype == torch.float32 and allow_tf32()


def done(
    function: Callable[[], Any],
    key: Callable[[], tuple[Any, ...]] | None,
    inputs: tuple[Any, ...],
    stages: Any,
    device: str,
) -> Any:
    """Return what the function does with autocast off: replayed where that is known, and the
    backend's launches can be.

    Args:
        function: Runs a family's `compute` or `gradients`.
        key: Says which of them, the backend, the call's options, whose gradient is wanted; None:
            what the function does is no matter of these and its tensors alone.
        inputs: Every tensor that the function works on.
        stages: The ops that it runs.
        device: Type of the tensors' device.
    """
    begin = getattr(stages, "begin", None) if tape.enabled and key is not None else None
    if begin is None or key is None:
        return without_autocast(device, function)
    return without_autocast(device, tape.run, begin, key(), inputs, function)


def without_autocast(device: str, work: Callable[..., Any], *given: Any) -> Any:
    """Return work(*given), with autocast off."""
    if not torch.is_autocast_enabled(device):
        return work(*given)
    if torch.compiler.is_compiling():
        with torch.autocast(device, enabled=False):
            return work(*given)
    torch.set_autocast_enabled(device, False)  # the context manager takes as long as two launches
    try:
        return work(*given)
    finally:
        torch.set_autocast_enabled(device, True)


def _is_stored(weight: Any) -> bool:
    """Whether a call's second field is a base that is made dense once a pass."""
    return weight is not None and not isinstance(weight, Tensor)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tensor.to(dtype), without the cost of a call that does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


_LOW_RANK = ("lora_linear", "dora_linear", "delora_linear")
"""What accelerate() puts into a model; the library's own PEFT methods have no other forward to go
back to.
"""

is_batched = torch._C._functorch.is_legacy_batchedtensor
"""Whether a tensor is the batch of `is_grads_batched=True` or `vectorize=True`: registered ops run
for each of it.
"""


class _SecondDerivative(torch.autograd.Function):
    """The gradients as they are; differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, method: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.method = method
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        restore = ", or restore() the model if accelerate() fused it" if ctx.method in _LOW_RANK else ""
        raise RuntimeError(
            f"{ctx.method} has no second derivative: its gradients can't be differentiated again; "
            f"use delora_kernels.reference.{ctx.method} there{restore}"
        )


def refuse_second_derivatives(
    method: str, grads: tuple[Tensor | None, ...], depends_on: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Tie the gradients to all they were computed from, by a node that raises, wherever
    differentiation enters.
    """
    wanted = [grad for grad in grads if grad is not None]
    tied = iter(_SecondDerivative.apply(method, len(wanted), *wanted, *(t for t in depends_on if t is not None)))
    return tuple(None if grad is None else next(tied) for grad in grads)
