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


def test_import_touches_neither_cuda_nor_optional_packages() -> None:
    loaded = run(
        "import sys, delora_kernels, torch; assert not torch.cuda.is_initialized();"
        "print([name for name in ('triton', 'peft', 'transformers', 'rich', 'matplotlib') if name in sys.modules])"
    )
    assert loaded == run(
        "import sys, torch;"
        "print([name for name in ('triton', 'peft', 'transformers', 'rich', 'matplotlib') if name in sys.modules])"
    )


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
        assert sorted(importlib.import_module(module).__all__) == sorted(names)
    with pytest.raises(AttributeError, match="has no attribute 'speed_up'"):
        _ = dk.speed_up


def test_functions_have_the_references_names_and_arguments() -> None:
    """delora_kernels.reference: the same signature with dropout_mask in the place of dropout_p and seed.

    What changes only memory (saved) or what backward adds of itself (balance_coef, z_coef) has no place there.
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
