"""can_accelerate(): what accelerate() would do with a model, told by its configurations alone.

The model is built on the meta device, which has shapes and no memory, PEFT's adapters are put into
it there, and each layer is judged as a loaded one would be. Of a base that is to be stored in few
bits the form is known by the quantisation's name; that its numbers are those of its dense form is
found out when it is loaded, so such layers are "expected" to be fused, and no more.
"""

import copy
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftConfig, get_peft_model
from peft.tuners.delora.model import DeloraModel
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import quantizers_utils
from transformers.quantizers.base import HfQuantizer

from delora_kernels import checks
from delora_kernels.bases.plain import without_data
from delora_kernels.bases.stored import FORMS
from delora_kernels.integrations.peft import delora_on_stored_bases
from delora_kernels.integrations.peft.fused.report import LayerReport, Report
from delora_kernels.integrations.peft.fused.stored_bases import CLASSES, why_not_peft
from delora_kernels.integrations.peft.fused.swap import described
from delora_kernels.integrations.peft.verdict import State

_NAME = "can_accelerate"


class Stored(NamedTuple):
    """How a quantisation stores a linear.

    Args:
        holder: Dotted name of the class that holds the weight, as `bases.register` takes it.
        layer: Dotted name of PEFT's LoRA layer around it; "": its LoRA linear.
        dora: Whether PEFT makes that layer with DoRA.
        unless: What is read of it all the same, if loading chooses that; "": nothing is.
    """

    holder: str
    layer: str = ""
    dora: bool = True
    unless: str = ""


def can_accelerate(
    model_config: transformers.PretrainedConfig | str | PathLike[str],
    peft_config: PeftConfig,
    quantization_config: Any = None,
) -> Report:
    """Say what accelerate() would do with a model before its weights are loaded, layer by layer.

    Nothing of the size of a weight is allocated, and no random number is drawn.

    Args:
        model_config: Of the model, or the name or folder that Transformers loads it from.
        peft_config: Of its adapters, as `get_peft_model` takes it.
        quantization_config: What `from_pretrained` is to be given, such as BitsAndBytesConfig, or
            such a configuration as a dictionary; None: that of the model's own, if it has one.

    Returns:
        The report that accelerate() would give, but for what a loaded model alone shows: kernels
        are not proved, and a layer on a base in few bits has the state "expected", not "fused".

    Raises:
        TypeError: an argument is of another kind.
        ValueError: Transformers has no such model, PEFT can't adapt it or puts no layers into it
            (prompt learning), or the quantisation is not known; the text says which.
    """
    config = _model_config(model_config)
    if not isinstance(peft_config, PeftConfig):
        got, remedy = type(peft_config).__name__, "pass LoraConfig(...), DeloraConfig(...)"
        raise checks.fail(TypeError, _NAME, "peft_config", "a PEFT config", got, remedy)
    given = quantization_config if quantization_config is not None else getattr(config, "quantization_config", None)
    settings = _settings(given)
    stored = None if settings is None else _stored(settings)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), without_data():
        bare = _build(config, peft_config)
        left_out = set() if settings is None else _left_out(settings, bare)
        model = _adapt(bare, peft_config)
        layers = described(model, _NAME)
    found = [report if stored is None else _on_stored(report, layer, stored, left_out) for report, layer in layers]
    return Report(tuple(found), before_loading=True)


def _model_config(given: Any) -> transformers.PretrainedConfig:
    if isinstance(given, transformers.PretrainedConfig):
        return copy.deepcopy(given)
    if isinstance(given, str | PathLike):
        try:
            config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(given)
        except (OSError, ValueError) as error:
            got, remedy = f"{str(given)!r} ({type(error).__name__}: {error})", "look at the name or the folder"
            raise checks.fail(ValueError, _NAME, "model_config", "one that Transformers finds", got, remedy) from error
        return config
    expected, remedy = "a Transformers config, or what one is loaded from", "pass AutoConfig.from_pretrained(...)"
    raise checks.fail(TypeError, _NAME, "model_config", expected, type(given).__name__, remedy)


_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""PEFT's task type → the class that makes its model."""


