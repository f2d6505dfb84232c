"""pytest plugin: PEFT's own tests, run for the methods that this library gives to PEFT.

    git clone https://github.com/huggingface/peft && cd peft    # its tests import diffusers too
    export PYTHONPATH=src:HERE            # HERE: this folder
    python -m pytest -o addopts= -p our_methods tests/test_custom_models.py

PEFT's tests are parametrised over lists of cases; cases of GOAT, ETHER and ETHER+ are put into
these lists, and what is of other methods is left out. What can't be asked of a method is skipped
with its reason, as PEFT does with its own.
"""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

import delora_kernels as dk

OURS = (dk.GoatConfig, dk.EtherConfig, dk.EtherPlusConfig)

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "GOAT": (dk.GoatConfig, {"r": 2, "num_experts": 4}),
    "GOAT small": (dk.GoatConfig, {"r": 1, "num_experts": 2, "top_k": 1, "renormalize": False, "scaling": 1.0}),
    "GOAT without its start": (dk.GoatConfig, {"r": 1, "num_experts": 2, "save_start": False}),
    "GOAT zero": (dk.GoatConfig, {"r": 2, "num_experts": 4, "init_weights": "zero", "scaling": "alpha/r"}),
    "GOAT dense": (dk.GoatConfig, {"r": 2, "num_experts": 3, "top_k": None, "shared_A": True, "scaling": "rslora"}),
    "GOAT normalised": (dk.GoatConfig, {"r": 2, "num_experts": 4, "normalize": True, "dropout": 0.1}),
    "GOAT one expert": (dk.GoatConfig, {"r": 2, "num_experts": 1, "top_k": 1, "init_weights": "zero"}),
    "GOAT one expert with a start": (dk.GoatConfig, {"r": 1, "num_experts": 1, "top_k": 1, "scaling": 1.0}),
    "GOAT dora": (dk.GoatConfig, {"r": 1, "num_experts": 2, "use_dora": True, "dropout": 0.1}),
    "GOAT dora of one expert": (dk.GoatConfig, {"r": 2, "num_experts": 1, "top_k": 1, "use_dora": True}),
    "ETHER": (dk.EtherConfig, {}),
    "ETHER both sides": (dk.EtherConfig, {"n_blocks": 2, "side": "both"}),
    "ETHER+": (dk.EtherPlusConfig, {"n_blocks": 2}),
    "ETHER+ input": (dk.EtherPlusConfig, {"side": "input", "dropout": 0.1}),
}
SIZES = {"lin0": (10, 20), "lin1": (20, 2), "conv1d": (5, 1)}
"""In- and out-features of the layers that are adapted."""


def _fits(config: Any, options: dict[str, Any], modules: list[str]) -> bool:
    sizes = [size for module in modules for size in SIZES[module]]
    if config is dk.GoatConfig:
        made = config(**options)
        return made.start == "zero" or made.num_experts * made.r <= min(sizes)
    blocks = config(**options).n_blocks
    return all(size % blocks == 0 for size in sizes) and min(sizes) > blocks  # a block of one feature can't turn


def _cases() -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """As PEFT has them for its own methods: one layer or two, a name or a list, with
    modules_to_save, a Conv1D.
    """
    for kind, (config, options) in KINDS.items():
        for number, modules in enumerate((["lin0"], ["lin1"], ["lin0", "lin1"])):
            if _fits(config, options, modules):
                yield f"MLP {number} {kind}", "MLP", config, {"target_modules": modules} | options
        yield f"MLP 3 {kind}", "MLP", config, {"target_modules": "lin0"} | options
        yield f"MLP 4 {kind}", "MLP", config, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]} | options
        if _fits(config, options, ["conv1d"]):
            yield f"Conv1D {kind}", "EmbConv1D", config, {"target_modules": ["conv1d"]} | options


def _pairs() -> Iterator[tuple[str, str, Any, dict[str, Any], dict[str, Any]]]:
    """Two adapters on the same layer, and on different ones."""
    for kind, (config, options) in KINDS.items():
        random = {"dropout": 0.0} | ({} if config is dk.EtherConfig else {"init_weights": False})
        first, second = ({"target_modules": [name]} | options | random for name in ("lin0", "lin1"))
        yield f"{kind} same", kind, config, first, first
        if _fits(config, options, ["lin1"]):
            yield f"{kind} different", kind, config, first, second


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put our cases into PEFT's lists, to which its marks refer, before the first of them is
    used.
    """
    module = metafunc.module
    if not hasattr(module, "TEST_CASES") or module.TEST_CASES[-1][2] in OURS:
        return
    module.TEST_CASES.extend(_cases())
    module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES.extend(_pairs())
    module.ALL_PEFT_CONFIG_CLASSES.extend(OURS)
    for each in (module, sys.modules[module.PeftCommonTester.__module__]):
        for name, made in (("_skip_if_merging_not_supported", _no_mixtures), ("set_init_weights_false", _no_option)):
            if hasattr(each, name):
                setattr(each, name, made(getattr(each, name)))


def _no_mixtures(asked: Any) -> Any:
    def skip_if_merging_not_supported(model_id: str, config: Any, options: dict[str, Any]) -> None:
        if config is dk.GoatConfig and config(**options).num_experts > 1:
            pytest.skip("a mixture of experts has no single weight to merge into, and says so")
        asked(model_id, config, options)

    return skip_if_merging_not_supported


def _no_option(asked: Any) -> Any:
    def set_init_weights_false(config: Any, options: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = options if config is dk.EtherConfig else asked(config, options)  # it starts random
        return made

    return set_init_weights_false


def _why_not(test: str, config: Any, options: dict[str, Any]) -> str | None:
    """Why a test can't be passed by any adapter of this config."""
    made = config(**options)
    goat = isinstance(made, dk.GoatConfig)
    started = goat and made.start != "zero"
    if test in ("test_disable_adapters", "test_disable_adapters_with_merging") and (started or type(made) is OURS[1]):
        return "begins by asserting that a fresh adapter changes nothing: ETHER and GOAT's start do"
    if test == "test_only_params_are_updated" and goat and made.num_experts == 1:
        return "a router of one expert has nothing to learn"
    if test.startswith("test_save_load_roundtrip_fsdp_wrapped") and started:
        return "loads the tensors of an adapter without a start into one with a start, which is refused"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not of our methods, and skip what can't be asked."""
    kept, others = [], []
    for item in items:
        case = item.callspec.params if hasattr(item, "callspec") else {}
        (kept if case.get("config_cls") in OURS else others).append(item)
        if "config_kwargs" in case and case["config_cls"] in OURS:
            reason = _why_not(item.originalname, case["config_cls"], case["config_kwargs"])
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
    config.hook.pytest_deselected(items=others)
    items[:] = kept
