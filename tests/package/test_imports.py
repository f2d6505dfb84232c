"""The package's surface: what importing costs, and what is public."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import delora_kernels as dk
from delora_kernels import functional, ops, reference

PACKAGE = Path(dk.__file__).parent

PUBLIC = {
    "delora_kernels": [
        "AccelerateCallback",
        "EtherConfig",
        "EtherPlusConfig",
        "ExpertCallback",
        "GoatConfig",
        "TrainingReportCallback",
        "WeightChangesCallback",
        "__version__",
        "accelerate",
        "allow_delora_on_stored_bases",
        "bases",
        "can_accelerate",
        "compare",
        "expert_report",
        "explain",
        "export_lora",
        "flops",
        "functional",
        "import_goat",
        "load_with_quantized_experts",
        "merge_mean_gate",
        "nn",
        "quantize_experts",
        "reference",
        "register_peft_methods",
        "restore",
        "training_report",
        "use_backend",
        "warmup",
        "watch_experts",
        "watch_training",
        "weight_changes",
    ],
    "delora_kernels.bases": ["StoredBase", "register"],
    "delora_kernels.nn": [
        "AdapterLinear",
        "DeLoRALinear",
        "DeLoRAMoELinear",
        "DoRALinear",
        "EtherLinear",
        "EtherPlusLinear",
        "GoatLinear",
        "GroupedDeLoRALinear",
        "GroupedDoRALinear",
        "GroupedLoRALinear",
        "LoRALinear",
        "MergeableLinear",
        "MoELoRALinear",
        "adapted_linears",
        "convert",
        "lambda_parameter_groups",
        "load_ether_checkpoint",
        "router_parameter_groups",
        "set_loss_scale",
    ],
}


HEAVY = ("triton", "peft", "transformers", "rich", "matplotlib", "torch.utils.flop_counter", "torch._dynamo")

DIR_AND_HELP = """
import pydoc
said["dir"] = [name for name in dir(dk) if not name.startswith("__")]
said["help"] = pydoc.render_doc(dk, renderer=pydoc.plaintext)
print(json.dumps(said))
"""

FRESH = f"""
import json, logging, sys, warnings, numpy, torch

def owners():
    for name, module in list(sys.modules.items()):
        if name == "__main__" or name.startswith("delora_kernels"): continue
        yield name, module
        for key, value in list(getattr(module, "__dict__", {{}}).items()):
            if isinstance(value, type) and value.__module__ == name: yield f"{{name}}.{{key}}", value

before = {{what: dict(vars(owner)) for what, owner in owners() if hasattr(owner, "__dict__")}}
finders, root = list(sys.meta_path), list(logging.getLogger().handlers)
said = {{"heavy before": [name for name in {HEAVY} if name in sys.modules]}}
import delora_kernels as dk
said["cuda"] = torch.cuda.is_initialized()
said["heavy"] = [name for name in {HEAVY} if name in sys.modules]
said["loaded"] = [name for name in sys.modules if name.startswith("delora_kernels.")]
said["changed"] = [
    f"{{what}} {{key}}" for what, owner in owners() for key, value in before.get(what, {{}}).items()
    if vars(owner).get(key) is not value
]
said["finders"] = [type(finder).__name__ for finder in sys.meta_path if finder not in finders]
said["same handlers"] = logging.getLogger().handlers == root
import delora_kernels.dispatch
said["requested"] = delora_kernels.dispatch.requested()
dk.flops.register()
from torch.utils import flop_counter
said["flops"] = torch.ops.delora_kernels.project in flop_counter.flop_registry
"""

WITHOUT_PEFT = """
import os
if os.fork() == 0:
    sys.modules["peft"], said = None, {}
    try: dk.accelerate
    except ImportError as error: said["accelerate"] = str(error)
else:
    assert os.wait()[1] == 0
