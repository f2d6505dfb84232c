"""Every place that lists the methods lists them all: where a new one was forgotten, a test fails
that names the place and the method.

What there is, the files of the package say: each public function `<method>_linear` in
`functional/` is a method, and each public class in `nn/` its module.
"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nn_mixtures
import nn_modules
import pytest
from reference_calls import VARIANTS, function_of

import delora_kernels as dk
from benchmarks.layer.methods import METHODS as TIMED
from benchmarks.report.by_case import NAMES as IN_REPORTS
from delora_kernels import functional, nn, reference, testing
from delora_kernels.functional import plain_torch
from delora_kernels.integrations.peft.export import low_rank_terms
from delora_kernels.integrations.peft.methods import register
from delora_kernels.testing.methods import table

PACKAGE = Path(dk.__file__).parent


def files(folder: str) -> Iterator[ModuleType]:
    """The modules of one folder of the package."""
    for path in sorted((PACKAGE / folder).glob("*.py")):
        if path.stem != "__init__":
            yield importlib.import_module(f"delora_kernels.{folder.replace('/', '.')}.{path.stem}")


def defined(folder: str, ending: str) -> set[str]:
    """Names of the public functions with this ending that the files of a folder define."""
    made = [(module, *item) for module in files(folder) for item in vars(module).items() if item[0].endswith(ending)]
    return {
        name
        for module, name, value in made
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


FUNCTIONS = defined("functional", "_linear")
MODULES = {
    kind
    for module in files("nn")
    for name, kind in vars(module).items()
    if inspect.isclass(kind) and kind.__module__ == module.__name__ and not name.startswith("_")
    if issubclass(kind, nn.MergeableLinear) and kind not in (nn.MergeableLinear, nn.AdapterLinear)
}


GROUPED = {"grouped_lora_linear", "grouped_dora_linear", "grouped_delora_linear"}
OWN_FILES = {"moe_lora_linear", "ether_linear", "ether_plus_linear"} | GROUPED
"""Methods whose variants are their own tests': test_moe.py, test_grouped.py, test_ether.py."""

LISTS: dict[str, set[str]] = {
    "functional/__init__.py: __all__": set(functional.__all__),
    "functional/__init__.py: CALLS": set(functional.CALLS),
    "functional/plain_torch.py: FORMULAS": set(plain_torch.FORMULAS),
    "reference/__init__.py: __all__": set(reference.__all__),
    "tests/helpers/reference_calls.py: VARIANTS": set(map(function_of, VARIANTS)) | OWN_FILES,
    "testing/methods/: METHODS": {method.function for method in testing.METHODS.values()},
    "nn/: _function of a module": {kind._function.__name__ for kind in MODULES if hasattr(kind, "_function")}
    | {"moe_lora_linear"},
    "benchmarks/layer/methods.py: METHODS, or benchmarks/experts.py": {method.function for method in TIMED.values()}
    | GROUPED,
}
"""Where functions are listed → those that are."""

LISTS_OF_MODULES: dict[str, set[type]] = {
    "nn/__init__.py: __all__": {getattr(nn, name) for name in nn.__all__},
    "tests/helpers/nn_modules.py or nn_mixtures.py: KINDS": {row[0] for row in nn_modules.KINDS.values()}
    | {row[0] for row in nn_mixtures.KINDS.values()}
    | {nn.EtherLinear, nn.EtherPlusLinear}  # tests/nn/test_ether.py
    | {nn.GroupedLoRALinear, nn.GroupedDoRALinear, nn.GroupedDeLoRALinear},  # tests/nn/test_grouped.py
    "integrations/peft/export/low_rank_terms.py: LOW_RANK or NOT_LOW_RANK": {*low_rank_terms.LOW_RANK}
    | {kind for kind in MODULES if issubclass(kind, (*low_rank_terms.NOT_LOW_RANK,))}
    | {kind for kind in MODULES if not issubclass(kind, nn.AdapterLinear)},
}


@pytest.mark.parametrize("place", LISTS)
def test_every_function_is_listed(place: str) -> None:
    missing = sorted(FUNCTIONS - LISTS[place])
    assert missing == [], f"{place} lacks {missing}"


@pytest.mark.parametrize("place", LISTS_OF_MODULES)
def test_every_module_is_listed(place: str) -> None:
    missing = sorted(kind.__name__ for kind in MODULES - LISTS_OF_MODULES[place])
    assert missing == [], f"{place} lacks {missing}"


def test_the_reference_lists_what_its_files_define() -> None:
    missing = sorted((defined("reference", "_linear") | defined("reference", "_weight")) - set(reference.__all__))
    assert missing == [], f"reference/__init__.py: __all__ lacks {missing}"
    weights = {name.replace("_linear", "_weight") for name in FUNCTIONS - {"moe_lora_linear"}}
    missing = sorted(weights - set(reference.__all__))
    assert missing == [], f"reference/ has no {missing}"


def test_every_file_of_random_problems_is_in_the_table() -> None:
    made = {module.__name__.rpartition(".")[2] for module in files("testing/methods") if hasattr(module, "METHODS")}
    missing = sorted(made - {"table"} - {file.__name__.rpartition(".")[2] for file in table._FILES})
    assert missing == [], f"testing/methods/table.py: _FILES lacks {missing}"


def test_every_timed_method_has_a_name_in_reports() -> None:
    missing = sorted(TIMED.keys() - IN_REPORTS.keys())
    assert missing == [], f"benchmarks/report/by_case.py: NAMES lacks {missing}"


def test_every_package_of_peft_methods_is_registered() -> None:
    there = {path.parent.name for path in (PACKAGE / "integrations/peft/methods").glob("*/__init__.py")}
    missing = sorted(there - set(register.METHODS))
    assert missing == [], f"integrations/peft/methods/register.py: METHODS lacks {missing}"
