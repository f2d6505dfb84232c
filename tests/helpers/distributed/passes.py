"""One pass and step of that model: plain PEFT's results in one process, those of two, and a count
of fused calls.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from delora_kernels.autograd import function
from distributed.blocks import LAYERS, batch, blocks


def backward(made: nn.Module, x: Tensor, share: float = 1.0) -> dict[str, Tensor]:
    """The output of one pass; the gradients of its mean square, times `share`, are added to
    .grad.
    """
    y = made(x)
    (y.square().mean() * share).backward()
    return {"y": whole(y)}


def optimizer_step(made: nn.Module) -> None:
    """One step of AdamW; its large eps keeps it smooth where a gradient is nothing but rounding."""
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    torch.optim.AdamW(trained, lr=0.1, eps=1e-2, foreach=False).step()


def check_step(made: nn.Module, stepped: dict[str, Tensor]) -> None:
    """A step of AdamW leads to these parameters."""
    optimizer_step(made)
    assert_close(parameters(made), stepped)


@functools.cache
def single_process(method: str, seed: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradients and stepped parameters of plain PEFT in one process on the whole batch."""
    made = blocks(method, seed)
    y = backward(made, batch(seed))["y"]
    grads = gradients(made)
    optimizer_step(made)
    assert len(grads) == LAYERS * (2 if method == "lora" else 3)
    return y, grads, parameters(made)


def gradients(made: nn.Module) -> dict[str, Tensor]:
    """The gradient of each trained parameter, whole, by the name it has without wrappers."""
    return {
        _plain(name): whole(parameter.grad)
        for name, parameter in made.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


def parameters(made: nn.Module) -> dict[str, Tensor]:
    """Each trained parameter, whole, by the name it has without wrappers."""
    return {_plain(name): whole(parameter) for name, parameter in made.named_parameters() if parameter.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """A copy of `tensor`, gathered from the ranks where it is a DTensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def _plain(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.")


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Each tensor within 64 roundings of its largest element: two chains of six layers, a few
    roundings in each.

    DeLoRA's λ are measured together: one alone may be small because the terms it sums up cancel.
    """
    assert ours.keys() == theirs.keys()
    lambdas = max((value.abs().max() for name, value in theirs.items() if "delora_lambda" in name), default=0)
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        scale = lambdas if "delora_lambda" in name else value.abs().max()
        error = (ours[name].double() - value.double()).abs().max() / scale
        assert error <= 64 * torch.finfo(dtype).eps, (name, error)


@contextlib.contextmanager
def fused_calls() -> Iterator[list[str]]:
    """The fused calls that are made inside, each by the name of its function."""
    calls: list[str] = []
    run = function.run

    def counted(kind: Any, call: Any, *rest: Any) -> tuple[Tensor, ...]:
        calls.append(call.options.method)
        return run(kind, call, *rest)

    function.run = counted
    try:
        yield calls
    finally:
        function.run = run
