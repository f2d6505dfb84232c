"""How far a result is from the truth, and how far it may be. The tolerance is derived from the problem, never tuned.

    limit = 2 · e + ULPS · ε · (1 + κ)

    e   the error of eager PyTorch on the same inputs in the same dtypes, against the float64 oracle: a fused kernel
        rounds in other places than eager PyTorch but has no reason to be more than twice as far off
    ε   `torch.finfo(...).eps` of the dtype in which eager PyTorch holds this result, or in which the result itself
        comes if that is coarser: what two correctly rounded results may differ by
    κ   how many ε this result moves when every input moves by one ε. A sum that cancels (dλ is one) has κ ≫ 1: there e
        is a matter of luck, and a single rounding anywhere shows κ-fold

In float64 the oracle itself rounds as the code under test does. Rounding errors are proportional to ε, so e is measured
in float32 and scaled to float64, and it counts once more for the oracle.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from delora_kernels.testing.errors import relative_error
from delora_kernels.testing.poison import uninitialised_is_nan

ULPS = 2
"""Roundings of a result, in ε, that are granted on top of twice eager's error."""

_NUDGE = 2.0**-26
"""Relative step of the finite difference that gives κ: the middle of float64's 52 bits."""

_DIRECTIONS = 4
"""Random directions in which the inputs are moved; κ is the largest change."""

Inputs = Mapping[str, Any]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One computation, its inputs, and three ways to do it.

    Args:
        name: What is computed.
        inputs: Arguments by name: tensors, and anything else as it is.
        run: The code under test: inputs → results by name.
        eager: The same by eager PyTorch, in the inputs' dtypes.
        oracle: The same by eager PyTorch, called with every float tensor in float64 on the CPU.
        dtypes: The dtype in which each result must come.
        vector_dims: For results whose vectors stand alone, the dimension of the vectors (see `relative_error`).
    """

    name: str
    inputs: Inputs
    run: Callable[[Inputs], Outputs]
    eager: Callable[[Inputs], Outputs]
    oracle: Callable[[Inputs], Outputs]
    dtypes: Mapping[str, torch.dtype]
    vector_dims: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """The error of one result.

    Args:
        what: Name of the result.
        error: See `relative_error`; ∞ where something other than a number is wrong.
        limit: The largest error that passes.
        note: What is wrong where it is not a number; else empty.
    """

    what: str
    error: float
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def measure(problem: Problem) -> list[Measurement]:
    """Run a problem, with uninitialised memory poisoned, and compare every result with the oracle.

    Args:
        problem: What to run.

    Returns:
        One measurement for each result of the oracle, and one for each result that should not be there.

    Raises:
        ValueError: eager PyTorch itself overflows on these inputs, so there is nothing to compare with.
    """
    exact = moved(problem.inputs, torch.float64, "cpu")
    expected = problem.oracle(exact)
    limits = _limits(problem, exact, expected)
    with uninitialised_is_nan():
        got = problem.run(problem.inputs)
    measurements = []
    for what in expected | got:
        note = _what_is_wrong(got.get(what), expected.get(what), problem.dtypes.get(what))
        error = torch.inf if note else relative_error(got[what], expected[what], problem.vector_dims.get(what))
        if not note and error == torch.inf:
            note = "NaN or Inf in places where the oracle has none, or the reverse"
        measurements.append(Measurement(what, error, limits.get(what, 0.0), note))
    return measurements


def _what_is_wrong(got: Tensor | None, expected: Tensor | None, dtype: torch.dtype | None) -> str:
    if got is None:
        return "missing"
    if expected is None:
        return "not asked for"
    if got.shape != expected.shape:
        return f"shape {list(got.shape)} instead of {list(expected.shape)}"
    return "" if got.dtype == dtype else f"{got.dtype} instead of {dtype}"


def _limits(problem: Problem, exact: Inputs, expected: Outputs) -> dict[str, float]:
    in_float64 = all(value.dtype == torch.float64 for value in problem.inputs.values() if _is_float(value))
    if in_float64:
        single = moved(problem.inputs, torch.float32)
        eager = problem.eager(single)
        eager_error = _errors(problem, eager, problem.oracle(moved(single, torch.float64, "cpu")))
    else:
        eager = problem.eager(problem.inputs)
        eager_error = _errors(problem, eager, expected)
    kappa = _kappa(problem, exact, expected)
    limits = {}
    for what, error in eager_error.items():
        if error == torch.inf:
            raise ValueError(f"{problem.name}: eager PyTorch gives NaN or Inf in {what}; take smaller inputs")
        if in_float64:
            error, eps = 1.5 * error * _eps(torch.float64) / _eps(torch.float32), _eps(torch.float64)
        else:
            eps = max(_eps(eager[what].dtype), _eps(problem.dtypes[what]))
        limits[what] = 2 * error + ULPS * eps * (1 + kappa[what])
    return limits


def _kappa(problem: Problem, exact: Inputs, expected: Outputs) -> dict[str, float]:
    """The largest change of every result, in units of the relative change of the inputs."""
    generator = torch.Generator().manual_seed(0)
    kappa = dict.fromkeys(expected, 0.0)
    for _ in range(_DIRECTIONS):
        nudged = dict(exact)
        for name, value in exact.items():
            if _is_float(value):
                signs = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
                nudged[name] = value * (1 + _NUDGE * signs)
        for what, change in _errors(problem, problem.oracle(nudged), expected).items():
            kappa[what] = max(kappa[what], change / _NUDGE)
    return kappa


def _errors(problem: Problem, got: Outputs, expected: Outputs) -> dict[str, float]:
    return {what: relative_error(got[what], expected[what], problem.vector_dims.get(what)) for what in expected}


def moved(inputs: Inputs, dtype: torch.dtype, device: str | None = None) -> dict[str, Any]:
    """The inputs with every float tensor, and every argument that is a dtype, in `dtype`; all tensors on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if _is_float(value) else None)

    return {name: move(value) for name, value in inputs.items()}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
