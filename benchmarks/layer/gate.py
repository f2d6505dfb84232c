"""The correctness gate: what is not right is not timed.

Every implementation's output and gradients are compared with the reference in float64 on the same
tensors, on the device. For each, error = max |a − b| / max |b| and

    limit = 2 · e + ROUNDINGS · (ε / 2) · (1 + κ)

with e the largest error of eager PyTorch in the case's dtypes (under autocast: all in its dtype;
for ETHER's authors' form, which makes W', also of one that does) over the inputs and NEIGHBOURS of
them that differ in their last bits, ε of the coarsest dtype, and κ = 0 except where the result is
one number g, DeLoRA's dλ: a maximum over many elements shows how far rounding goes, one number may
be right by luck. There

    κ = √Σ_i (i · ∂g/∂i)² / |g|     over every element i of the inputs

is how many times the relative rounding of each input, independent of the others, moves g. This is
the limit of delora_kernels.testing with fewer float64 passes, which full-sized layers can't afford.
Dropout is off: no two implementations share a mask, and tests prove ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import BOTH
from benchmarks.layer.rivals import Layer
from delora_kernels import reference
from delora_kernels.testing.methods.eager_forms import eager
from delora_kernels.testing.problem import ROUNDINGS

NEIGHBOURS = 2
Results = dict[str, Tensor]
Form = Callable[..., Any]
"""A function's name and its arguments → y."""


@dataclass(frozen=True)
class Verdict:
    """How an implementation did.

    Args:
        errors: Error of y and of each gradient.
        wrong: What is beyond its limit, in words; empty: it may be timed.
    """

    errors: dict[str, float]
    wrong: str

    @property
    def largest(self) -> float:
        """The largest error."""
        return max(self.errors.values())


class Gate:
    """The truth about one layer, and how far from it a result may be.

    Args:
        layer: Of a case without dropout.
        forms: Of eager PyTorch; the limit is that of the one with the largest error.
        **conventions: Further arguments of the reference: see Layer.conventions.
    """

    def __init__(self, layer: Layer, forms: tuple[Form, ...] = (eager,), **conventions: Any) -> None:
        self.expected = _oracle(layer, layer.inputs | conventions)
        narrow, wide, autocast, _ = layer.precision
        coarsest = max(torch.finfo(dtype).eps for dtype in (narrow, wide))
        errors: dict[str, float] = dict.fromkeys(self.expected, 0.0)
        for number, near in enumerate(_neighbours(layer.inputs | conventions)):
            truth = self.expected if number == 0 else _oracle(layer, near)
            for form in forms:
                for name, result in _eager(layer, form, _cast(near, narrow) if autocast else near).items():
                    errors[name] = max(errors[name], error(result, truth[name]))
        kappa = {name: _kappa(layer, name) if result.numel() == 1 else 0.0 for name, result in self.expected.items()}
        self.limits = {name: 2 * e + ROUNDINGS * coarsest / 2 * (1 + kappa[name]) for name, e in errors.items()}

    def judge(self, results: Results) -> Verdict:
        """Compare one implementation's results: all of them must be there."""
        errors = {
            name: error(results[name], expected) if name in results else torch.inf
            for name, expected in self.expected.items()
        }
        wrong = [
            f"{name} is off by {e:.1e}, limit {self.limits[name]:.1e}"
            for name, e in errors.items()
            if not e <= self.limits[name]
        ]
        return Verdict(errors, "; ".join(wrong))


def error(got: Tensor, expected: Tensor) -> float:
    """max |got − expected| / max |expected| on the tensors' device; ∞ where NaN or Inf came."""
    worst = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float(worst.nan_to_num(nan=torch.inf, posinf=torch.inf))


def _oracle(layer: Layer, inputs: dict[str, Any]) -> Results:
    return _results(layer, getattr(reference, layer.method.function), _cast(inputs, torch.float64))


def _eager(layer: Layer, form: Form, inputs: dict[str, Any]) -> Results:
    return _results(layer, partial(form, layer.method.function), inputs)


def _results(layer: Layer, function: Any, inputs: dict[str, Any]) -> Results:
    both = layer.case.mode == BOTH
    names = ("x", *layer.method.trained) if both else ()
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    arguments = {name: value for name, value in inputs.items() if name != "grad_out"}
    with torch.set_grad_enabled(both):
        y = function(**arguments | leaves)
    y = y if isinstance(y, Tensor) else y[0]  # a mixture's statistics have tests of their own
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["grad_out"]) if both else ()
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _kappa(layer: Layer, name: str) -> float:
    """κ of the gradient `name`, one number, by the derivative of the reference's derivative in
    float64.
    """
    inputs = _cast(layer.inputs, torch.float64)
    leaves = [value.requires_grad_() for value in inputs.values() if isinstance(value, Tensor)]
    y = getattr(reference, layer.method.function)(**{each: inputs[each] for each in inputs if each != "grad_out"})
    (g,) = torch.autograd.grad(y, inputs[name.removeprefix("d")], inputs["grad_out"], create_graph=True)
    moves = torch.autograd.grad(g.sum(), leaves, allow_unused=True)
    with torch.no_grad():
        terms = [(leaf * move).square().sum() for leaf, move in zip(leaves, moves, strict=True) if move is not None]
        return float(torch.stack(terms).sum().sqrt() / g.abs().clamp_min(torch.finfo(torch.float32).tiny))


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.detach().to(dtype) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _neighbours(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the inputs, then the inputs with every element moved up or down by chance by one ε."""
    yield {name: value.detach() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for number in range(NEIGHBOURS):
        near = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                generator = torch.Generator(value.device).manual_seed(number)
                up = torch.randint(0, 2, value.shape, device=value.device, generator=generator, dtype=torch.int8)
                near[name] = value.detach() * (1 + (2 * up - 1).to(value.dtype) * torch.finfo(value.dtype).eps)
        yield near
