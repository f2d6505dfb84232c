"""Run by a test as a process of its own: saved programs in a process that can't import
delora_kernels.

    python without_library.py FOLDER

For every program in the folder, NAME.pt2 (torch.export), NAME.pt (torch.jit.trace) or NAME.onnx, it
runs NAME.input, backward too but for ONNX, and saves the output and every gradient by name as
NAME.found.
"""

import importlib.abc
import sys
import typing
from pathlib import Path
from typing import Any

import torch


class Refuse(importlib.abc.MetaPathFinder):
    """Raises for every import of the library."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "delora_kernels":
            raise ImportError(f"{name} is not there")


def differentiated(program: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the sum of its squares."""
    torch.manual_seed(0)
    y = program(x.requires_grad_())
    y.square().sum().backward()
    found = {name: p.grad for name, p in program.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | found


def by_onnx(path: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output by ONNX's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    (y,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    return {"y": torch.from_numpy(y)}


def remember_hints() -> None:
    """torch.export.load asks for the types of a class for each part of each program, in a quarter
    of its time.
    """
    read, known = typing.get_type_hints, {}

    def hints(of: Any, **options: Any) -> dict[str, Any]:
        key = of, *options, *map(id, options.values())
        if key not in known:
            known[key] = read(of, **options), options  # options: what lives has its id to itself
        found: dict[str, Any] = known[key][0]
        return found

    typing.get_type_hints = hints


def main(folder: Path) -> None:
    sys.meta_path.insert(0, Refuse())
    remember_hints()
    torch.set_num_threads(1)
    for given in sorted(folder.glob("*.input")):
        x = torch.load(given)
        if (path := given.with_suffix(".pt2")).exists():
            found = differentiated(torch.export.load(path).module(), x)
        elif (path := given.with_suffix(".pt")).exists():
            found = differentiated(torch.jit.load(path), x)
        else:
            found = by_onnx(given.with_suffix(".onnx"), x)
        torch.save(found, given.with_suffix(".found"))
    assert not [name for name in sys.modules if name.startswith("delora_kernels")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
