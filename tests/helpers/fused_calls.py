"""The random calls of reference_calls.py made with the fused functions, and what both give."""

from typing import Any

import torch
from golden_cases import relative_error
from reference_calls import function_of
from torch import Tensor

from delora_kernels import functional, ops, reference

DROPOUT_P = 0.25
TENSORS = ("x", "weight", "bias", "A", "B", "magnitude", "lam")
"""Every argument that can get a gradient."""


def mask_of(T: int, K: int, seed: int) -> Tensor:
    """The mask that the fused functions use for `seed`: float64 [T, K] with entries 0 or 1 / (1 −
    p).
    """
    keep = ops.dropout_mask(T, K, DROPOUT_P, torch.tensor(seed), "eager")
    return keep.double() / (1 - DROPOUT_P)


def both(variant: str, arguments: dict[str, Any], dropout_seed: int | None) -> tuple[Any, Any]:
    """The fused function and the reference as functions of keyword tensors, the rest of `arguments`
    bound.

    `arguments` is what Maker.arguments gives; its own dropout mask gives way to the one of
    `dropout_seed`.
    """
    name, bound = function_of(variant), {k: v for k, v in arguments.items() if k != "dropout_mask"}
    x = arguments["x"]
    dropout = {} if dropout_seed is None else {"dropout_p": DROPOUT_P, "seed": dropout_seed}
    mask = None if dropout_seed is None else mask_of(x.numel() // max(1, x.shape[-1]), x.shape[-1], dropout_seed)

    def fused(**tensors: Tensor) -> Tensor:
        y: Tensor = getattr(functional, name)(**bound | tensors, **dropout)
        return y

    def specified(**tensors: Tensor) -> Tensor:
        y: Tensor = getattr(reference, name)(**bound | tensors, dropout_mask=mask)
        return y

    return fused, specified


def leaves_of(arguments: dict[str, Any], names: Any = TENSORS) -> dict[str, Tensor]:
    """Copies of the named tensors of `arguments` that require grad."""
    present = [k for k in names if isinstance(arguments.get(k), Tensor)]
    return {k: arguments[k].detach().clone().requires_grad_() for k in present}


def assert_same(fused: Any, specified: Any, leaves: dict[str, Tensor], grad_out: Tensor) -> None:
    """Same output and gradients to float64 rounding: that of dλ, one sum over all of y (which is
    linear in λ), is a part of its terms' sizes, for the sum itself may cancel.
    """
    results = []
    for function in (fused, specified):
        y = function(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), grad_out) if leaves else ()
        results.append({"y": y.detach()} | dict(zip(leaves, grads, strict=True)))
    ours, theirs = results
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    if "lam" in leaves and grad_out.numel():
        terms = grad_out * (specified(**leaves | {"lam": leaves["lam"] + 1}) - theirs["y"]).detach()
        errors["lam"] = float((ours["lam"] - theirs["lam"]).abs().sum() / terms.abs().sum().clamp_min(1e-300))
    assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}
