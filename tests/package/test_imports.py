"""The package's surface: what importing costs, and what is public."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

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
        "__version__",
        "accelerate",
        "expert_report",
        "explain",
        "export_lora",
        "flops",
        "functional",
        "import_goat",
        "merge_mean_gate",
        "nn",
        "reference",
        "register_peft_methods",
        "restore",
        "use_backend",
        "watch_experts",
    ],
    "delora_kernels.nn": [
        "AdapterLinear",
        "DeLoRALinear",
        "DeLoRAMoELinear",
        "DoRALinear",
        "EtherLinear",
        "EtherPlusLinear",
        "GoatLinear",
        "LoRALinear",
        "MergeableLinear",
        "MoELoRALinear",
        "convert",
        "lambda_parameter_groups",
        "load_ether_checkpoint",
        "router_parameter_groups",
        "set_loss_scale",
    ],
}


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return done.stdout.strip()


HEAVY = ("triton", "peft", "transformers", "rich", "matplotlib", "torch.utils.flop_counter", "torch._dynamo")


def test_import_touches_neither_cuda_nor_heavy_packages() -> None:
    loaded = f"print([name for name in {HEAVY} if name in sys.modules])"
    ours = run(f"import sys, delora_kernels, torch; assert not torch.cuda.is_initialized(); {loaded}")
    assert ours == run(f"import sys, torch; {loaded}")


def test_import_loads_the_functions_and_what_is_below_them_alone() -> None:
    """What costs time comes when it is asked for: modules, reports, the oracles of
    testing, PEFT's part.
    """
    loaded = run("import sys, delora_kernels; print(*[n for n in sys.modules if n.startswith('delora_kernels.')])")
    parts = {name.split(".")[1] for name in loaded.split()}
    assert parts == {
        *("autograd", "backends", "bases", "call", "checks", "diagnostics", "dispatch", "dtypes", "op_arguments"),
        *("functional", "ops", "reference", "renamed", "version"),
    }
    of_diagnostics = {name for name in loaded.split() if name.startswith("delora_kernels.diagnostics.")}
    assert of_diagnostics == {"delora_kernels.diagnostics.proof"}
    assert "delora_kernels.backends.triton" not in loaded
    assert "delora_kernels.backends.cuda" not in loaded


def test_import_changes_nothing_of_other_packages_but_the_list_of_finders() -> None:
    """Every attribute of every module, and of every class in them, that was there before is the
    same object after.
    """
    said = run(
        "import sys, torch, numpy, logging, warnings\n"
        "def owners():\n"
        "    for name, module in list(sys.modules.items()):\n"
        "        if name == '__main__' or name.startswith('delora_kernels'): continue\n"
        "        yield name, module\n"
        "        for key, value in list(getattr(module, '__dict__', {}).items()):\n"
        "            if isinstance(value, type) and value.__module__ == name: yield f'{name}.{key}', value\n"
        "before = {what: dict(vars(owner)) for what, owner in owners() if hasattr(owner, '__dict__')}\n"
        "finders, root = list(sys.meta_path), list(logging.getLogger().handlers)\n"
        "import delora_kernels\n"
        "for what, owner in list(owners()):\n"
        "    for key, value in before.get(what, {}).items():\n"
        "        if vars(owner).get(key) is not value: print(what, key)\n"
        "print([type(finder).__name__ for finder in sys.meta_path if finder not in finders])\n"
        "print(logging.getLogger().handlers == root)"
    )
    assert said.splitlines() == ["['_Renamed']", "True"]


@pytest.mark.parametrize("peft", [True, False])
def test_dir_and_help_show_what_is_public_and_nothing_else(peft: bool) -> None:
    code = "" if peft else "import sys; sys.modules['peft'] = None\n"
    code += "import delora_kernels as dk, pydoc; text = pydoc.render_doc(dk, renderer=pydoc.plaintext)\n"
    shown, text = run(code + "print([name for name in dir(dk) if not name.startswith('__')]); print(text)").split(
        "\n", 1
    )
    needs_peft = set(dk._NEED_PEFT)
    expected = [name for name in PUBLIC["delora_kernels"] if name != "__version__" and (peft or name not in needs_peft)]
    assert shown == str(expected)
    documented = text[text.index("CLASSES") if peft else text.index("FUNCTIONS") :]
    for name in sorted(needs_peft | {"explain", "expert_report"}):
        assert (f" {name}(" in documented) == (peft or name not in needs_peft), name
    assert " proof" not in documented


def test_flops_are_reached_as_the_readme_says() -> None:
    code = "import delora_kernels, torch; delora_kernels.flops.register(); from torch.utils import flop_counter as f;"
    assert run(code + "print(torch.ops.delora_kernels.project in f.flop_registry)") == "True"


def test_without_peft_accelerate_says_what_to_install() -> None:
    text = run(
        "import sys; sys.modules['peft'] = None\n"
        "import delora_kernels as dk\n"
        "try: dk.accelerate\n"
        "except ImportError as error: print(error)"
    )
    assert text.startswith("delora_kernels.accelerate needs PEFT and Transformers: pip install 'delora-kernels[peft]'")


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


def test_environment_variable_is_read(tmp_path: Path) -> None:
    code = "import delora_kernels.dispatch as d; print(d.requested())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        env=os.environ | {"DELORA_KERNELS_BACKEND": "eager"},
        check=True,
    )
    assert done.stdout.strip() == "eager"
