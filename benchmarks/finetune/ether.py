"""ETHER and ETHER+ in the demo: their adapters, and the same layers as their authors run them, with
W' made anew.
"""

import peft
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.ether_authors import ether_authors
from benchmarks.finetune.config import Config
from delora_kernels.integrations.peft.methods.ether import PeftEtherLinear, PeftEtherPlusLinear


def ether_config(config: Config) -> peft.PeftConfig:
    """One block a side, where the authors' code is what the paper says; ETHER on the input side,
    ETHER+ on both.
    """
    method = dk.EtherPlusConfig if config.method == "ether+" else dk.EtherConfig
    return method(n_blocks=1, target_modules="all-linear", task_type="CAUSAL_LM")


class _AsTheAuthors:
    """The layer with reflections as matrices, a transformed weight and a full weight gradient."""

    def _reflected(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = ether_authors(x, weight, **self._vectors(name))  # type: ignore[attr-defined]
        return y if bias is None else y + bias


class AuthorsEtherLinear(_AsTheAuthors, PeftEtherLinear):
    """ETHER as its authors run it."""


class AuthorsEtherPlusLinear(_AsTheAuthors, PeftEtherPlusLinear):
    """ETHER+ as its authors run it."""


def as_the_authors(model: nn.Module) -> nn.Module:
    """Make every ETHER layer of `model` run as its authors run it, in place."""
    for layer in model.modules():
        if isinstance(layer, PeftEtherLinear):
            layer.__class__ = AuthorsEtherLinear
        elif isinstance(layer, PeftEtherPlusLinear):
            layer.__class__ = AuthorsEtherPlusLinear
    return model
