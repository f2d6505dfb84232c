"""Modules that have moved, under the names they had: what version 0.1 pickled loads by them.

A finder stands before Python's, which would find what lies below a package that has moved, and load
it a second time. Nothing is imported before somebody asks for an old name.
`delora_kernels.routing.RouterStats` needs no entry: the package of that name still has it.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "delora_kernels."

RENAMED = {
    "check": "diagnostics.check",
    "environment": "diagnostics.environment",
    "expert_use": "routing.report",
    "expert_watch": "routing.watch",
    "explanation": "diagnostics.explain",
    "init": "nn.goat_start",
    "integrations.ether": "integrations.peft.methods.ether",
    "integrations.expert_callback": "integrations.transformers.expert_callback",
    "integrations.export": "integrations.peft.export.export_lora",
    "integrations.goat": "integrations.peft.methods.goat",
    "integrations.peft.layers": "integrations.peft.fused.layers",
    "integrations.report": "integrations.peft.fused.report",
}
"""Name as it was → as it is, behind `delora_kernels.`; what lies below a package moves with it."""


class _Renamed(MetaPathFinder, Loader):
    """Finds the module that an old name stands for, and gives it both names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if _now(name) is None else ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(_now(spec.name)))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # type: ignore[union-attr]  # Python has put the old name's there


def _now(name: str) -> str | None:
    """Return the full name of today, or None where `name` is none of the old ones."""
    for old, new in RENAMED.items():
        if name == PACKAGE + old or name.startswith(f"{PACKAGE}{old}."):
            return PACKAGE + new + name.removeprefix(PACKAGE + old)
    return None


def install() -> None:
    """Let Python find the old names; again is harmless."""
    if not any(isinstance(finder, _Renamed) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Renamed())
