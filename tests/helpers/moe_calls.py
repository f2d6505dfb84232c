"""Random float64 calls of `moe_lora_linear`, one variant for each way to gate, and what a function
makes of them.
"""

from typing import Any

import torch
from reference_calls import Maker
from torch import Tensor

from delora_kernels import functional, ops, reference

VARIANTS = ("topk", "topk_plain", "dense", "shared_A", "gates", "adapter_ids", "residual", "dora")
TENSORS = ("x", "weight", "bias", "A", "B", "router", "gates", "scale", "magnitude")
"""Every argument that can get a gradient."""
DROPOUT_P = 0.25


def moe_arguments(maker: Maker, variant: str, T: int = 6, K: int = 7, N: int = 5, r: int = 2, E: int = 4) -> Any:
    """Every argument of `moe_lora_linear`, by name; two experts a token where a router picks."""
    made: dict[str, Any] = {"x": maker.tensor(T, K), "weight": maker.tensor(N, K), "bias": maker.tensor(N)}
    made |= {"A": maker.tensor(E, r, K), "B": maker.tensor(E, N, r), "scale": 0.7}
    if variant == "gates":
        kept = torch.rand(T, E, generator=maker.generator) < 0.7
        return made | {"gates": torch.where(kept, maker.tensor(T, E), 0.0), "scale": maker.tensor(E)}
    if variant == "adapter_ids":  # −1: no adapter
        return made | {"adapter_ids": torch.randint(-1, E, (T,), generator=maker.generator)}
    made["router"] = maker.tensor(E, K) / 2
    if variant in ("topk", "topk_plain", "residual", "dora"):
        made |= {"top_k": min(2, E), "renormalize": variant != "topk_plain"}
    if variant == "shared_A":
        made |= {"A": maker.tensor(r, K)}
    if variant == "dora":
        made |= {"magnitude": maker.tensor(N)}
    if variant in ("residual", "dora"):
        made |= {"frozen_A": maker.tensor(2, r + 1, K), "frozen_B": maker.tensor(2, N, r + 1)}
        made |= {"scale": made["scale"] if variant == "dora" else maker.tensor(E), "residual": maker.tensor(2)}
        made["token_mask"] = torch.rand(T, generator=maker.generator) < 0.7
    return made


def leaves_of(arguments: dict[str, Any], names: Any = TENSORS) -> dict[str, Tensor]:
    """Copies of the named tensors of `arguments` that require grad."""
    present = [name for name in names if isinstance(arguments.get(name), Tensor)]
    return {name: arguments[name].detach().clone().requires_grad_() for name in present}


def free(variant: str) -> tuple[str, ...]:
    """The arguments that finite differences can be taken of: of DoRA's not what its norm, a
    constant in backward, is made of.
    """
    return tuple(name for name in TENSORS if variant != "dora" or name not in ("weight", "A", "B", "scale"))


def losses(found: Any, grad_out: Tensor) -> Tensor:
    """One number that every differentiable result of a call goes into."""
    y, stats = found
    if stats is None:
        return (y * grad_out).sum()
    weights = torch.arange(1.0, 1.0 + len(stats.probability), dtype=stats.probability.dtype)
    return (y * grad_out).sum() + stats.balance_loss("code") + (stats.probability * weights).sum() + 0.3 * stats.z


def results(function: Any, leaves: dict[str, Tensor], grad_out: Tensor) -> dict[str, Tensor]:
    """y, the statistics and every gradient of `losses`, by name."""
    found = function(**leaves)
    y, stats = found
    if stats is None:
        grads = torch.autograd.grad(losses(found, grad_out), list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, grads, strict=True))
    grads = torch.autograd.grad(losses(found, grad_out.to(y.dtype)), list(leaves.values())) if leaves else ()
    values = {"y": y, "fraction": stats.fraction, "probability": stats.probability, "z": stats.z}
    return {name: value.detach() for name, value in values.items()} | dict(zip(leaves, grads, strict=True))


def masks_of(T: int, K: int, E: int, seed: int, kind: str) -> Tensor:
    """The mask that the fused function uses for `seed`, "shared" or "independent"; entries 0 or 1 /
    (1 − p).
    """
    count = 1 if kind == "shared" else E
    kept = [ops.dropout_mask(T, K, DROPOUT_P, torch.tensor(seed + i), "eager") for i in range(count)]
    mask = torch.stack(kept).double() / (1 - DROPOUT_P)
    return mask[0] if kind == "shared" else mask


def both(arguments: dict[str, Any], dropout: str | None, seed: int) -> tuple[Any, Any]:
    """The fused function and the reference as functions of keyword tensors, the rest of `arguments`
    bound.
    """
    x, E = arguments["x"], len(arguments["B"])
    given = {} if dropout is None else {"dropout_p": DROPOUT_P, "dropout": dropout, "seed": seed}
    mask = None if dropout is None else masks_of(x[..., 0].numel(), x.shape[-1], E, seed, dropout)

    def fused(**tensors: Tensor) -> Any:
        return functional.moe_lora_linear(**arguments | tensors | given)

    def specified(**tensors: Tensor) -> Any:
        return reference.moe_lora_linear(**arguments | tensors, dropout_mask=mask)

    return fused, specified
