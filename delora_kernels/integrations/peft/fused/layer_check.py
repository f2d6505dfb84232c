"""Whether the layers of an untested PEFT still are the ones that the fused forward replaces.

Two checks. What PEFT's forward reads: a name that no tested version reads is an option whose effect
a fused forward would leave out, even where it is off by default. And the numbers: a tiny layer in
float64, PEFT's forward and backward against the fused ones.
"""

import importlib
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import peft
import torch
from torch import Tensor, nn

from delora_kernels.diagnostics import versions
from delora_kernels.integrations.peft.fused import verdicts
from delora_kernels.integrations.peft.fused.swap import accelerate

_STATE = {
    "active_adapters": "active_adapter isinstance str",
    "disable_adapters": "_disable_adapters",
    "merged": "bool merged_adapters",
    "get_base_layer": "base_layer hasattr",
}
_CACHE = "ENABLE_DORA_CACHING _cache_clear _cache_get _cache_store get training"
READS: dict[str, dict[str, str]] = {
    "lora": {
        "peft.tuners.lora.layer.Linear.forward": "VARIANT_KWARG_KEYS _cast_input_dtype _check_forward_args "
        "_mixed_batch_forward active_adapters base_layer disable_adapters dtype forward keys lora_A lora_B "
        "lora_dropout lora_variant merged pop scaling to unmerge weight",
        "peft.tuners.lora.layer.Linear._check_forward_args": "ValueError get len merged use_dora",
        "peft.tuners.lora.layer.Linear._cast_input_dtype": "dtype getattr to",
    }
    | {f"peft.tuners.lora.layer.Linear.{name}": reads for name, reads in _STATE.items()},
    "dora": {
        "peft.tuners.lora.variants.DoraLinearVariant.forward": "Identity get_base_layer isinstance lora_A lora_B "
        "lora_dropout lora_magnitude_vector nn scaling training",
        "peft.tuners.lora.dora.DoraLinearLayer.forward": "F T bias dequantize_module_weight detach device dtype eye "
        "fan_in_fan_out get_lora_weight get_weight_norm linear shape to torch transpose view weight",
        "peft.tuners.lora.dora.DoraLinearLayer.get_weight_norm": f"{_CACHE} dtype fan_in_fan_out linalg norm to torch "
        "transpose",
    },
    "delora": {
        "peft.tuners.delora.layer.DeloraLinear.forward": "active_adapters base_layer clamp delora_A delora_B "
        "delora_dropout delora_lambda delora_w_norm disable_adapters dtype functional linear merged nn norm r to torch "
        "unmerge zeros_like",
    }
    | {f"peft.tuners.delora.layer.DeloraLinear.{name}": reads for name, reads in _STATE.items()},
}
"""Method → what PEFT computes its layer with → every name that this reads in one of the tested
versions.

The rest of what a forward of these versions calls (DoraLinearLayer.get_lora_weight since 0.19) has
no say but in the numbers. A DoRA layer is a LoRA layer too.
"""


def judge_installed_peft() -> None:
    """Fill `verdicts` for the installed PEFT: all kinds can be fused in a tested version, another
    one is checked.
    """
    verdicts.reasons.update(dict.fromkeys(verdicts.METHODS))  # the check itself runs fused layers
    verdicts.reasons.update(_checked(versions.installed("peft")))
    verdicts.against_experts[:] = _against_experts(versions.installed("peft"))


def _checked(version: str | None) -> Mapping[str, str | None]:
    state = versions.status("peft", version)
    if state == versions.TESTED:
        return dict.fromkeys(verdicts.METHODS)
    peft = f"PEFT {version or ''} is {versions.in_words('peft', state)}".replace("  ", " ")
    if state in (versions.MISSING, versions.OLDER):
        return dict.fromkeys(verdicts.METHODS, peft)
    names = {"lora": "LoRA", "dora": "DoRA", "delora": "DeLoRA"}
    found = {method: _difference(method) for method in verdicts.METHODS}
    return {
        method: None if reason is None else f"{peft} and its {names[method]} layer differs: {reason}"
        for method, reason in found.items()
    }


