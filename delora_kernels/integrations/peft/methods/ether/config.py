"""EtherConfig and EtherPlusConfig: what a person who uses PEFT says about block reflections."""

from dataclasses import dataclass

from delora_kernels import checks
from delora_kernels.functional.ether import BLOCKS
from delora_kernels.integrations.peft.methods import register
from delora_kernels.integrations.peft.methods.base import TargetedConfig
from delora_kernels.nn.ether import SIDES


@dataclass
class EtherConfig(TargetedConfig):
    """ETHER as a PEFT method: a frozen linear between block reflections.

        model = peft.get_peft_model(base_model, dk.EtherConfig(n_blocks=4,
        target_modules="all-linear"))

        y = H_out W H_in drop(x) + bias,   H = blockdiag(I − 2 û_i û_iᵀ)

    The vectors start Kaiming uniform, as in the authors' code: **the model does not start as the
    base model**.

    Args:
        n_blocks: Blocks of each reflected side, a divisor of its features in every target.
        side: "input" (as in the paper), "output" or "both".
        blocks: "paper" or "official" (what the authors' code does with several blocks on the input
            side).
        dropout: Probability of dropping an element of the whole layer's input, in training mode.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as
            PEFT's LoraConfig.

    Raises:
        TypeError, ValueError: an option does not fit; the text names it and the remedy.
        RuntimeError: the installed PEFT can't be given a method.

    Source: Bini et al., "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane
    Reflections" (arXiv:2405.20271); mwbini/ether.
    """

    n_blocks: int = 1
    side: str = "input"
    blocks: str = "paper"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = register.peft_type("ether")
        _check(self)


@dataclass
class EtherPlusConfig(TargetedConfig):
    """ETHER+ as a PEFT method: a frozen linear between relaxed block reflections.

        model = peft.get_peft_model(base_model, dk.EtherPlusConfig(n_blocks=4,
        target_modules="all-linear"))

        y = H_out W H_in drop(x) + bias,   H = blockdiag(I − û_i û_iᵀ + v̂_i v̂_iᵀ)

    Args:
        n_blocks, blocks, dropout: as in `EtherConfig`.
        side: "both" (as in the paper), "input" or "output".
        init_weights: Start v at −u, where the layer is the base layer up to rounding, as the
            authors' code does. False: v random like u; for tests.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as
            PEFT's LoraConfig.

    Raises:
        TypeError, ValueError: an option does not fit; the text names it and the remedy.
        RuntimeError: the installed PEFT can't be given a method.

    Source: Bini et al. (arXiv:2405.20271), ETHER+; mwbini/ether.
    """

    n_blocks: int = 1
    side: str = "both"
    blocks: str = "paper"
    dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = register.peft_type("ether_plus")
        _check(self)


def _check(config: EtherConfig | EtherPlusConfig) -> None:
    name = type(config).__name__
    config._check_positive("n_blocks", config.n_blocks)
    checks.option(name, "side", config.side, SIDES)
    checks.option(name, "blocks", config.blocks, BLOCKS)
    checks.probability(name, config.dropout)
