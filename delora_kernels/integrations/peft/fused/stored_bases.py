"""PEFT's LoRA layers on stored bases: which classes they are, and how one runs fused.

PEFT has a class of its own for each library that stores weights (bitsandbytes, GPTQModel, HQQ,
torchao); they hold the same parts as its LoRA linear and add the same branch. Nothing here imports
those libraries: a class is known by its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

from delora_kernels.bases.stored import StoredBase, dotted_name
from delora_kernels.diagnostics import versions
from delora_kernels.integrations.peft.fused.beside_base import BesideRun

CLASSES = {
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.gptq.GPTQLoraLinear",
    "peft.tuners.lora.hqq.HqqLoraLinear",
    "peft.tuners.lora.torchao.TorchaoLoraLinear",
}
"""Dotted names of PEFT's LoRA layers whose forward is that of its LoRA linear on another base."""


def is_on_stored_base(kind: type) -> bool:
    """Whether `kind` is one of PEFT's LoRA layers on stored bases."""
    return dotted_name(kind) in CLASSES


def peft_class_on_stored_base(kind: type) -> type:
    """Return which of them `kind` is, or is derived from."""
    return next(each for each in kind.__mro__ if is_on_stored_base(each))


def class_with_forward(kind: type) -> type:
    """Return the class of PEFT's that defines the forward of one of them."""
    return next(each for each in kind.__mro__ if "forward" in vars(each))


def why_not_peft(what: str = "its layers on stored bases") -> str | None:
    """Say why `what` of the installed PEFT is left alone, or None: it is known of tested versions
    alone.
    """
    version = versions.installed("peft")
    state = versions.status("peft", version)
    if state == versions.TESTED:
        return None
    return f"PEFT {version or ''} is {versions.in_words('peft', state)}: {what} are not fused"


@dataclass(frozen=True)
class StoredRun:
    """x → y of a layer on a stored base.

    Args:
        base: The base, read for this call.
        run: The fused function of x.
        beside: Reason → what computes the layer where its base multiplies such an x itself, or the
            reason.
    """

    base: StoredBase
    run: Callable[[Tensor], Tensor]
    beside: Callable[[str], BesideRun | str]

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.run_on(x)(x)
        return y

    def run_on(self, x: Tensor) -> Any:
        """Return what computes the layer of such an x."""
        reason = self.base.why_not_input(x)
        return self.run if reason is None else self.beside(reason)

    def why_not(self, x: Tensor) -> str | None:
        """Say why x is left to PEFT's own forward, or None."""
        reason = self.base.why_not_input(x)
        return reason if reason is None or isinstance(self.beside(reason), str) else None


def lora_linear_of(layer: Any) -> bool:
    """Whether a layer, fused or not, is PEFT's LoRA on a linear."""
    return isinstance(layer, LoraLinear) or any(map(is_on_stored_base, type(layer).__mro__))
