"""The implementations of one layer, all on the same tensors; `Absent` says why one is not there.

    layer = Layer(case, "cpu")
    layer.implementation("dk").forward()        # y [T, N]

frozen          the bare linear, x needing a gradient
frozen-again    the same once more: what it differs by is noise
dk              ours, as a user gets it: PEFT's layer after accelerate() (without PEFT: the
                function), automatic choice
dk-<backend>    the same on one backend
peft            PEFT's eager layer; peft-<dtype>: its adapters in x's dtype; peft-compile: through
                torch.compile; peft-no-dropout: without the dropout that the case has
addmm           see benchmarks.layer.addmm
unsloth, axolotl  named where their kernels would apply, not run: `addmm` is their form
of mixtures     see benchmarks.layer.mixtures; PEFT has none
authors         of ETHER and ETHER+, which PEFT has not either: see benchmarks.ether_authors
merged          inference with the adapter merged into the weight: one linear, so it must take what
                `frozen` takes
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.cases import BOTH, FORWARD, PRECISIONS, Case
from benchmarks.ether_authors import ether_authors
from benchmarks.layer.addmm import addmm
from benchmarks.layer.methods import METHODS, inputs, peft_layer
from benchmarks.layer.mixtures import RIVALS, MixtureRivals
from delora_kernels import backends, functional, reference

BACKENDS = tuple(f"dk-{name}" for name in backends.NAMES)
FROZEN = ("frozen", "frozen-again")
YARDSTICKS = (*FROZEN, "lora")
"""What computes something else than the method, to compare with."""

NAMED = {"unsloth": ("lora",), "axolotl": ("lora", "dora")}
"""Packages whose kernels would be rivals on a GPU → methods that they have kernels for."""


class Absent(Exception):
    """Why an implementation is not there, in one line."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute a layer.

    Args:
        forward: → y, on the autograd graph of the leaves.
        leaves: What gets a gradient, by the name of the argument.
        grad_out: dy [T, N]; None: no backward pass.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    grad_out: Tensor | None

    def results(self) -> dict[str, Tensor]:
        """y, and d<name> of every leaf if there is a backward pass."""
        if self.grad_out is None:
            with torch.no_grad():
                return {"y": self.forward()}
        y = self.forward()
        grads = torch.autograd.grad(y, list(self.leaves.values()), self.grad_out)
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}

    def run(self) -> None:
        """Return the pass that is timed: the results, let go at once."""
        self.results()


