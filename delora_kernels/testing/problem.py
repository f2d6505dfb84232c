"""How far a result is from the truth, and how far it may be. The limit is derived from the problem,
never tuned.

    limit = 2 · e + ROUNDINGS · (ε / 2) · (1 + κ)

    e   the error of eager PyTorch in the same dtypes against the float64 oracle: a fused kernel
        rounds in other places but has no reason to be more than twice as far off. It is the largest
        of a few runs whose inputs differ in their last bits, because a single run may be lucky,
        above all where the result is one number
    ε   `torch.finfo(...).eps` of the coarsest dtype that the result passes through: the one in
        which eager PyTorch holds it, its own, or that of a tensor which the contract of the method
        rounds on the way (`Problem.through`)
    κ   by how many ε the result moves when every input moves by one ε: where terms cancel, one
        rounding shows κ-fold

In float64 the oracle rounds as the code under test does, so it gets half as much again. Rounding
errors are proportional to ε: there e is measured in float32 and scaled.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from delora_kernels.testing.errors import relative_error
from delora_kernels.testing.poison import uninitialised_is_nan

ROUNDINGS = 4
"""The stages between an input and a result, of which each may round once more than eager PyTorch
does: the factors are
folded, then come h, y or dv, the small gradient, and the cast to the dtype of the result."""

_STEP = 2.0**-26
"""Relative step of the finite difference that gives κ: the middle of float64's 52 bits."""

