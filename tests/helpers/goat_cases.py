"""The golden vectors tests/golden/goat_*: GOAT's own layer, in float64, as calls of
`moe_lora_linear`.
"""

import dataclasses
import functools
import json
from typing import Any

import torch
from golden_cases import FOLDER, read
from torch import Tensor

BALANCE_COEF = 0.01
"""Of the results `*_with_balance`."""


@dataclasses.dataclass(frozen=True)
class GoatCase:
    """One layer, its start and its results.

    Args:
        name: The file's name without its ending.
        arguments: Keyword arguments of the call; the weight is the residual one.
        results: What the source computed, by the name in the file.
        zero: Results that vanish in exact arithmetic and are rounding noise in the file.
        weight0, A_init, B_init: The layer before the initialisation, and the factors that it made.
        scaling: One for each expert.
        init_cof: The part of the experts' sum that the weight lost.
    """

    name: str
    arguments: dict[str, Any]
    results: dict[str, Tensor]
    zero: tuple[str, ...]
    weight0: Tensor
    A_init: Tensor
    B_init: Tensor
    scaling: list[float]
    init_cof: float

    def __str__(self) -> str:
        return self.name.removeprefix("goat_official_")


@functools.cache
def goat_cases() -> tuple[GoatCase, ...]:
    """All cases, sorted by name."""
    return tuple(_read(path) for path in sorted(FOLDER.glob("goat_*.safetensors")))


def _read(path: Any) -> GoatCase:
    metadata, data = read(path)
    arguments: dict[str, Any] = {name: data.pop(name) for name in ("x", "weight", "A", "B", "router")}
    arguments |= {"bias": data.pop("bias", None), "scale": data.pop("scaling"), "top_k": int(metadata["top_k"])}
    start = {name: data.pop(name) for name in ("weight0", "A_init", "B_init")}
    E = len(arguments["B"])
    zero = ("drouter",) if arguments["top_k"] == 1 else ("drouter_balance",) if arguments["top_k"] == E else ()
    scaling, init_cof = json.loads(metadata["scaling"]), float(metadata["init_cof"])
    return GoatCase(path.stem, arguments, data, zero, **start, scaling=scaling, init_cof=init_cof)


def goat_results(function: Any, case: GoatCase) -> dict[str, Tensor]:
    """Every result in the file that a call has, computed with `function`."""
    names = ("x", "A", "B", "router")
    leaves = {name: case.arguments[name].clone().requires_grad_() for name in names}
    y, stats = function(**case.arguments | leaves)
    loss, balance = (y * case.results["grad_out"]).sum(), stats.balance_loss("code")
    found = {"out": y, "balance_loss": balance.reshape(1)}
    for suffix, total, wanted in (
        ("", loss, names),
        ("_with_balance", loss + BALANCE_COEF * balance, ("x", "router")),
        ("_balance", balance, ("router",)),
    ):
        grads = torch.autograd.grad(total, [leaves[name] for name in wanted], retain_graph=True)
        found |= {f"d{name}{suffix}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def goat_errors(function: Any, case: GoatCase) -> dict[str, float]:
    """The relative error of every result; of those that are zero the absolute one, over the largest
    of dx.
    """
    errors = {}
    for name, got in goat_results(function, case).items():
        if name in case.zero or (name == "drouter_with_balance" and "drouter" in case.zero):
            size = case.results["dx"].abs().max()
        else:
            size = case.results[name].abs().max()
        errors[name] = float((got - case.results[name]).abs().max() / size)
    return errors
