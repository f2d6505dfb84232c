"""Registering a method with PEFT from outside: the enum's entry, the tables, again, and what can't
be done.
"""

import copy
import enum
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import mapping
from peft.tuners.ia3 import IA3Model
from peft.utils import peft_types

import delora_kernels as dk
from delora_kernels.diagnostics import versions
from delora_kernels.integrations.peft.methods import register

pytestmark = pytest.mark.oldest_peft


@dataclass
class OddConfig(peft.IA3Config):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = register.peft_type("odd")


class OddModel(IA3Model):
    prefix = "odd_"


@pytest.fixture
def odd() -> Iterator[Any]:
    """The method registered; PEFT is left as it was."""
    kind = peft_types.PeftType
    before = [dict(table) for table in _tables()]
    register.register("odd", OddConfig, OddModel)
    yield kind
    for table, kept in zip(_tables(), before, strict=True):
        table.clear()
        table.update(kept)
    _forget(kind, "ODD")


def _forget(kind: Any, name: str) -> None:
    type.__delattr__(kind, name)
    kind._member_names_.remove(name)
    del kind._member_map_[name], kind._value2member_map_[name]
    if hasattr(kind, "_hashable_values_"):
        kind._hashable_values_.remove(name)


def _tables() -> list[Any]:
    return [
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    ]


def test_entry_is_a_member_like_the_others(odd: Any) -> None:
    member = odd.ODD
    assert isinstance(member, odd)
    assert isinstance(member, str)
    assert member is odd("ODD") is odd["ODD"] is register.peft_type("odd") is copy.deepcopy(member)
    assert pickle.loads(pickle.dumps(member)) is member
    assert "ODD" in list(odd)
    assert list(odd)[-1] is member
    assert (member.name, member.value, hash(member), json.dumps(member)) == ("ODD", "ODD", hash("ODD"), '"ODD"')
    assert type(odd.LORA) is odd  # the others are what they were
    assert len(odd) == len(set(odd.__members__.values()))


def test_registered_method_makes_saves_and_loads_configs(odd: Any, tmp_path: Path) -> None:
    made = peft.get_peft_config({"peft_type": "ODD", "target_modules": ["a"]})
    assert isinstance(made, OddConfig)
    made.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ODD"
    loaded = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, OddConfig)
    assert loaded.peft_type is odd.ODD
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[odd.ODD] is OddModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[odd.ODD] == "odd_"


def test_all_methods_of_this_library_are_registered() -> None:
    dk.register_peft_methods()
    dk.register_peft_methods()
    config, tuner, prefix = (table["GOAT"] for table in _tables())
    assert (config, tuner.__name__, prefix) == (dk.GoatConfig, "GoatModel", "goat_")
    assert config(target_modules=["a"]).peft_type is peft_types.PeftType("GOAT")
    for name, config in (("ETHER", dk.EtherConfig), ("ETHER_PLUS", dk.EtherPlusConfig)):
        assert _tables()[0][name] is config
        assert config(target_modules=["a"]).peft_type is peft_types.PeftType(name)
    prefixes = [_tables()[2][name] for name in ("ETHER", "ETHER_PLUS", "GOAT")]
    assert not any(one in other for one in prefixes for other in prefixes if one is not other)


def test_again_is_harmless(odd: Any) -> None:
    before = [dict(table) for table in _tables()], list(odd)
    register.register("odd", OddConfig, OddModel)
    assert ([dict(table) for table in _tables()], list(odd)) == before


def test_another_method_of_that_name_is_refused(odd: Any) -> None:
    with pytest.raises(RuntimeError, match="odd can't be registered.*its tables have .*OddConfig"):
        register.register("odd", peft.IA3Config, OddModel)


def test_prefix_of_another_method_is_refused(odd: Any) -> None:
    try:
        with pytest.raises(RuntimeError, match="even can't be .*its method ODD has the prefix 'odd_' already"):
            register.register("even", OddConfig, OddModel)
    finally:
        _forget(odd, "EVEN")


@pytest.mark.parametrize("name", ["register_peft_method", "PeftType"])
def test_peft_that_keeps_its_methods_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = peft_types.PeftType
    monkeypatch.delattr(peft_types if name == "PeftType" else peft.utils, name)
    row = versions.TABLE["peft"]
    message = f"never can't be registered with PEFT .*{name}.*install a PEFT from {row.oldest} to {row.newest}"
    with pytest.raises(RuntimeError, match=message):
        register.register("never", OddConfig, OddModel)
    if name != "PeftType":
        _forget(kind, "NEVER")


def test_entry_that_does_not_work_is_found_out() -> None:
    class Odd(str, enum.Enum):
        LORA = "LORA"

        @classmethod
        def _missing_(cls, value: Any) -> Any:
            return cls.LORA

    assert register._entry(Odd, "GOAT") is Odd("GOAT")
    del Odd._value2member_map_["GOAT"]
    with pytest.raises(RuntimeError, match="no working entry GOAT"):
        register._entry(Odd, "GOAT")
