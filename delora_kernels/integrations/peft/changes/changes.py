"""weight_changes: walks a model and measures every layer whose weight training has changed.

Of a layer with adapters W is its frozen base and W' what it computes; of one that trains itself W
is what a snapshot holds, or PEFT's own copy of a module in `modules_to_save`.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.integrations.peft.changes.adapted import Adapted, Left, adapted
from delora_kernels.integrations.peft.changes.measure import AXES, measured
from delora_kernels.integrations.peft.changes.report import LayerChange, LeftOut, WeightChanges
from delora_kernels.integrations.peft.changes.weights import base_name, is_known, matrix_of
from delora_kernels.nn.base import MergeableLinear

_NAME = "weight_changes"
_UNKNOWN_START = "it trains, and what it was is not known: pass since"


def weight_changes(
    model: nn.Module, *, since: Mapping[str, Tensor] | None = None, step: int | None = None, axis: str = "output"
) -> WeightChanges:
    """Measure how far training has moved lengths and directions of a model's weights.

        ΔM = mean_k |‖w'_k‖ − ‖w_k‖|,   ΔD = mean_k (1 − cos(w'_k, w_k)),   ‖W' − W‖_F / ‖W‖_F

        print(dk.weight_changes(model))          # one row a layer

        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        ...                                      # full fine-tuning
        print(dk.weight_changes(model, since=start))

    W' is what a layer computes with its active adapters, dropout aside: PEFT's LoRA, rsLoRA, DoRA
    (on linears, convolutions, embeddings, experts in one parameter, bases in few bits) and DeLoRA,
    accelerated or not, ETHER and ETHER+, the modules of `delora_kernels.nn`, and what PEFT trains
    whole (`modules_to_save`). Mixtures of experts have another W' for every token: they are named
    in `left`, with their reason, as is every layer that can't be read. Nothing is written to the
    model. A few rows of one layer are there in float64 at a time; of a base in few bits, or under
    reflections, one dense weight.

    Args:
        model: The model, wrapped or not.
        since: W of some or all layers: a state dict of the model, with its adapters or before it
            had any. Then every weight in it that trains is measured too, and what is merged.
            None: W is the base of the adapters.
        step: What the rows say of the step; of several reports `+` makes one.
        axis: Which vectors have a length and a direction: "output", one for each output feature,
            the rows of nn.Linear's weight, as the code of DoRA's authors, PEFT's and this library
            take norms; or "input", its columns, as the paper's text has it.

    Returns:
        `WeightChanges`: `print` it, or ask for `to_dict()`, `correlation()`, `table()`,
        `plot(path)`.

    Raises:
        TypeError: `model` is no module, `since` no mapping, or `step` no int.
        ValueError: `axis` is another word, or there is nothing to measure.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), section
    3.2, eqs. 3 and 4.
    """
    if not isinstance(model, nn.Module):
        raise checks.fail(TypeError, _NAME, "model", "a torch.nn.Module", type(model).__name__, "pass the model")
    if since is not None and not isinstance(since, Mapping):
        remedy = "pass a state dict, or {name: p.detach().clone() for name, p in model.named_parameters()}"
        raise checks.fail(TypeError, _NAME, "since", "a mapping of names to tensors", type(since).__name__, remedy)
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise checks.fail(
            TypeError, _NAME, "step", "an int or None", type(step).__name__, "pass the number of the step"
        )
    checks.option(_NAME, "axis", axis, AXES)
    start = None if since is None else _under_every_name(model, since)
    rows: list[LayerChange] = []
    left: list[LeftOut] = []
    with ExitStack() as context:
        context.enter_context(torch.no_grad())
        for device in {"cpu", *(parameter.device.type for parameter in model.parameters())} - {"meta"}:
            context.enter_context(torch.autocast(device, enabled=False))
        for name, found in _layers(model, start):
            try:
                for each in found:
                    rows.append(_row(name, each, step, axis))
            except Left as reason:
                left.append(LeftOut(name, str(reason)))
    if not rows and not left:
        got = f"a {type(model).__name__} without adapters" + ("" if since is None else " and without weights of since")
        remedy = "for full fine-tuning pass since, a state dict of the start"
        raise checks.fail(ValueError, _NAME, "model", "one whose weights have changed", got, remedy)
    return WeightChanges(tuple(rows), tuple(left), axis)


def _under_every_name(model: nn.Module, since: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a snapshot by names without adapters and wrappers, a tied weight under all that it
    has: `named_parameters` gives one.
    """
    start = {base_name(name): tensor for name, tensor in since.items()}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(base_name(name))
    for same in names.values():
        held = next((name for name in same if name in start), None)
        if held is not None:
            start |= {name: start[held] for name in same if name not in start}
    return start


def _row(name: str, found: Adapted, step: int | None, axis: str) -> LayerChange:
    numbers = measured(found.before, found.base, found.steps, axis)
    if found.parameter != "weight":
        name = f"{name}.{found.parameter}"
    return LayerChange(name, found.method, found.adapters, found.expert, step, *numbers, found.bound)


Found = Iterator[tuple[str, Iterator[Adapted]]]