def _build(config: transformers.PretrainedConfig, peft_config: PeftConfig) -> nn.Module:
    """Build the bare model: of PEFT's task, else the one that the configuration names."""
    task = getattr(peft_config.task_type, "value", peft_config.task_type)
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    by_task: list[Any] = [getattr(transformers, _BY_TASK[task])] if task in _BY_TASK else []
    autos = [*by_task, *([] if any(named) else [transformers.AutoModelForCausalLM]), transformers.AutoModel]
    kinds: list[Any] = [kind for kind in autos[: len(by_task)] if type(config) in kind._model_mapping]
    kinds += [kind for kind in named if kind is not None]
    kinds += [kind for kind in autos[len(by_task) :] if type(config) in kind._model_mapping]
    if not kinds:
        got, remedy = type(config).__name__, "models of remote code can be judged once they are loaded"
        raise checks.fail(ValueError, _NAME, "model_config", "of a model of Transformers", got, remedy)
    try:
        kind = kinds[0]
        make = kind.from_config if hasattr(kind, "_model_mapping") else kind._from_config
        model: nn.Module = make(config, attn_implementation="eager")
    except Exception as error:
        got, remedy = f"{type(error).__name__}: {error}", "load the model to see more"
        raise checks.fail(ValueError, _NAME, "model_config", "one that builds a model", got, remedy) from error
    return model


def _adapt(model: nn.Module, peft_config: PeftConfig) -> nn.Module:
    config: Any = copy.deepcopy(peft_config)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # PiSSA and others start from a weight that is not there
    try:
        return get_peft_model(model, config)
    except Exception as error:
        got, remedy = f"{type(error).__name__}: {error}", "see which modules the model has"
        raise checks.fail(ValueError, _NAME, "peft_config", "one that fits the model", got, remedy) from error


def _settings(given: Any) -> Mapping[str, Any] | None:
    """Return a quantisation config as a mapping with its method's name, or None: there is none."""
    if given is None:
        return None
    settings = given if isinstance(given, Mapping) else getattr(given, "to_dict", dict)()
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method is None:
        got, remedy = type(given).__name__, "pass what from_pretrained takes, such as BitsAndBytesConfig(...)"
        raise checks.fail(TypeError, _NAME, "quantization_config", "one of Transformers'", got, remedy)
    return {**settings, "quant_method": str(getattr(method, "value", method)), "given": given}


_GPTQ_LAYER = "peft.tuners.lora.gptq.GPTQLoraLinear"
_GPTQ_TORCH = Stored("gptqmodel.nn_modules.qlinear.torch.TorchLinear", _GPTQ_LAYER, dora=False)
_LAYERS = {
    "gptq": Stored(
        "a GPTQ linear of the kernel that is chosen at loading",
        _GPTQ_LAYER,
        dora=False,
        unless="GPTQModel's torch kernel",
    ),
    "awq": Stored("an AWQ linear", "peft.tuners.lora.awq.AwqLoraLinear"),
    "aqlm": Stored("an AQLM linear", "peft.tuners.lora.aqlm.AqlmLoraLinear"),
    "eetq": Stored("an EETQ linear", "peft.tuners.lora.eetq.EetqLoraLinear"),
    "hqq": Stored("hqq.core.quantize.HQQLinear", "peft.tuners.lora.hqq.HqqLoraLinear"),
    "fp8": Stored("transformers.integrations.finegrained_fp8.FP8Linear"),
    "compressed-tensors": Stored("an nn.Linear with compressed-tensors' forward"),
}
_TORCH_KERNEL = ("torch", "gptq_torch")
_ANY_KERNEL = (None, "auto", "auto_trainable")
"""GPTQModel's names of its torch kernel, and of none: left to itself it chooses by device, bits and
what else is installed.
"""
_TORCHAO = {"Int8WeightOnlyConfig": "Int8Tensor", "Float8WeightOnlyConfig": "Float8Tensor"}
"""torchao's configs of one form → the tensor that holds the weight."""


def _stored(settings: Mapping[str, Any]) -> Stored:
    method = settings["quant_method"]
    if method.startswith("bitsandbytes"):
        kind = "Linear8bitLt" if settings.get("load_in_8bit") or method.endswith("8bit") else "Linear4bit"
        return Stored(f"bitsandbytes.nn.modules.{kind}", f"peft.tuners.lora.bnb.{kind}")
    if method == "torchao":
        kind = type(getattr(settings["given"], "quant_type", None)).__name__
        tensor = _TORCHAO.get(kind)
        holder = f"torchao.quantization.{tensor}" if tensor else f"a torchao weight of {kind}"
        return Stored(holder, "peft.tuners.lora.torchao.TorchaoLoraLinear")
    if method == "gptq" and (backend := settings.get("backend")) not in _ANY_KERNEL:
        other = Stored(f"a GPTQ linear of the kernel {backend}", _GPTQ_LAYER, dora=False)
        return _GPTQ_TORCH if backend in _TORCH_KERNEL else other
    if method in _LAYERS:
        return _LAYERS[method]
    got, remedy = repr(method), "load the model, and print(accelerate(model))"
    expected = ", ".join(["bitsandbytes", "torchao", *_LAYERS])
    raise checks.fail(ValueError, _NAME, "quantization_config", f"of one of {expected}", got, remedy)


