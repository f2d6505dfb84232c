"""A method as random problems: inputs, the fused call, the eager call, the oracle."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from delora_kernels import functional, reference
from delora_kernels.call import AnyCall, MoECall
from delora_kernels.dispatch import choose
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.testing.draw import Draw
from delora_kernels.testing.dropout import dropout_masks
from delora_kernels.testing.methods.eager_forms import BASE, adapter_dtype, eager
from delora_kernels.testing.problem import Inputs, Outputs, Problem, moved

_BASE = (*BASE, "grad_out")
_NOT_ARGUMENTS = ("grad_out", "seed", "dropout_mask")


@dataclass(frozen=True)
class Method:
    """One public function with one set of conventions.

    Args:
        name: The key in `METHODS`.
        function: Name of the function in `delora_kernels.functional` and
            `delora_kernels.reference`.
        arguments: (draw, base) → the arguments beyond those of `base` (x, weight, bias, A, B), or
            in their place; None takes one away.
        constants: Arguments that get no gradient.
        dropout_p: Dropout of the fused call, of several stacked adapters each its own; the
            reference gets the masks.
        fused_only: Arguments of the fused call that the reference does not have.
        takes_bias: Whether the fused call takes a bias.
        through_x: Results that are computed from a [T, N] tensor which the fused call keeps in x's
            dtype.
        vector_dims: Results whose vectors differ in size by orders of magnitude → the vectors'
            dimension.
    """

    name: str
    function: str
    arguments: Callable[[Draw, dict[str, Tensor]], dict[str, Any]]
    constants: tuple[str, ...] = ()
    dropout_p: float | tuple[float, ...] = 0.0
    fused_only: Mapping[str, Any] = field(default_factory=dict)
    takes_bias: bool = True
    through_x: tuple[str, ...] = ()
    vector_dims: Mapping[str, int] = field(default_factory=dict)

    def draw(
        self,
        T: int,
        K: int,
        N: int,
        r: int,
        *,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
        bias: bool = True,
    ) -> dict[str, Any]:
        """Random inputs, drawn in float64 and rounded once: the oracle starts from the very same
        numbers.

        Args:
            T: Tokens.
            K: In-features.
            N: Out-features.
            r: Rank.
            dtype: Of x, weight, bias and the gradient that enters backward.
            adapter_dtype: Of every other tensor; None: `dtype`.
            device: Where the tensors live; the numbers are the same everywhere.
            seed: Of the numbers and of the dropout mask.
            bias: Whether there is one, if the method takes one.

        Returns:
            The function's arguments by name, `grad_out` `[T, N]`, and for dropout `seed` and
            `dropout_mask` (bool `[T, K]` or one for each stacked adapter, the elements that the
            backend of this call keeps).

        Raises:
            RuntimeError: the requested backend can't take the call.
        """
        draw = Draw(T, K, N, r, seed)
        A, B = draw.factors()
        inputs: dict[str, Any] = {"x": draw.normal(T, K), "weight": draw.normal(N, K) / K**0.5, "A": A, "B": B}
        if bias and self.takes_bias:
            inputs["bias"] = draw.normal(N)
        inputs |= self.arguments(draw, inputs)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        inputs["grad_out"] = draw.normal(T, N)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                wanted = dtype if name in _BASE else adapter_dtype or dtype
                inputs[name] = value.to(device, wanted if value.is_floating_point() else None)
        if self.dropout_p:
            inputs["seed"] = torch.tensor(seed, dtype=torch.int64, device=device)
            call: Any = self.call(inputs)
            masks = dropout_masks(T, K, call.options.dropout_p, call.seed, choose(call))
            if isinstance(call, MoECall):  # the last is the router's, which sees all of x
                masks = masks[0] if len(call.options.ranks) == 2 else masks[: len(inputs["B"])]
            inputs["dropout_mask"] = masks
        return inputs

    def problem(self, T: int, K: int, N: int, r: int, **options: Any) -> Problem:
        """Return what `measure` takes: y and every gradient of random inputs; arguments as in
        `draw`.
        """
        inputs = self.draw(T, K, N, r, **options)
        dtypes = {"y": inputs["x"].dtype} | {f"d{name}": inputs[name].dtype for name in self.trained(inputs)}
        dtypes |= dict.fromkeys(("probability", "z"), accumulate_dtype(adapter_dtype(inputs)))
        through = dict.fromkeys(self.through_x, inputs["x"].dtype)
        return Problem(self.name, inputs, self.fused, self.eager, self.oracle, dtypes, through, self.vector_dims)

    def trained(self, inputs: Inputs) -> tuple[str, ...]:
        """Names of the inputs that get gradients."""
        left_out = self.constants + _NOT_ARGUMENTS
        return tuple(name for name, value in inputs.items() if isinstance(value, Tensor) and name not in left_out)

    def call(self, inputs: Inputs) -> AnyCall:
        """Return the fused call after its checks: which backend takes it, in which dtypes."""
        return functional.call_of(self.function, **self._fused_arguments(inputs))

    def forward(self, inputs: Inputs) -> Tensor:
        """y by `delora_kernels.functional`, on the autograd graph of the inputs."""
        found = getattr(functional, self.function)(**self._fused_arguments(inputs))
        return _results(found)["y"]

    def fused(self, inputs: Inputs, trained: Collection[str] | None = None) -> Outputs:
        """y and the gradients by `delora_kernels.functional`.

        Args:
            inputs: As `draw` returns them.
            trained: Names of the inputs that get gradients; None: all that can.

        Returns:
            y, of a mixture its router's statistics, and d<name> for each of the names.
        """
        return self._run(getattr(functional, self.function), self._fused_arguments(inputs), inputs, trained)

    def eager(self, inputs: Inputs, trained: Collection[str] | None = None) -> Outputs:
        """Return the same by eager PyTorch in the inputs' dtypes, as PEFT's layers compute it."""
        return self._run(partial(eager, self.function), self._reference_arguments(inputs), inputs, trained)

    def oracle(self, inputs: Inputs, trained: Collection[str] | None = None) -> Outputs:
        """Compute the same by the reference, in float64 on the CPU."""
        exact = moved(inputs, torch.float64, "cpu")
        return self._run(getattr(reference, self.function), self._reference_arguments(exact), exact, trained)

    def _arguments(self, inputs: Inputs) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in _NOT_ARGUMENTS}

    def _fused_arguments(self, inputs: Inputs) -> dict[str, Any]:
        arguments = self._arguments(inputs) | dict(self.fused_only)
        if self.dropout_p:
            arguments |= {"dropout_p": self._dropout_p(inputs), "seed": inputs["seed"]}
        return arguments

    def _reference_arguments(self, inputs: Inputs) -> dict[str, Any]:
        arguments = self._arguments(inputs)
        if self.dropout_p:
            kept = inputs["dropout_mask"].to(adapter_dtype(inputs))
            p = kept.new_tensor(self._dropout_p(inputs))
            arguments["dropout_mask"] = kept / (1 - p.reshape(*p.shape, 1, 1))
        return arguments

    def _dropout_p(self, inputs: Inputs) -> float | tuple[float, ...]:
        return self.dropout_p if isinstance(self.dropout_p, float) else self.dropout_p[: len(inputs["ranks"])]

    def _run(
        self,
        function: Callable[..., Tensor],
        arguments: dict[str, Any],
        inputs: Inputs,
        trained: Collection[str] | None,
    ) -> Outputs:
        names = [name for name in self.trained(inputs) if trained is None or name in trained]
        leaves = {name: arguments[name].detach().requires_grad_() for name in names}
        found = _results(function(**arguments | leaves))
        entering = {what: 1 + torch.arange(value.numel()).to(value).view_as(value) for what, value in found.items()}
        entering["y"] = inputs["grad_out"]
        outputs = [what for what, value in found.items() if value.requires_grad]
        grads: Any = ()
        if names:
            sent = [entering[what].to(found[what].dtype) for what in outputs]
            grads = torch.autograd.grad([found[what] for what in outputs], list(leaves.values()), sent)
        results = {what: value.detach() for what, value in found.items()}
        return results | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def _results(found: Any) -> Outputs:
    """y, and of a mixture what the losses of its router are made of."""
    if isinstance(found, Tensor):
        return {"y": found}
    y, stats = found
    return {"y": y, "probability": stats.probability, "z": stats.z}