def _against_experts(version: str | None) -> list[str]:
    """Adapters of experts modules are fused with a tested PEFT alone: how it packs their factors is
    no part of its interface.
    """
    state = versions.status("peft", version)
    if state == versions.TESTED:
        return []
    return [
        f"PEFT {version or ''} is {versions.in_words('peft', state)}: its factors of experts may be packed otherwise"
    ]


def _difference(method: str) -> str | None:
    """Say how the installed PEFT's layer differs from what is fused, or None; whatever goes wrong
    is a difference.
    """
    try:
        return difference(method)
    except Exception as error:
        return f"checking it raised {type(error).__name__}: {error}"


def difference(method: str) -> str | None:
    """How the installed PEFT's layer of `method` differs from the ones that are fused, or None.

    Args:
        method: "lora", "dora" or "delora".
    """
    for part in ("lora", "dora") if method == "dora" else (method,):
        for path, known in READS[part].items():
            unknown = sorted(reads(_find(path)) - set(known.split()))
            if unknown:
                return f"{'.'.join(path.split('.')[-2:])} reads {', '.join(unknown)}, as in no tested version"
    return _numbers(method)


def reads(function: Any) -> set[str]:
    """Every attribute and global that a function or property reads, with those of functions it
    nests or wraps.
    """
    function = getattr(function, "fget", function)
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    wrapped = [cell.cell_contents for cell in function.__closure__ or ()]
    return names.union(*(reads(inner) for inner in wrapped if isinstance(inner, types.FunctionType)))


def _find(path: str) -> Any:
    """Return the method or property at peft.tuners.<module>.<class>.<name>."""
    module, kind, name = path.rsplit(".", 2)
    return getattr(getattr(importlib.import_module(module), kind), name)


def _numbers(method: str) -> str | None:
    """Where PEFT's numbers are not the fused ones, or None: in training, in eval with dropout, with
    two adapters.
    """
    with _as_at_start():
        for training, dropout_p, adapters in ((True, 0.0, 1), (False, 0.5, 1), (True, 0.0, 2)):
            if adapters > 1 and method == "dora":
                continue  # never fused
            model = _model(method, dropout_p, adapters).train(training)
            theirs = _step(model)
            accelerate(model, strict=True, prove=False)
            ours = _step(model)
            for name, value in theirs.items():
                error = (ours[name] - value).abs().max() / value.abs().max() if name in ours else torch.inf
                if not error <= 1e-9:  # both are float64 and sum at most a dozen products; nan is an error too
                    return f"{name} is off by {error:.0e} of its maximum"
    return None


@contextmanager
def _as_at_start() -> Iterator[None]:
    """Whatever the caller is in the middle of: derivatives, no autocast, the CPU; its random
    numbers are kept.
    """
    with ExitStack() as stack:
        for context in (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
            warnings.catch_warnings(),
        ):
            stack.enter_context(context)
        warnings.simplefilter("ignore")  # PEFT's, of the second adapter
        yield


def _model(method: str, dropout_p: float, adapters: int) -> nn.Module:
    """One linear of 5 inputs and 4 outputs with active adapters, every parameter random."""
    config: Any
    if method == "delora":
        config = peft.DeloraConfig(r=2, module_dropout=dropout_p, target_modules=["linear"])
    else:
        config = peft.LoraConfig(
            r=2, lora_alpha=3, lora_dropout=dropout_p, use_dora=method == "dora", target_modules=["linear"]
        )
    model = nn.ModuleDict({"linear": nn.Linear(5, 4)}).double()
    names = [f"adapter{index}" for index in range(adapters)]
    for name in names:
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    layer: Any = model.double()["linear"]
    layer.set_adapter(names)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            parameter.requires_grad_()
    return layer


def _step(layer: nn.Module) -> dict[str, Tensor]:
    """Return the output and every gradient of one pass."""
    layer.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
    grads = {f"the gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"its output": y.detach(), "the gradient of its input": x.grad} | grads