_LEFT_OUT = (
    "llm_int8_skip_modules",
    "modules_to_not_convert",
    "linear_weights_not_to_quantize",
    "skip_modules",
    "ignored_layers",
    "ignore",
)


def _left_out(settings: Mapping[str, Any], model: Any) -> set[str]:
    """Return the names of the linears that the quantisation leaves dense."""
    given = next((settings[key] for key in _LEFT_OUT if settings.get(key) is not None), None)
    told: list[str] | None = [given] if isinstance(given, str) else None if given is None else list(given)
    method = settings["quant_method"]
    linears = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if method == "compressed-tensors":
        return {name for name, kind in linears.items() if any(_is_ignored(name, kind, each) for each in told or ())}
    if method == "hqq":  # by its own tags: names without "model", "layers" and numbers
        skipped = {"lm_head"} if told is None else {*told}
        return {name for name in linears if _hqq_tag(name) in skipped}
    kept: Any = getattr(model, "_keep_in_fp32_modules", None)
    patterns = HfQuantizer.get_modules_to_not_convert(model, told, kept, add_default_skips=method == "awq")
    return {name for name in linears if not _converts(name, patterns)}


def _converts(name: str, patterns: list[str]) -> bool:
    """Return whether Transformers stores a linear in few bits: by its own rule, which it has as a
    function since its version 5; before, each quantisation had a copy of the older rule.
    """
    own = getattr(quantizers_utils, "should_convert_module", None)
    if own is not None:
        return bool(own(name, patterns))
    last = name.rpartition(".")[2]
    return last not in patterns and not any(f"{key}." in name or key == name for key in patterns)


def _is_ignored(name: str, kind: type[nn.Module], target: str) -> bool:
    """Return whether compressed-tensors' `ignore` has a module: a name, a class, or "re:" and a
    pattern of names from their start.
    """
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name or target in {each.__name__ for each in kind.__mro__}


def _hqq_tag(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _on_stored(report: LayerReport, layer: Any, stored: Stored, left_out: set[str]) -> LayerReport:
    """Describe a layer whose base is to be stored otherwise."""
    base = layer.get_base_layer()
    own = getattr(type(layer), "fused_method", None)
    bare_name = report.name.removeprefix("base_model.model.")
    if type(base) not in (nn.Linear, Conv1D) or bare_name in left_out or report.reason is not None:
        return report
    if report.method == "delora":
        allowed = DeloraModel._create_new_module is delora_on_stored_bases._create_new_module
        if not (allowed and stored.holder in FORMS):
            return _otherwise(report, State.OWN_FORWARD, f"PEFT makes no DeLoRA layer on {_named(stored.holder)}")
    elif own is None and stored.layer and stored.layer not in CLASSES:
        kind = stored.layer.removeprefix("peft.tuners.")
        return _otherwise(report, State.OWN_FORWARD, f"{kind} layers are not fused")
    if report.method == "dora" and not stored.dora:
        return _otherwise(report, State.OWN_FORWARD, f"PEFT makes no DoRA layer on {_named(stored.holder)}")
    if own is None and stored.layer and report.method != "delora" and (reason := why_not_peft()) is not None:
        return _otherwise(report, State.OWN_FORWARD, reason)
    if stored.holder in FORMS:
        reason = f"its base will be {_named(stored.holder)}, whose numbers are compared when it is loaded"
        return _otherwise(report, State.EXPECTED, reason)
    beside: State = getattr(type(layer), "beside_base", State.RANK_TERM)
    beside = State.OWN_FORWARD if report.method == "dora" else beside
    reason = f"its base will be {_named(stored.holder)}, which runs its own forward"
    return _otherwise(report, beside, reason + (f" unless it is {stored.unless}" if stored.unless else ""))


def _named(holder: str) -> str:
    return holder if " " in holder else f"a {holder}"


def _otherwise(report: LayerReport, state: State, reason: str) -> LayerReport:
    return LayerReport(report.name, report.method, reason, deferred=state == State.EXPECTED, state=state)
