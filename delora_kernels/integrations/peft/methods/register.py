"""Makes a method of this library a method of PEFT: `get_peft_model`, saving and loading then know
it by its config.

    # as peft.tuners.<method>.__init__ does with register_peft_method
    register("goat", GoatConfig, GoatModel)

PEFT keeps its methods in tables, which `register_peft_method` fills, and names them by an enum,
`PeftType`, that is meant to be closed and that no call of PEFT's adds to: `peft_type` adds the
entry. (aenum's `extend_enum` writes the same private tables; for these few lines everyone who has
PEFT would need it too.) All of it is checked afterwards,
so that a PEFT that keeps its methods otherwise is an error here and now, not a wrong adapter later.
"""

import enum
import importlib
from typing import Any

from delora_kernels.diagnostics import versions

METHODS = ("ether", "goat")
"""The packages beside this file that register methods when they are imported."""


def register_peft_methods() -> None:
    """Register every method of this library with PEFT, so that it loads adapters of them; again is
    harmless.

        dk.register_peft_methods()
        model = peft.PeftModel.from_pretrained(base_model, "folder")  # of a GOAT or ETHER adapter

    Naming a method's config, such as `dk.GoatConfig`, registers that method too.

    Raises:
        RuntimeError: the installed PEFT doesn't allow it.
    """
    for name in METHODS:
        importlib.import_module(f"delora_kernels.integrations.peft.methods.{name}")


def peft_type(name: str) -> Any:
    """Return the entry of PEFT's enum `PeftType` for the method `name`, added if it isn't there.

    Args:
        name: The method in lower case, such as "goat".

    Raises:
        RuntimeError: the installed PEFT doesn't allow it.
    """
    try:
        from peft.utils.peft_types import PeftType

        return _entry(PeftType, name.upper())
    except Exception as error:
        raise _refused(name, f"{type(error).__name__}: {error}") from error


def register(name: str, config: type, model: Any) -> None:
    """Register a method with PEFT, under the prefix `model.prefix` of its parameters; again is
    harmless.

    Args:
        name: The method in lower case, such as "goat": `peft_type` in saved configs is its upper
            case.
        config: The subclass of PeftConfig.
        model: The subclass of BaseTuner.

    Raises:
        RuntimeError: the installed PEFT has a method or a prefix of this name from elsewhere, or
            doesn't allow it.
    """
    key = peft_type(name)
    try:
        from peft import mapping
        from peft.utils import register_peft_method

        prefixes = mapping.PEFT_TYPE_TO_PREFIX_MAPPING
        taken = [other for other, prefix in prefixes.items() if prefix == model.prefix and other != key]
        if not taken and key not in mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)
        tables = (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING, prefixes)
        got = tuple(table.get(key) for table in tables)
    except Exception as error:
        raise _refused(name, f"{type(error).__name__}: {error}") from error
    if taken:
        raise _refused(name, f"its method {taken[0].value} has the prefix {model.prefix!r} already")
    if got != (config, model, model.prefix):
        raise _refused(name, f"its tables have {got} for it")


def _entry(kind: Any, name: str) -> Any:
    """Return the member `name` = "name" of the string enum `kind`, added as enum's own metaclass
    adds one.
    """
    if name not in kind.__members__:
        member = str.__new__(kind, name)
        member._name_ = member._value_ = name
        member.__objclass__ = kind
        member._sort_order_ = len(kind.__members__)
        type.__setattr__(kind, name, member)  # enum's own refuses
        kind._member_names_.append(name)
        kind._member_map_[name] = kind._value2member_map_[name] = member
        if hasattr(kind, "_hashable_values_"):  # Python ≥ 3.13
            kind._hashable_values_.append(name)
    member = kind[name]
    if not (isinstance(kind, enum.EnumMeta) and member is kind(name) is getattr(kind, name) and member in list(kind)):
        raise RuntimeError(f"{kind.__qualname__} has no working entry {name}")
    return member


def _refused(name: str, reason: str) -> RuntimeError:
    row = versions.TABLE["peft"]
    return RuntimeError(
        f"the method {name} can't be registered with PEFT {versions.describe('peft', versions.installed('peft'))}: "
        f"{reason}; install a PEFT from {row.oldest} to {row.newest}"
    )
