"""The calls whose binaries are looked at: layers of real models, forward and backward, as a
training step under autocast makes them.

    steps_of(Layer("lora", 4096, 4096, r=16))     what it launches, in order
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import PRECISIONS, Case
from benchmarks.codegen.recording import Gemm, Launch, Other, recording
from benchmarks.layer import methods
from delora_kernels import functional, use_backend

TOKENS = 8192
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
"""(in-features, out-features) of the layers that are estimated."""


class Layer(NamedTuple):
    """One adapted linear: method (a key of METHODS, or "grouped-lora": the experts of a model),
    sizes, rank (of each expert), experts and how many of them a token takes; out-features of
    siblings that share its input.
    """

    method: str
    K: int
    N: int
    r: int
    E: int | None = None
    k: int | None = None
    precision: str = "bf16-autocast"
    dropout_p: float = 0.0
    siblings: tuple[int, ...] = ()
    T: int = TOKENS

    @property
    def outputs(self) -> int:
        """Out-features of it and its siblings."""
        return self.N + sum(self.siblings)

    @property
    def title(self) -> str:
        """Its method, ranks and what is not usual."""
        words = [
            self.method + (" q, k, v" if self.siblings else ""),
            f"E={self.E} r={self.r}" if self.E else f"r={self.r}" if self.r else "",
        ]
        words += [self.precision if self.precision != "bf16-autocast" else "", "dropout" if self.dropout_p else ""]
        return " ".join(word for word in words if word)


def estimated() -> Iterator[Layer]:
    """Yield the layers of the table of estimates."""
    for K, N in SHAPES:
        for r in (16, 32, 64):
            yield from (Layer(method, K, N, r) for method in ("lora", "delora", "dora"))
        yield Layer("goat", K, N, 2, E=8, k=2)
        yield from (Layer(method, K, N, 0) for method in ("ether-plus", "ether-plus-both"))
    for r in (128, 256):
        yield from (Layer(method, 4096, 4096, r) for method in ("lora", "dora"))
    yield Layer("lora", 4096, 4096, 16, siblings=(1024, 1024))
    yield Layer("lora", 4096, 4096, 16, siblings=(4096, 4096))


def looked_at() -> Iterator[Layer]:
    """Yield layers whose launches together have every binary that is looked at: ranks 4 to 256,
    each dtype, dropout.
    """
    for r in (16, 32, 64, 4, 8, 24, 128, 256):
        for method in ("lora", "dora"):
            yield Layer(method, 4096, 4096, r)
    yield Layer("delora", 4096, 4096, 16)
    yield Layer("goat", 4096, 4096, 2, E=8, k=2)
    yield Layer("moe", 4096, 4096, 4, E=8, k=2)
    yield Layer("ether", 4096, 4096, 0)
    yield Layer("ether-plus-both", 4096, 4096, 0)
    yield Layer("ether-plus-both", 4096, 14336, 0)
    for r in (16, 64):
        yield Layer("lora", 4096, 4096, r, dropout_p=0.1)
        yield Layer("lora", 4096, 4096, r, precision="bf16-fp32")
        yield Layer("dora", 4096, 4096, r, precision="bf16-fp32")
        for dropout_p in (0.0, 0.1):
            yield Layer("grouped-lora", 2048, 1536, r, E=128, k=8, dropout_p=dropout_p, T=4096)  # Qwen3-30B-A3B's


def steps_of(layer: Layer, capability: tuple[int, int] = (9, 0)) -> list[Launch | Gemm | Other]:
    """Return what one forward and backward pass launches on a device of this compute capability."""
    case = Case(layer.method, "", layer.T, layer.K, layer.N, layer.r, layer.precision, E=layer.E, k=layer.k)
    grouped = layer.method == "grouped-lora"
    made = _experts(layer) if grouped else _blank(case)
    dy, spec = made.pop("grad_out"), methods.METHODS["lora" if grouped else layer.method]
    if layer.dropout_p:
        made |= {"dropout_p": layer.dropout_p, "seed": 1}
    function, gradients = getattr(functional, "grouped_lora_linear" if grouped else spec.function), [dy]
    for name in ("x", *spec.trained):
        made[name].requires_grad_()
    if layer.siblings:
        given = [made] + [_blank(replace(case, N=N)) for N in layer.siblings]
        gradients += [other["grad_out"] for other in given[1:]]
        factors = {name: [each[name].requires_grad_() for each in given] for name in "AB"}
        weights = [each["weight"] for each in given]
        function, made = functional.lora_linears, {"x": made["x"], "weights": weights, **factors}
    dtype, _, autocast, _ = PRECISIONS[layer.precision]
    with recording(capability) as seen, use_backend("triton"):
        with torch.autocast("cpu", dtype, enabled=autocast):
            y: Any = function(**made)
        outputs = [y] if isinstance(y, Tensor) else y[: len(gradients)]
        torch.autograd.backward(outputs, gradients)
    return seen.steps


class _Shapes(methods.Draw):
    """Draws nothing: tensors without memory."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        self.case, self.device = case, "meta"

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")


def _experts(layer: Layer) -> dict[str, Any]:
    """Return the inputs of an expert model's linear, its rows in equal parts, in memory that nobody
    wrote.
    """
    E, K, N, r, rows = layer.E or 1, layer.K, layer.N, layer.r, layer.T * (layer.k or 1)
    dtype, adapter_dtype, *_ = PRECISIONS[layer.precision]
    made: dict[str, Any] = {"x": torch.empty(rows, K, dtype=dtype), "weight": torch.empty(E, N, K, dtype=dtype)}
    made |= {"A": torch.empty(E, r, K, dtype=adapter_dtype), "B": torch.empty(E, N, r, dtype=adapter_dtype)}
    offsets = torch.arange(1, E + 1) * (rows // E)
    return made | {"offsets": offsets, "scale": methods.SCALE, "grad_out": torch.empty(rows, N, dtype=dtype)}


def _blank(case: Case) -> dict[str, Any]:
    """Return the inputs of a case in memory that nobody wrote: the numbers do not matter, and take
    long.
    """
    with patch.object(methods, "Draw", _Shapes):
        made = methods.inputs(case, "meta", seed=0)
    return {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in made.items()
    }
