"""The ops of ops.py as problems: a backend's op against its formula.

A new op is one formula in formulas.py and one entry of `OPS` in cases.py.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.testing.dropout import dropout_masks
from delora_kernels.testing.ops import formulas
from delora_kernels.testing.ops.cases import OPS, OpDraw, arguments
from delora_kernels.testing.problem import Inputs, Outputs, Problem


def op_problems(
    name: str,
    T: int,
    K: int,
    N: int,
    R: int,
    *,
    backend: str,
    dtype: torch.dtype = torch.float32,
    rank_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Iterator[Problem]:
    """Every variant of an op with random arguments.

    Args:
        name: A key of `OPS`.
        T: Tokens.
        K: In-features.
        N: Out-features.
        R: Rank.
        backend: Name of the backend that runs the op.
        dtype: Of x, weight, bias, y and their gradients.
        rank_dtype: Of the factors and every [T, R] tensor; None: `dtype`.
        device: Where the tensors live.
        seed: Of the numbers and of dropout masks.
    """
    draw, _ = OPS[name]
    for inputs in draw(OpDraw(T, K, N, R, dtype, rank_dtype or dtype, device, seed)):
        if inputs.get("seed") is not None:
            width = next(inputs[matrix].shape[-1] for matrix in ("x", "weight") if inputs.get(matrix) is not None)
            inputs["mask"] = dropout_masks(T, width, inputs["dropout_p"], inputs["seed"], backend)
        eager = partial(_eager, name, torch.promote_types(dtype, rank_dtype or dtype))
        dtypes = _dtypes(name, inputs, backend)
        passed = _through(name, inputs, dtype, dtypes)
        yield Problem(name, inputs, partial(_run, name, backend), eager, partial(_naive, name), dtypes, passed)


def _through(name: str, inputs: Inputs, dtype: torch.dtype, dtypes: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Return the results that come by way of a tensor in a coarser dtype, by contract, and that
    dtype.
    """
    if name == "project_route":
        return dict.fromkeys(("w", "probability", "z"), dtypes["h"])  # by logits
    if name == "expand_backward" and "x" in inputs:
        return {"dm": dtype}  # by the product x Wᵀ that the forward pass kept
    return {}


def _run(name: str, backend: str, inputs: Inputs) -> Outputs:
    """Return the op itself; what was not asked for has size 0 and is left out."""
    values = dict(inputs)
    if name == "expand_backward" and "x" in inputs:
        _, values["kept"] = ops.expand(*_expand_arguments(inputs, inputs["seed"]), backend)
    results = getattr(ops, name)(*arguments(name, values), backend)
    return {what: result for what, result in _named(name, results).items() if result.numel() > 0}


def _naive(name: str, inputs: Inputs) -> Outputs:
    """Return the formula, with the mask in the place of the seed."""
    values = dict(inputs) | {"seed": inputs.get("mask")}
    if name == "expand_backward" and "x" in inputs:
        _, values["kept"] = formulas.expand(*_expand_arguments(inputs, inputs.get("mask")))
    results = getattr(formulas, name)(*arguments(name, values))
    return {what: result for what, result in _named(name, results).items() if result is not None}


def _eager(name: str, widest: torch.dtype, inputs: Inputs) -> Outputs:
    """Return the formula as eager PyTorch computes it: no tensor is wider than the widest that a
    user passes in.
    """
    single = torch.float32 if widest == torch.float64 else widest  # float64 problems are measured in float32

    def narrow(value: Any) -> Any:
        wider = isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > single.itemsize
        return value.to(single) if wider else value

    return _naive(name, {key: narrow(value) for key, value in inputs.items()})


def _dtypes(name: str, inputs: Inputs, backend: str) -> dict[str, torch.dtype]:
    """Return the dtypes that the op's fake, the contract, promises."""
    values = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in inputs.items()}
    results = getattr(ops, name)(*arguments(name, values), backend)
    return {what: result.dtype for what, result in _named(name, results).items()}


def _expand_arguments(inputs: Inputs, seed: Tensor | None) -> list[Any]:
    """Return expand's arguments for the tensor that it keeps."""
    values = dict(inputs) | {"bias": None, "scaled": None, "keep": True, "seed": seed}
    return arguments("expand", values)


def _named(name: str, results: Any) -> dict[str, Any]:
    results = results if isinstance(results, tuple | list) else (results,)
    return {what: result for what, result in zip(OPS[name][1], results, strict=True) if what is not None}
