"""axolotl's plugin interface, as far as a plugin and who loads it see it: the methods of its base
class, how a plugin is loaded by name, what is asked of it in which order, and its dictionary that
has None for what is missing.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest

HOOKS = (
    *("register", "pre_model_load", "post_model_build", "pre_lora_load", "post_lora_load", "post_model_load"),
    *("post_trainer_create", "create_optimizer", "create_lr_scheduler", "get_trainer_cls", "get_training_args"),
    *("get_training_args_mixin", "get_input_args", "load_datasets", "load_adapter", "post_train", "post_train_unload"),
)


class BasePlugin:
    """Every hook does nothing; those for callbacks and capabilities have none."""

    def __getattr__(self, name: str) -> Any:
        if name in HOOKS:
            return lambda *args, **kwargs: None
        raise AttributeError(name)

    def get_adapter_capabilities(self) -> list[Any]:
        return []

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []


class DictDefault(dict[str, Any]):
    """A configuration."""

    def __missing__(self, key: str) -> None:
        return None


def put_in_place(patch: pytest.MonkeyPatch) -> None:
    """Let `axolotl.integrations.base` be imported, and the plugin anew."""
    names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
    for name in names:
        patch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].__dict__["BasePlugin"] = BasePlugin
    patch.delitem(sys.modules, "delora_kernels.integrations.axolotl", raising=False)


def load(name: str) -> Any:
    """A plugin by its dotted name."""
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), kind)()


def prepared(written: dict[str, Any]) -> tuple[list[Any], DictDefault]:
    """Load and register the plugins of a configuration, and decide as axolotl does on what it does
    not say.
    """
    cfg = DictDefault(written)
    plugins = [load(name) for name in cfg["plugins"]]
    for plugin in plugins:
        plugin.register(cfg)
    for plugin in plugins:
        options = plugin.get_input_args()
        if options is not None:
            module, _, kind = options.rpartition(".")
            cfg.update(getattr(importlib.import_module(module), kind)(**cfg).model_dump(exclude_unset=True))
    for name in ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"):
        if cfg.get(name) is None:
            cfg[name] = True
    return plugins, cfg