_NEIGHBOURS = 4
"""Random directions in which the inputs move, by _STEP for κ and by their last bit for e; the
largest effect counts.
"""

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
        through: Results that pass through a dtype coarser than their own by contract → that dtype.
        vector_dims: For results whose vectors stand alone, the dimension of the vectors (see
            `relative_error`).
    """

    name: str
    inputs: Inputs
    run: Callable[[Inputs], Outputs]
    eager: Callable[[Inputs], Outputs]
    oracle: Callable[[Inputs], Outputs]
    dtypes: Mapping[str, torch.dtype]
    through: Mapping[str, torch.dtype] = field(default_factory=dict)
    vector_dims: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """The error of one result.

    Args:
        what: Name of the result.
        error: See `relative_error`; ∞ where something other than a number is wrong.
        limit: The largest error that passes.
        eager: The error of eager PyTorch on the same inputs; in float64 an estimate.
        note: What is wrong where it is not a number; else empty.
    """

    what: str
    error: float
    limit: float
    eager: float = 0.0
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def measure(problem: Problem, poison: bool = True) -> list[Measurement]:
    """Run a problem, with uninitialised memory poisoned, and compare every result with the oracle.

    Args:
        problem: What to run.
        poison: False: memory is left as it is; poisoning changes settings of the process, for other
            threads too.

    Returns:
        One measurement for each result of the oracle, one for each result that should not be there,
        and one for each input that was written to.

    Raises:
        ValueError: eager PyTorch itself overflows on these inputs, so there is nothing to compare
            with.
    """
    *_, measurements = judged(problem, poison)
    return measurements


def failures(problem: Problem, poison: bool = True) -> list[Measurement]:
    """Return those of `measure` that are not ok, in a part of its time where there is none.

    What a limit is made of adds to it, one run of eager PyTorch or of the oracle after the other:
    as soon as every result is within the limit so far, the rest can't change the verdict.

    Args:
        problem: What to run.
        poison: As in `measure`.
    """
    for measurements in judged(problem, poison):
        if all(m.ok for m in measurements):
            return []
    return [m for m in measurements if not m.ok]


def judged(problem: Problem, poison: bool = True) -> Iterator[list[Measurement]]:
    """Run a problem once, and yield its measurements by limits that grow, the last by the right
    ones; arguments as in `measure`.
    """
    before = {n: value.clone() if isinstance(value, Tensor) else value for n, value in problem.inputs.items()}
    exact = moved(before, torch.float64, "cpu")
    expected = problem.oracle(exact)
    with uninitialised_is_nan() if poison else nullcontext():
        got = problem.run(problem.inputs)
    tensors = [name for name, value in before.items() if isinstance(value, Tensor)]
    written = [name for name in tensors if not torch.equal(before[name], problem.inputs[name])]
    wrong = [Measurement(name, torch.inf, 0.0, note="an input, and it was written to") for name in written]
    found = {what: _error(problem, what, got.get(what), expected.get(what)) for what in expected | got}
    for yardsticks in _yardsticks(problem, before, exact, expected):
        limits = {what: yardsticks.get(what, (0.0, 0.0)) for what in found}
        yield wrong + [Measurement(what, error, *limits[what], note) for what, (error, note) in found.items()]


def _error(problem: Problem, what: str, got: Tensor | None, expected: Tensor | None) -> tuple[float, str]:
    """Return how far a result is off, and where that is no number what is wrong."""
    note = _what_is_wrong(got, expected, problem.dtypes.get(what))
    if note or got is None or expected is None:
        return torch.inf, note
    error = relative_error(got, expected, problem.vector_dims.get(what))
    return error, "NaN or Inf in places where the oracle has none, or the reverse" if error == torch.inf else ""


def _what_is_wrong(got: Tensor | None, expected: Tensor | None, dtype: torch.dtype | None) -> str:
    if got is None:
        return "missing"
    if expected is None:
        return "not asked for"
    if got.shape != expected.shape:
        return f"shape {list(got.shape)} instead of {list(expected.shape)}"
    return "" if got.dtype == dtype else f"{got.dtype} instead of {dtype}"


def _yardsticks(
    problem: Problem, inputs: Inputs, exact: Inputs, expected: Outputs
) -> Iterator[dict[str, tuple[float, float]]]:
    """Yield for every result its limit, and the error of eager PyTorch on the same inputs: first
    the limit of one run of eager PyTorch, then of one neighbour more each time.
    """
    in_float64 = all(value.dtype == torch.float64 for value in inputs.values() if _is_float(value))
    inputs = moved(inputs, torch.float32) if in_float64 else inputs
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if in_float64 else 1.0
    first, dtypes = _eager_errors(problem, inputs, None if in_float64 else expected)
    largest, kappa = dict(first), dict.fromkeys(expected, 0.0)

    def so_far() -> dict[str, tuple[float, float]]:
        yardsticks = {}
        for what, error in first.items():
            passed = (dtypes[what], problem.dtypes[what], problem.through.get(what, problem.dtypes[what]))
            rounding = max(torch.finfo(dtype).eps for dtype in passed) / 2
            limit = 2 * largest[what] + ROUNDINGS * rounding * (1 + kappa[what])
            yardsticks[what] = (scale * limit * (1.5 if in_float64 else 1.0), scale * error)
        return yardsticks

    yield so_far()
    for neighbour in _neighbours(exact, _STEP):  # κ: the largest relative change over that of the inputs
        for what, change in _errors(problem, problem.oracle(neighbour), expected).items():
            kappa[what] = max(kappa[what], change / _STEP)
        yield so_far()
    for neighbour in _neighbours(inputs):
        for what, error in _eager_errors(problem, neighbour)[0].items():
            largest[what] = max(largest[what], error)
        yield so_far()


def _eager_errors(
    problem: Problem, inputs: Inputs, expected: Outputs | None = None
) -> tuple[dict[str, float], dict[str, torch.dtype]]:
    """Return the errors of eager PyTorch on the inputs, of which the oracle gives `expected` if
    that is known, and the dtypes of its results.
    """
    eager = problem.eager(inputs)
    truth = expected if expected else problem.oracle(moved(inputs, torch.float64, "cpu"))
    errors = _errors(problem, eager, truth)
    for what, error in errors.items():
        if error == torch.inf:
            raise ValueError(f"{problem.name}: eager PyTorch gives NaN or Inf in {what}; take smaller inputs")
    return errors, {what: result.dtype for what, result in eager.items()}


def _neighbours(inputs: Inputs, step: float | None = None) -> Iterator[dict[str, Any]]:
    """Return the inputs with every float element moved up or down by chance, by a relative step or
    (None) by ε.
    """
    generator = torch.Generator().manual_seed(0)
    near = {}
    for name, value in inputs.items():
        if _is_float(value):
            signs = torch.randint(0, 2, (_NEIGHBOURS, *value.shape), generator=generator).double() * 2 - 1
            factors = 1 + signs * (torch.finfo(value.dtype).eps if step is None else step)
            near[name] = (value * factors.to(value.device)).to(value.dtype).unbind()
    for index in range(_NEIGHBOURS):
        yield dict(inputs) | {name: values[index] for name, values in near.items()}


def _errors(problem: Problem, got: Outputs, expected: Outputs) -> dict[str, float]:
    return {what: relative_error(got[what], expected[what], problem.vector_dims.get(what)) for what in expected}


def moved(inputs: Inputs, dtype: torch.dtype, device: str | None = None) -> dict[str, Any]:
    """Return the inputs with every float tensor, and every argument that is a dtype, in `dtype`;
    all tensors on `device`.
    """

    def move(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if _is_float(value) else None)

    return {name: move(value) for name, value in inputs.items()}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