def _layers(model: nn.Module, start: Mapping[str, Tensor] | None) -> Found:
    """Yield the layers of a model that may have changed, by their names without adapters, with
    what tells how; a tied weight that trains itself once, by the first of its modules whose class
    is known.
    """
    seen, counted = set[int](), set[int]()
    readable = {id(module._parameters.get("weight")) for module in model.modules() if is_known(module)}

    def visit(module: nn.Module, path: str, is_base: bool = False) -> Found:
        if id(module) in seen:
            return
        seen.add(id(module))
        name = base_name(path)
        if isinstance(module, (BaseTunerLayer, MergeableLinear)):
            yield name, _adapted_since(module, name, start)
            inner: Any = getattr(module, "base_layer", None)
            if inner is not None:
                yield from visit(inner, f"{path}.base_layer", is_base=True)
            return
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from _saved(module, name, start)
            return
        if not is_base:
            for weight, layer in _plain(module, name, start):
                if id(weight) in counted or (id(weight) in readable and not is_known(module)):
                    continue
                counted.add(id(weight))
                yield layer
        for child, each in module.named_children():
            yield from visit(each, f"{path}.{child}" if path else child)

    yield from visit(model, "")


def _adapted_since(layer: Any, name: str, start: Mapping[str, Tensor] | None) -> Iterator[Adapted]:
    for found in adapted(layer, merged_too=start is not None):
        yield found if start is None else _since(found, name, start)


def _since(found: Adapted, name: str, start: Mapping[str, Tensor]) -> Adapted:
    """Return a layer with W from the snapshot."""
    key = f"{name}.{found.parameter}" if name else found.parameter
    if key not in start:
        if found.steps or found.before is not found.base:
            return found  # its own W is as good
        raise Left(f"its adapters do not act, and {key} is not in since")
    given = start[key]
    reason = None if isinstance(given, Tensor) else f"it is a {type(given).__name__}"
    matrix = reason or found.seen(given)
    if isinstance(matrix, str):
        raise Left(f"{key} of since can't be read: {matrix}")
    if matrix.shape != found.base.shape:
        raise Left(f"{key} of since is {list(given.shape)}, which is not what the layer has")
    return found._replace(before=matrix.detach())


def _saved(wrapper: Any, name: str, start: Mapping[str, Tensor] | None) -> Found:
    """Yield the modules that PEFT trains whole beside the adapters."""
    active = [each for each in wrapper.active_adapters if each in wrapper._adapters]
    if not active or wrapper.disable_adapters:
        return
    if not isinstance(wrapper, ModulesToSaveWrapper) or len(active) > 1:
        yield name, _raise(f"{type(wrapper).__name__} is not read")
        return
    for inner, module in wrapper.modules_to_save[active[0]].named_modules():
        full = ".".join(filter(None, (name, inner)))
        if isinstance(module, BaseTunerLayer):
            yield full, _raise("it has adapters in a module that is trained whole")
        elif is_known(module):
            yield full, _copy(module, wrapper.original_module.get_submodule(inner), full, active[0], start)


def _copy(
    module: nn.Module, original: nn.Module, name: str, adapter: str, start: Mapping[str, Tensor] | None
) -> Iterator[Adapted]:
    before, base = matrix_of(original), matrix_of(module)
    for each in (before, base):
        if isinstance(each, str):
            raise Left(each)
    found = Adapted(before, base, [], "full", (adapter,), lambda given: matrix_of(module, given))  # type: ignore[arg-type]
    yield found if start is None or f"{name}.weight" not in start else _since(found, name, start)


def _plain(
    module: nn.Module, name: str, start: Mapping[str, Tensor] | None
) -> Iterator[tuple[Tensor, tuple[str, Iterator[Adapted]]]]:
    """Yield the weights of a module without adapters that train, or have changed, each with what
    `_layers` says of it.
    """
    for own, weight in module.named_parameters(recurse=False):
        key = f"{name}.{own}" if name else own
        known = own == "weight" and is_known(module)
        if (weight.dim() < 2 and not known) or (start is None and not (weight.requires_grad and known)):
            continue  # a bias, a norm's scale
        if start is not None and not weight.requires_grad and (key not in start or _equal(weight, start[key])):
            continue
        told = (name, _trained(module, key, start)) if known else (key, _raise(str(matrix_of(module, weight))))
        yield weight, told


def _trained(module: nn.Module, key: str, start: Mapping[str, Tensor] | None) -> Iterator[Adapted]:
    if start is None:
        raise Left(_UNKNOWN_START)
    if key not in start:
        raise Left(f"{key} is not in since")
    base = matrix_of(module)
    if isinstance(base, str):
        raise Left(base)
    found = Adapted(base, base, [], "full", (), lambda given: matrix_of(module, given))
    yield _since(found, key.removesuffix(".weight") if key != "weight" else "", start)


def _equal(weight: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or other.shape != weight.shape or weight.is_meta:
        return not isinstance(other, Tensor) or weight.is_meta
    return torch.equal(weight.detach(), other.to(weight.device, weight.dtype))


def _raise(reason: str) -> Iterator[Adapted]:
    raise Left(reason)
    yield  # a generator: it raises where it is asked
