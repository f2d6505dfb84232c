"""The golden vectors of tests/golden as calls: which function, with which arguments, must give
which numbers.

    for case in golden_cases():
        y = getattr(reference, case.function)(**case.arguments, dropout_mask=case.dropout_mask)

Every tensor is float64 and owns its memory; `case.to(dtype)` gives a copy to run in another dtype.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
FUNCTIONS = {"lora": "lora_linear", "rslora": "lora_linear", "dora": "dora_linear", "delora": "delora_linear"}
ARGUMENTS = {"C": "frozen_A", "D": "frozen_B"}


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """One call and its results.

    Args:
        name: The file's name without its ending.
        function: Name of the function in `delora_kernels.reference` and
            `delora_kernels.functional`.
        arguments: Keyword arguments of the call, the dropout mask apart.
        dropout_mask: `[T, K]` with entries 0 or 1 / (1 − p), or None.
        grad_out: Gradient that enters backward, of y's shape.
        output: y.
        grads: Gradients by argument name; what is missing here is a constant.
        weight_merged: W' `[N, K]` as the source merges it, or None.
        row_norm: DoRA's ‖W + s · BA‖ `[N]`, or None.
        vector_dims: For each gradient, the dimension over which max is taken, or None for the whole
            tensor: rows of dA and columns of dB stand alone where a clamp makes their scales
            differ.
    """

    name: str
    function: str
    arguments: dict[str, Any]
    dropout_mask: Tensor | None
    grad_out: Tensor
    output: Tensor
    grads: dict[str, Tensor]
    weight_merged: Tensor | None
    row_norm: Tensor | None
    vector_dims: dict[str, int | None]

    def to(self, dtype: torch.dtype) -> "GoldenCase":
        """The same call with its inputs in `dtype`; results stay float64."""

        def convert(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) else value

        return dataclasses.replace(
            self,
            arguments={name: convert(value) for name, value in self.arguments.items()},
            dropout_mask=convert(self.dropout_mask),
            grad_out=convert(self.grad_out),
        )

    def __str__(self) -> str:
        return self.name


def read(path: pathlib.Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A file's metadata, and its tensors: numbers in float64."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return metadata, {name: value.double() if value.is_floating_point() else value for name, value in data.items()}


@functools.cache
def golden_cases() -> tuple[GoldenCase, ...]:
    """All cases but GOAT's and ETHER's, which goat_cases.py and ether_cases.py read, sorted by
    name.
    """
    paths = sorted(FOLDER.glob("*.safetensors"))
    return tuple(_read(path) for path in paths if not path.name.startswith(("goat", "ether")))


def relative_error(got: Tensor, expected: Tensor, dim: int | None = None) -> float:
    """The error max |got − expected| / max |expected|; with `dim`, the worst over the vectors along
    it.

    Where the expected vector is exactly zero, the largest |got| itself. NaN if either holds NaN in
    any place.
    """
    if got.shape != expected.shape:
        raise AssertionError(f"shape {list(got.shape)} instead of {list(expected.shape)}")
    if got.numel() == 0:
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    difference, size = (got - expected).abs(), expected.abs()
    worst, size = (difference.max(), size.max()) if dim is None else (difference.amax(dim), size.amax(dim))
    return float(torch.where(size == 0, worst, worst / size).max())


def _read(path: pathlib.Path) -> GoldenCase:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        data = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118 (not a dict)
    grad_out, output = data.pop("grad_out"), data.pop("out")
    dropout_mask, weight_merged = data.pop("dropout_mask", None), data.pop("weight_merged", None)
    grads = {name.removeprefix("d"): data.pop(name) for name in list(data) if name.startswith("d")}
    arguments: dict[str, Any] = {ARGUMENTS.get(name, name): value for name, value in data.items()}
    row_norm = arguments.pop("weight_norm") if metadata["method"] == "dora" else None
    if metadata["method"] == "delora":
        arguments["eps"] = 0.0 if metadata["eps"] == "none" else float(metadata["eps"].split()[0])
    else:
        arguments["scale"] = float(metadata["scale"])
    by_vector = metadata.get("mode") in ("clamp", "zero_b")
    return GoldenCase(
        name=path.stem,
        function=FUNCTIONS[metadata["method"]],
        arguments=arguments,
        dropout_mask=dropout_mask,
        grad_out=grad_out,
        output=output,
        grads=grads,
        weight_merged=weight_merged,
        row_norm=row_norm,
        vector_dims={name: {"A": 1, "B": 0}.get(name) if by_vector else None for name in grads},
    )
