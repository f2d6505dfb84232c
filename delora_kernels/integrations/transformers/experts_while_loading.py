"""load_with_quantized_experts: a model whose experts go into 4-bit blocks one after the other while
its checkpoint is read, so that they are never there in 16 bits together.

Transformers reads a checkpoint parameter by parameter, makes one of the pieces that belong together
(the experts of a layer) and sets it on its module. torch tells of every parameter that is set
(`register_module_parameter_registration_hook`), and takes another one in its place: here the stored
experts, as soon as a layer's are read. Nothing of Transformers is replaced.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from delora_kernels import checks
from delora_kernels.bases.packed_experts import PackedExperts, Storing
from delora_kernels.integrations.peft.fused.experts_known import why_not_known
from delora_kernels.integrations.transformers.experts_in_4bit import (
    QuantizedExperts,
    checked,
    quantised,
    weights_of,
    why_not_stored,
)

_NAME = "load_with_quantized_experts"
_READ = "_is_hf_initialized"
"""What Transformers writes on a parameter that a checkpoint gave, just before it sets it."""

Model = TypeVar("Model", bound=nn.Module)


def load_with_quantized_experts(
    load: Callable[[], Model],
    quant_type: str = "nf4",
    *,
    blocksize: int = 64,
    workspace_mib: float = 256,
    double_quant: bool = False,
) -> tuple[Model, QuantizedExperts]:
    """Load a model whose experts are stored in 4-bit blocks as soon as each layer's are read.

        load = partial(AutoModelForCausalLM.from_pretrained, folder, dtype="auto")
        model, report = load_with_quantized_experts(load)

    The model is that of `quantize_experts(load())`, bit for bit. Beyond it the experts of one layer
    are there in the loaded dtype, of them gate and up twice where a checkpoint holds each expert's
    matrices by themselves, while they are put together. The files are mapped, and read by one
    thread. Experts that a checkpoint does not have are quantised when the model is loaded.

    Args:
        load: Makes the model: `from_pretrained` of a Transformers class, with its arguments, in
            this thread.
        quant_type, blocksize, workspace_mib, double_quant: As in `quantize_experts`.

    Returns:
        The model, and what was quantised and what was left.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model has no experts that are known.
        ImportError: bitsandbytes is not installed.
    """
    storing = checked(_NAME, quant_type, blocksize, workspace_mib, double_quant)
    if not callable(load):
        remedy = "pass partial(AutoModelForCausalLM.from_pretrained, folder)"
        raise checks.fail(TypeError, _NAME, "load", "a function without arguments", type(load).__name__, remedy)
    with _one_thread_reads(), _stored_when_set(storing):
        model = load()
    if not isinstance(model, nn.Module):
        raise checks.fail(TypeError, _NAME, "load", "one that returns a model", type(model).__name__, "return it")
    late, before, after, names = quantised(model, storing), 0, 0, list[str]()
    seen: set[int] = set()
    for name, module in model.named_modules():
        for each, weight in module._parameters.items():
            if isinstance(weight, PackedExperts):
                names.append(f"{name}.{each}")
                if id(weight) not in seen:
                    before, after = before + weight.numel() * weight.itemsize, after + weight.held_bytes
                seen.add(id(weight))
    if not names and not late.left:
        remedy, got = (
            "load a Transformers model with experts as 3-D parameters",
            f"a {type(model).__name__} without any",
        )
        raise checks.fail(ValueError, _NAME, "load", "one that returns a model with experts", got, remedy)
    return model, QuantizedExperts(tuple(names), late.left, before, after)


@contextmanager
def _stored_when_set(storing: Storing) -> Iterator[None]:
    """Put stored experts in the place of those that this thread reads from a checkpoint."""
    me = threading.get_ident()

    def stored(module: nn.Module, name: str, weight: Any) -> Any:
        if threading.get_ident() != me or not getattr(weight, _READ, False) or not hasattr(module, "has_gate"):
            return None
        if why_not_known(module) or name not in weights_of(module) or why_not_stored(weight, name):
            return None
        with torch.no_grad():
            made = nn.Parameter(PackedExperts.quantised(weight, storing), requires_grad=False)
        setattr(made, _READ, True)
        return made

    handle = register_module_parameter_registration_hook(stored)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _one_thread_reads() -> Iterator[None]:
    """Keep Transformers from reading ahead: its threads would fill the memory with what is still to
    be quantised.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    kept = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if kept is None:
            del os.environ[name]
        else:
            os.environ[name] = kept
