"""The adapter modules against PEFT's layers with the same weights, and the parameter groups of
both.
"""

from typing import Any

import pytest
import torch
from nn_modules import make
from torch import nn

from delora_kernels.nn import DeLoRALinear, DoRALinear, LoRALinear, lambda_parameter_groups
from delora_kernels.testing import relative_error

PEFT_NAMES = {"A": ("lora_A", "delora_A"), "B": ("lora_B", "delora_B"), "magnitude": ("magnitude",), "lam": ("lambda",)}


@pytest.fixture(autouse=True)
def _fresh_random_numbers(seed: int) -> None:
    torch.manual_seed(seed)


def peft_layer(linear: nn.Linear, method: str, **options: Any) -> Any:
    """PEFT's adapter layer around `linear`, which it takes over."""
    peft = pytest.importorskip("peft")
    config = peft.DeloraConfig if method == "delora" else peft.LoraConfig
    options = {"r": 3, "target_modules": ["0"]} | ({"use_dora": True} if method == "dora" else {}) | options
    return peft.get_peft_model(nn.Sequential(linear), config(**options)).base_model.model[0]


def peft_parameters(layer: Any) -> dict[str, nn.Parameter]:
    """The layer's trainable parameters under our names."""
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    return {ours: p for ours, words in PEFT_NAMES.items() for name, p in named.items() if any(w in name for w in words)}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("cls", "ours", "method", "theirs"),
    [
        (LoRALinear, {"alpha": 5.0}, "lora", {"lora_alpha": 5.0}),
        (LoRALinear, {"alpha": 5.0, "rslora": True}, "lora", {"lora_alpha": 5.0, "use_rslora": True}),
        (DoRALinear, {"alpha": 5.0}, "dora", {"lora_alpha": 5.0}),
        (DeLoRALinear, {}, "delora", {}),
    ],
)
def test_same_as_peft(cls: Any, ours: Any, method: str, theirs: Any, dtype: torch.dtype, trained: bool) -> None:
    linear = nn.Linear(14, 10, dtype=dtype)
    module = cls.from_linear(linear, 3, **ours)
    layer = peft_layer(nn.Linear(14, 10, dtype=dtype), method, **theirs)
    layer.base_layer.load_state_dict(linear.state_dict())
    parameters = peft_parameters(layer)
    assert {n: (p.dtype, p.shape) for n, p in parameters.items()} == {
        n: (p.dtype, p.shape) for n, p in module.named_parameters() if p.requires_grad
    }
    if method == "delora":
        assert parameters["lam"].item() == module.lam.item()
        layer.delora_w_norm["default"].copy_(module.weight_norm)  # PEFT made its own from another weight
    for name, parameter in parameters.items():
        mine = module.get_parameter(name)
        if trained:
            mine.data += 0.3 * torch.randn_like(mine)
        parameter.data.copy_(mine)

    tolerance = 20 * torch.finfo(dtype).eps
    x, grad_out = torch.randn(6, 14, dtype=dtype), torch.randn(6, 10, dtype=dtype)
    y, expected = module(x), layer(x)
    assert relative_error(y, expected) <= tolerance
    y.backward(grad_out)
    expected.backward(grad_out)
    for name, parameter in parameters.items():
        # zeros at the start are compared absolutely; λ's gradient is a sum whose terms may cancel
        size = parameter.grad.abs().max().clamp(min=10 if name == "lam" else 1e-3)
        assert (module.get_parameter(name).grad - parameter.grad).abs().max() <= tolerance * size, name
    module.merge()
    layer.merge()
    assert relative_error(module.weight, layer.base_layer.weight) <= tolerance


@pytest.mark.parametrize("method", ["dora", "delora"])
def test_starts_from_pefts_norms(method: str) -> None:
    linear = nn.Linear(14, 10)
    module = (DoRALinear if method == "dora" else DeLoRALinear).from_linear(linear, 3)
    layer = peft_layer(linear, method)
    if method == "dora":
        assert relative_error(module.magnitude, peft_parameters(layer)["magnitude"]) <= 1e-6
    else:
        assert relative_error(module.weight_norm, layer.delora_w_norm["default"]) <= 1e-6


def test_lambda_has_its_own_learning_rate() -> None:
    model = nn.Sequential(make("delora")[0], nn.LayerNorm(10, dtype=torch.float64), make("lora")[0], make("delora")[0])
    model.append(model[3])  # shared with the one before
    model[0].B.requires_grad_(False)
    rest, lams = lambda_parameter_groups(model, lr=0.0, lam_lr=0.5, weight_decay=0.0)
    assert [id(p) for p in lams["params"]] == [id(model[0].lam), id(model[3].lam)]
    owned = {id(p) for p in (*rest["params"], *lams["params"])}
    assert owned == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(rest["params"]) + len(lams["params"]) == len(owned) == 9
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([rest, lams])
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.0, 0.0), (0.5, 0.0)]
    model[0](torch.randn(6, 14, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {"0.lam"}


def test_lambda_groups_leave_out_what_is_empty() -> None:
    module, _ = make("delora")
    module.lam.requires_grad_(False)
    (group,) = lambda_parameter_groups(module, lr=0.1, lam_lr=0.5)
    assert group["lr"] == 0.1
    module.requires_grad_(False)
    module.lam.requires_grad_()
    (group,) = lambda_parameter_groups(module, lr=0.1, lam_lr=0.5)
    assert (group["lr"], group["params"][0]) == (0.5, module.lam)
    with pytest.raises(ValueError, match="lambda_parameter_groups: model must be a model with DeLoRA's λ"):
        lambda_parameter_groups(make("dora")[0], lr=0.1, lam_lr=0.5)


def test_lambda_groups_of_a_peft_model() -> None:
    layer = peft_layer(nn.Linear(14, 10), "delora", delora_lambda=4)
    rest, lams = lambda_parameter_groups(nn.Sequential(layer), lr=0.1, lam_lr=0.5)
    assert [p.item() for p in lams["params"]] == [4.0]
    assert sorted(p.shape for p in rest["params"]) == [(3, 14), (10, 3)]
