"""How the package is laid out: layers look down only, no circle of imports, few and short files,
old names load.
"""

import ast
import functools
import importlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import delora_kernels as dk
from delora_kernels.renamed import PACKAGE, RENAMED

ROOT = Path(dk.__file__).parent

LAYERS: dict[str, set[str]] = {
    "version": set(),
    "dtypes": set(),
    "call": set(),
    "op_arguments": set(),
    "reference": set(),
    "renamed": set(),
    "checks": set(),
    "bases": {"checks"},
    "backends": {"call", "op_arguments", "dtypes", "version"},
    "op_registry": {"backends"},
    "ops": {"op_registry", "op_arguments", "dtypes"},
    "flops": {"ops", "op_arguments"},
    "dispatch": {"backends", "call"},
    "autograd": {"ops", "backends", "bases", "op_arguments", "call", "dtypes"},
    "functional": {"autograd", "bases", "dispatch", "reference", "call", "op_arguments", "checks", "dtypes"},
    "nn": {"functional", "autograd", "ops", "op_arguments", "bases", "checks", "dtypes"},
    "routing": {"functional", "nn", "checks"},
    "testing": {"functional", "reference", "dispatch", "ops", "op_arguments", "call", "dtypes"},
    "diagnostics": {"testing", "functional", "dispatch", "backends", "bases", "ops", "call", "dtypes", "version"},
    "integrations": {
        "diagnostics",
        "testing",
        "routing",
        "nn",
        "functional",
        "autograd",
        "ops",
        "call",
        "op_arguments",
        "bases",
        "checks",
        "dtypes",
        "reference",
        "version",
    },
    "__init__": {
        "diagnostics",
        "routing",
        "nn",
        "functional",
        "reference",
        "dispatch",
        "ops",
        "renamed",
        "version",
        "flops",
    },
    "__main__": {"integrations", "diagnostics", "dispatch", "backends", "version"},
}
"""Layer → the layers that it may import, besides itself; each stands above all that it imports."""


def name_of(file: Path) -> str:
    """The dotted name of a file of the package, a package's own for its __init__."""
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def imported(file: Path) -> Iterator[str]:
    """The modules of the package that `file` imports, inside functions too, but for a package's
    __getattr__.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inner if name in FILES)
            if not all(name in FILES for name in inner):
                yield str(node.module)


@functools.cache
def imports() -> dict[str, set[str]]:
    """For each module those of the package that it imports."""
    return {name: set(imported(file)) - {name} for name, file in FILES.items()}


def layer_of(name: str) -> str:
    return "__init__" if name == "delora_kernels" else name.split(".")[1]


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_look_down_only(layer: str) -> None:
    assert {layer_of(name) for name in FILES} == set(LAYERS)
    places = list(LAYERS)
    assert all(places.index(below) < places.index(layer) for below in LAYERS[layer])
    for name, targets in imports().items():
        if layer_of(name) == layer:
            assert {layer_of(target) for target in targets} - {layer} <= LAYERS[layer], name


def test_no_circle_of_imports() -> None:
    """Modules that import each other in a loop; a package's face stands above what it hands on."""
    left = {name: set(targets) for name, targets in imports().items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    assert not left


def test_files_are_few_at_the_top_and_short() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 14
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert not [name for name in FILES if "utils" in name or "helpers" in name]


PICKLED = {
    "expert_use": ["ExpertReport", "ExpertUse"],
    "integrations.ether.config": ["EtherConfig", "EtherPlusConfig"],
    "integrations.ether.layer": ["PeftEtherLinear", "PeftEtherPlusLinear"],
    "integrations.ether.model": ["EtherModel", "EtherPlusModel"],
    "integrations.expert_callback": ["ExpertCallback"],
    "integrations.goat.config": ["GoatConfig"],
    "integrations.goat.layer": ["PeftGoatLinear"],
    "integrations.goat.model": ["GoatModel"],
    "integrations.goat.padding": ["Padding"],
    "integrations.goat.start": ["Starts"],
    "integrations.peft.layers": ["FusedDeloraLinear", "FusedLoraLinear"],
    "integrations.report": ["LayerReport", "Report"],
    "integrations.transformers": ["AccelerateCallback"],
    "routing": ["RouterStats"],
}
"""Module → classes that a pickle by version 0.1.0 named there."""


@pytest.mark.parametrize("module", PICKLED)
def test_pickles_by_old_names_load(module: str) -> None:
    pytest.importorskip("peft")

    class ByOldName(pickle.Unpickler):
        """Looks a class up under the name that version 0.1.0 gave it."""

        wanted: str

        def find_class(self, name: str, kind: str) -> Any:
            assert (name, kind) == ("placeholder", "placeholder")
            return super().find_class(PACKAGE + module, self.wanted)

    for kind in PICKLED[module]:
        loader = ByOldName(io.BytesIO(b"cplaceholder\nplaceholder\n."))
        loader.wanted = kind
        found = loader.load()
        assert found.__name__ == kind
        assert found.__module__ in FILES


def test_renamed_modules_are_there_under_both_names() -> None:
    pytest.importorskip("peft")
    for old, new in RENAMED.items():
        assert PACKAGE + old not in FILES
        module = importlib.import_module(PACKAGE + old)
        assert module is importlib.import_module(PACKAGE + new)
        assert module.__name__ == module.__spec__.name == PACKAGE + new
    with pytest.raises(ModuleNotFoundError, match="delora_kernels.nowhere"):
        importlib.import_module("delora_kernels.nowhere")
