"""Optimizer groups: the few parameters that want a learning rate of their own, and everything
else.
"""

from typing import Any

from torch import nn

from delora_kernels import checks
from delora_kernels.nn.delora import DeLoRALinear
from delora_kernels.nn.delora_moe import DeLoRAMoELinear
from delora_kernels.nn.moe import MoELoRALinear


def lambda_parameter_groups(model: nn.Module, lr: float, lam_lr: float, **common: Any) -> list[dict[str, Any]]:
    """Return the trainable parameters of `model` as optimizer groups, every λ of DeLoRA in one with
    its own learning rate.

        optimizer = torch.optim.AdamW(lambda_parameter_groups(model, lr=1e-3, lam_lr=1e-2))

    A λ is `lam` of a DeLoRALinear or DeLoRAMoELinear, or a parameter whose name has the part
    `delora_lambda` (PEFT and the authors' code) or `goat_lambda`.

    Args:
        model: Any module; parameters that ask for no gradient are left out, shared ones occur once.
        lr: Learning rate of everything else.
        lam_lr: Learning rate of the λs.
        **common: What both groups get, such as weight_decay (which shortens λ too).

    Returns:
        The group of everything else, then the λs' group; a group without parameters is left out.

    Raises:
        ValueError: the model has no λ, trainable or not: lam_lr would do nothing.

    Source: the authors' training script, `glue_delora.py` of ExplainableML/DeLoRA.
    """
    lams = {id(module.lam) for module in model.modules() if isinstance(module, (DeLoRALinear, DeLoRAMoELinear))}
    lams |= _named(model, "delora_lambda", "goat_lambda")
    if not lams:
        expected = "a model with DeLoRA's λ"
        remedy = "add DeLoRALinear or PEFT's DeLoRA layers first, or pass model.parameters() to the optimizer"
        raise checks.fail(ValueError, "lambda_parameter_groups", "model", expected, "none in it", remedy)
    return _groups(model, lams, lr, lam_lr, common)


def router_parameter_groups(model: nn.Module, lr: float, router_lr: float, **common: Any) -> list[dict[str, Any]]:
    """Return the trainable parameters of `model` as optimizer groups, every router in one with its
    own learning rate.

        optimizer = torch.optim.AdamW(router_parameter_groups(model, lr=1e-4, router_lr=1e-3),
        weight_decay=0.0)

    A router is `router` of a MoELoRALinear and its kin, or a parameter whose name has the part
    `goat_router`.

    Args:
        model: Any module; parameters that ask for no gradient are left out, shared ones occur once.
        lr: Learning rate of everything else.
        router_lr: Learning rate of the routers.
        **common: What both groups get, such as weight_decay.

    Returns:
        The group of everything else, then the routers' group; a group without parameters is left
        out.

    Raises:
        ValueError: the model has no router, trainable or not: router_lr would do nothing.
    """
    routers = {id(module.router) for module in model.modules() if isinstance(module, MoELoRALinear)}
    routers |= _named(model, "goat_router")
    if not routers:
        remedy = "adapt it with GoatConfig or MoELoRALinear first, or pass model.parameters() to the optimizer"
        raise checks.fail(ValueError, "router_parameter_groups", "model", "a model with routers", "none in it", remedy)
    return _groups(model, routers, lr, router_lr, common)


def _named(model: nn.Module, *parts: str) -> set[int]:
    """Return the parameters whose name has one of the parts, between dots."""
    named = model.named_parameters(remove_duplicate=False)
    return {id(parameter) for name, parameter in named if set(parts) & set(name.split("."))}


def _groups(model: nn.Module, own: set[int], lr: float, own_lr: float, common: dict[str, Any]) -> list[dict[str, Any]]:
    trained = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    groups = [
        {"params": [parameter for key, parameter in trained.items() if (key in own) == is_own], "lr": rate, **common}
        for is_own, rate in ((False, lr), (True, own_lr))
    ]
    return [group for group in groups if group["params"]]
