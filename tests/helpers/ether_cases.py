"""The golden vectors tests/golden/ether*: the authors' own layers, in float64, as calls of the
ETHER functions.
"""

import dataclasses
import functools
from typing import Any

import torch
from golden_cases import FOLDER, read, relative_error
from torch import Tensor

NAMES = {
    "input": {"R": "u", "R2": "v"},
    "output": {"R": "u_out", "R2": "v_out"},
    "both": {"R": "u", "R2": "v", "R3": "u_out", "R4": "v_out"},
}
"""Side → the source's parameters by our names."""


@dataclasses.dataclass(frozen=True)
class EtherCase:
    """One layer and its results.

    Args:
        name: The file's name without its ending.
        function: "ether_linear", "ether_plus_linear" or "ether_qkv_linear".
        arguments: Keyword arguments of the call.
        grad_out: Gradient that enters backward.
        output: y.
        grads: Gradients by argument name.
        weight_merged: W' as the source merges it, or None.
    """

    name: str
    function: str
    arguments: dict[str, Any]
    grad_out: Tensor
    output: Tensor
    grads: dict[str, Tensor]
    weight_merged: Tensor | None

    def __str__(self) -> str:
        return self.name


@functools.cache
def ether_cases() -> tuple[EtherCase, ...]:
    """All cases, sorted by name."""
    return tuple(_read(path) for path in sorted(FOLDER.glob("ether*.safetensors")))


def _read(path: Any) -> EtherCase:
    metadata, data = read(path)
    data = {name: value if value.is_floating_point() else value.long() for name, value in data.items()}
    qkv = "qkv" in path.name
    names = {"R": "u"} if qkv else NAMES[metadata["side"]]
    grad_out, output, merged = data.pop("grad_out"), data.pop("out"), data.pop("weight_merged", None)
    grads = {names.get(name[1:], name[1:]): data.pop(name) for name in list(data) if name.startswith("d")}
    arguments: dict[str, Any] = {names.get(name, name): value for name, value in data.items()}
    if not qkv:
        arguments["blocks"] = "official" if "official_row_group" in metadata["block_semantics_key"] else "paper"
    plus = not grads.keys().isdisjoint(("v", "v_out"))
    function = "ether_qkv_linear" if qkv else "ether_plus_linear" if plus else "ether_linear"
    return EtherCase(path.stem, function, arguments, grad_out, output, grads, merged)


def ether_errors(function: Any, case: EtherCase) -> dict[str, float]:
    """The relative error of y and of every gradient that `function` gives for the case."""
    leaves = {name: case.arguments[name].clone().requires_grad_() for name in case.grads}
    y = function(**case.arguments | leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad_out)
    errors = {name: relative_error(grad, case.grads[name]) for name, grad in zip(leaves, grads, strict=True)}
    return errors | {"y": relative_error(y, case.output)}
