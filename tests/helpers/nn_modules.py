"""The adapter modules of every kind, made and trained at random, and what the reference says they
compute.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from delora_kernels import checks, reference
from delora_kernels.nn import AdapterLinear, DeLoRALinear, DoRALinear, LoRALinear

FROZEN = {"frozen_A", "frozen_B"}
KINDS: dict[str, tuple[type[Any], dict[str, Any], set[str], set[str]]] = {
    # name: class, options of from_linear, parameters beside A and B, buffers
    "lora": (LoRALinear, {"alpha": 3.0}, set(), set()),
    "rslora": (LoRALinear, {"alpha": 3.0, "rslora": True}, set(), set()),
    "dora": (DoRALinear, {"alpha": 3.0}, {"magnitude"}, set()),
    "dora-branch": (DoRALinear, {"rslora": True, "dropout": "branch"}, {"magnitude"}, set()),
    "dora-output": (DoRALinear, {"saved": "output"}, {"magnitude"}, set()),
    "delora": (DeLoRALinear, {"lam": 2.0}, {"lam"}, {"weight_norm"}),
    "delora-live": (DeLoRALinear, {"lam": 2.0, "start": "frozen_live"}, {"lam"}, {"weight_norm", *FROZEN}),
    "delora-paper": (
        DeLoRALinear,
        {"lam": 0.5, "start": "frozen_paper", "weight_norm": "frobenius"},
        {"lam"},
        {"weight_norm", "frozen_lam", *FROZEN},
    ),
}
EPS = {dtype: torch.finfo(dtype).eps for dtype in checks.FLOATS}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", checks.FLOATS, ids=str)


def make(kind: str, dtype: torch.dtype = torch.float64, trained: bool = True, **options: Any) -> tuple[Any, nn.Linear]:
    """A module of a kind, with its adapter moved away from the start if `trained`, and the linear
    it was made from.
    """
    cls, own, _, _ = KINDS[kind]
    linear = nn.Linear(14, 10, bias=kind != "dora-output").to(dtype)
    module = cls.from_linear(linear, 3, **own | options)
    if trained:
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return module, linear


class Oracle(NamedTuple):
    """What the reference makes of an unmerged module: its function of x, the float64 leaves of
    that, and W'.
    """

    linear: Callable[[Tensor], Tensor]
    leaves: dict[str, Tensor]
    weight: Tensor


def oracle(module: AdapterLinear, mask: Tensor | None = None) -> Oracle:
    """The module's tensors, in float64, as arguments of the reference."""
    name = {LoRALinear: "lora", DoRALinear: "dora", DeLoRALinear: "delora"}[type(module)]
    arguments = {name: value.detach().clone().double() for name, value in module.state_dict().items()}
    leaves = {k: v.requires_grad_() for k, v in arguments.items() if k in ("A", "B", "magnitude", "lam")}
    bias = arguments.pop("bias", None)
    if isinstance(module, DeLoRALinear):
        arguments["eps"] = 1e-4 if module.start == "zero" else 0.0
    else:
        arguments["scale"] = module.alpha / (math.sqrt(module.r) if module.rslora else module.r)
    rest = {"bias": bias, "dropout_mask": mask} | ({"dropout": module.dropout} if name == "dora" else {})
    weight = getattr(reference, f"{name}_weight")(**arguments).detach()
    return Oracle(lambda x: getattr(reference, f"{name}_linear")(x, **arguments, **rest), leaves, weight)
