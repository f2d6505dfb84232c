"""axolotl: a plugin that makes the adapters of its models run fused.

    plugins:
      - delora_kernels.integrations.axolotl.DeloraKernelsPlugin
    delora_kernels_strict: true    # optional: raise unless every adapter layer can be fused

axolotl loads it by this name; nothing else imports this file, which needs axolotl. Its own LoRA
kernels and this library's layers exclude each other: they read A and B of a layer past its forward.
axolotl switches them on by itself where a configuration does not say; with this plugin it is left
off, and a configuration that asks for both raises.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from delora_kernels import checks
from delora_kernels.integrations.transformers.accelerate_callback import AccelerateCallback

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""axolotl's options that replace what the parents of adapter layers call."""


class DeloraKernelsArgs(BaseModel):
    """The options of the plugin in axolotl's configuration."""

    delora_kernels_strict: bool | None = None


class DeloraKernelsPlugin(BasePlugin):
    """Give axolotl's trainers an `AccelerateCallback`, and keep its own LoRA kernels off."""

    def get_input_args(self) -> str:
        """Return the dotted name of the plugin's options."""
        return f"{__name__}.{DeloraKernelsArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Leave axolotl's LoRA kernels off, before it decides on them.

        Args:
            cfg: The configuration as it was written.

        Raises:
            ValueError: it asks for them.
        """
        asked = [name for name in LORA_KERNELS if cfg.get(name)]
        if asked:
            got, remedy = f"{', '.join(asked)} on", "set them to false, or take the plugin out of `plugins`"
            expected = "without axolotl's own LoRA kernels, which compute the layers past their forward"
            raise checks.fail(ValueError, "DeloraKernelsPlugin", "the configuration", expected, got, remedy)
        for name in LORA_KERNELS:
            cfg[name] = False

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Return the callback that accelerates what the trainer is given, under its autocast."""
        return [AccelerateCallback(strict=bool(cfg.get("delora_kernels_strict")))]