class Layer:
    """One case on one device: the tensors, and the implementations on them.

    Args:
        case: What.
        device: Where.
        seed: Of all numbers.
    """

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case, self.device = case, device
        self.method, self.precision = METHODS[case.method], PRECISIONS[case.precision]
        self.inputs = inputs(case, device, seed)
        self.inputs["x"].requires_grad_(case.mode == BOTH)
        self.no_peft = None if importlib.util.find_spec("peft") else "PEFT is not installed"
        if self.method.peft_config is None:
            self.no_peft = f"PEFT has no {self.method.title}"
        if self.no_peft is None:  # its parameters hold the same memory, and are the leaves
            self.peft = peft_layer(case, self.inputs)
            self.inputs |= self.method.in_peft(self.peft)
        self.leaves = {name: self.inputs[name].requires_grad_() for name in self.method.trained}
        self.mixture = MixtureRivals(self.inputs, case.dropout_p) if case.E else None

    @property
    def tensors(self) -> list[Tensor]:
        """All that is there before a pass begins."""
        held = [] if self.mixture is None else self.mixture.tensors
        return held + [value for value in self.inputs.values() if isinstance(value, Tensor)]

    def names(self) -> list[str]:
        """Every implementation that this case is compared with, there or not."""
        if self.mixture is not None:
            return [*FROZEN, "dk", *BACKENDS, "peft", *RIVALS, *(["dense-compile"] if self.case.compiled else [])]
        names = [*FROZEN, "dk", *BACKENDS]
        if self.case.n_blocks:
            names += ["peft", "authors"]
        else:
            names += ["peft" if self.case.precision == "fp32" or self._wide else self._peft_narrow]
            names += ["peft-compile"] if self.case.compiled else []
            names += ["peft-no-dropout"] if self.case.dropout_p else ["addmm"]
        names += [name for name, methods in NAMED.items() if self.case.method in methods]
        return names + (["merged"] if self.case.mode == FORWARD else [])

    @property
    def _wide(self) -> bool:
        return self.precision.dtype != self.precision.adapter_dtype

    @property
    def _peft_narrow(self) -> str:
        return f"peft-{self.case.precision}"

    def implementation(self, name: str) -> Implementation:
        """Build one of `names()`.

        Raises:
            Absent: it can't be there; the text says why.
        """
        leaves = self.leaves
        forward: Callable[[], Tensor]
        if name in FROZEN:
            forward, leaves = self._frozen, {}
        elif name == "addmm":
            forward = partial(addmm, self.inputs)
        elif name == "authors":
            forward = partial(ether_authors, **self.arguments())
        elif name == "merged":
            forward = self._merged()
        elif name.startswith("dk"):
            forward = self._ours(name)
        elif name in NAMED:
            raise Absent(f"{name}'s kernels are for whole modules on a GPU, and not run here: addmm is their form")
        elif self.mixture is not None and name != "peft":
            forward, leaves = self.mixture.forward(name)
        else:
            layer = self._theirs(name)
            forward = partial(layer, self.inputs["x"])
            if name == "peft-no-dropout":
                held = self.method.in_peft(layer)
                leaves = {each: held[each] for each in leaves}
        grad_out = self.inputs["grad_out"] if self.case.mode == BOTH else None
        return Implementation(self._in_autocast(forward), {"x": self.inputs["x"]} | leaves, grad_out)

    def _frozen(self) -> Tensor:
        return nn.functional.linear(self.inputs["x"], self.inputs["weight"])

    def _in_autocast(self, forward: Callable[[], Any]) -> Callable[[], Any]:
        if not self.precision.autocast:
            return forward
        kind, dtype = torch.device(self.device).type, self.precision.dtype

        def run() -> Any:
            with torch.autocast(kind, dtype):
                return forward()

        return run

    def _merged(self) -> Callable[[], Tensor]:
        weight = getattr(reference, self.method.function.replace("_linear", "_weight"))
        wide = {name: value.float() if isinstance(value, Tensor) else value for name, value in self.arguments().items()}
        del wide["x"]
        with torch.no_grad():
            merged = weight(**wide).to(self.precision.dtype)
        return lambda: nn.functional.linear(self.inputs["x"], merged)

    def _theirs(self, name: str) -> Any:
        if self.no_peft is not None:
            raise Absent(self.no_peft)
        if name == "peft-compile":
            torch._dynamo.reset()
            return torch.compile(self.peft)
        if name == "peft-no-dropout":
            return peft_layer(replace(self.case, dropout_p=0.0), self.inputs)
        return self.peft

    def _ours(self, name: str) -> Callable[[], Tensor]:
        forward, backend = self._fused(), name.removeprefix("dk-")
        if name == "dk":
            return forward
        reason = backends.unavailable(backend)
        if reason is not None:
            raise Absent(reason)
        if backend == self.backend():
            raise Absent(f"dk itself runs on {backend} here")

        def run() -> Tensor:
            with dk.use_backend(backend):
                return forward()

        return run

    def _fused(self) -> Callable[[], Tensor]:
        if self.no_peft is not None:
            function = getattr(functional, self.method.function)
            call = partial(function, **self.arguments(), **self._dropout())
            return call if self.mixture is None else lambda: call()[0]
        shared = {id(tensor): tensor for tensor in (*self.peft.parameters(), *self.peft.buffers())}
        fused = copy.deepcopy(self.peft, memo=shared)
        dk.accelerate(fused, strict=True)
        return partial(fused, self.inputs["x"])

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the method's functions."""
        return {name: value for name, value in self.inputs.items() if name != "grad_out"}

    def _dropout(self) -> dict[str, float]:
        return {"dropout_p": self.case.dropout_p} if self.case.dropout_p else {}

    def conventions(self, name: str) -> dict[str, Any]:
        """Arguments that make the reference compute what this implementation does: not every rival
        does the method.
        """
        several = name == "authors" and self.case.n_blocks != 1
        return {"blocks": "official"} if several else {}

    def backend(self) -> str:
        """Return what an automatic choice takes for this layer."""
        asked = partial(dk.explain, self.method.function, **self.arguments(), **self._dropout())
        return str(self._in_autocast(asked)().backend)