"""
"""A fork of an interpreter that has asked for nothing yet, for which there is no PEFT."""


@pytest.fixture(scope="module")
def said() -> list[dict[str, Any]]:
    """What an interpreter without PEFT and one with it say that import the package, and then ask
    for what it has.
    """
    done = subprocess.run(
        [sys.executable, "-c", FRESH + WITHOUT_PEFT + DIR_AND_HELP],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        env=os.environ | {"DELORA_KERNELS_BACKEND": "eager"},
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def without_peft(said: list[dict[str, Any]]) -> dict[str, Any]:
    return said[0]


@pytest.fixture(scope="module")
def fresh(said: list[dict[str, Any]]) -> dict[str, Any]:
    return said[1]


def test_import_touches_neither_cuda_nor_heavy_packages(fresh: dict[str, Any]) -> None:
    """None but those that torch itself loads."""
    assert not fresh["cuda"]
    assert fresh["heavy"] == fresh["heavy before"]


def test_import_loads_the_ops_and_what_is_below_them_alone(fresh: dict[str, Any]) -> None:
    """What costs time comes when it is asked for: functions, modules, reports, the oracles of
    testing, PEFT's part. The ops are there at once: a saved program that calls them needs them.
    """
    parts = {name.split(".")[1] for name in fresh["loaded"]}
    assert parts == {
        *("backends", "call", "diagnostics", "dispatch", "dtypes", "op_arguments", "op_registry", "ops"),
        *("renamed", "version"),
    }
    of_diagnostics = {name for name in fresh["loaded"] if name.startswith("delora_kernels.diagnostics.")}
    assert of_diagnostics == {"delora_kernels.diagnostics.proof"}
    assert not [name for name in fresh["loaded"] if name.startswith("delora_kernels.backends.triton")]
    assert not [name for name in fresh["loaded"] if name.startswith("delora_kernels.backends.cuda")]


def test_import_changes_nothing_of_other_packages_but_the_list_of_finders(fresh: dict[str, Any]) -> None:
    """Every attribute of every module, and of every class in them, that was there before is the
    same object after.
    """
    assert fresh["changed"] == []
    assert fresh["finders"] == ["_Renamed"]
    assert fresh["same handlers"]


@pytest.mark.parametrize("peft", [True, False])
def test_dir_and_help_show_what_is_public_and_nothing_else(peft: bool, request: pytest.FixtureRequest) -> None:
    said = request.getfixturevalue("fresh" if peft else "without_peft")
    needs_peft = set(dk._NEED_PEFT)
    expected = [name for name in PUBLIC["delora_kernels"] if name != "__version__" and (peft or name not in needs_peft)]
    assert said["dir"] == expected
    text = said["help"]
    documented = text[text.index("CLASSES") if peft else text.index("FUNCTIONS") :]
    for name in sorted(needs_peft | {"explain", "expert_report"}):
        assert (f" {name}(" in documented) == (peft or name not in needs_peft), name
    assert " proof" not in documented


def test_flops_are_reached_as_the_readme_says(fresh: dict[str, Any]) -> None:
    assert fresh["flops"]


def test_environment_variable_is_read(fresh: dict[str, Any]) -> None:
    assert fresh["requested"] == "eager"


def test_without_peft_accelerate_says_what_to_install(without_peft: dict[str, Any]) -> None:
    said = without_peft["accelerate"]
    assert said.startswith("delora_kernels.accelerate needs PEFT and Transformers: pip install 'delora-kernels[peft]'")


def test_public_names() -> None:
    for module, names in PUBLIC.items():
        there = importlib.import_module(module).__all__
        assert sorted(there) == sorted(names), f"{module}: {sorted({*there} ^ {*names})}"
    with pytest.raises(AttributeError, match="has no attribute 'speed_up'"):
        _ = dk.speed_up


def test_functions_have_the_references_names_and_arguments() -> None:
    """delora_kernels.reference: the same signature with dropout_mask in the place of dropout_p and
    seed.

    What changes only memory (saved) or what backward adds of itself (balance_coef, z_coef) has no
    place there.
    """
    for name in functional.CALLS:
        ours = inspect.signature(getattr(functional, name)).parameters
        theirs = inspect.signature(getattr(reference, name)).parameters
        masks = {"dropout"} if name == "moe_lora_linear" else set()  # the mask's own shape says it to the reference
        masks |= {"dropout_p", "seed", "saved", "balance_coef", "z_coef"}
        assert [p for p in ours if p not in masks] == [p for p in theirs if p != "dropout_mask"]
        assert all(ours[p].default == theirs[p].default for p in theirs if p in ours)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_have_every_op(name: str) -> None:
    """Their own, or another backend's: `ops.py` asks the backend of the call for each."""
    theirs = importlib.import_module(f"delora_kernels.backends.{name}")
    eager = importlib.import_module("delora_kernels.backends.eager")
    needed = (*ops.NAMES, "wants_scaled", "supports")
    assert all(callable(getattr(backend, name)) for backend in (eager, theirs) for name in needed)
