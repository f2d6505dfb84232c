"""Every option of PEFT's LoraConfig: what an accelerated layer makes of it, and that its numbers
are PEFT's.
"""

import copy
import dataclasses
from itertools import product
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import config as configs
from peft_pairs import check_same, gradients
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.integrations.peft.verdict import State

D = torch.float64
NEW = {name: getattr(configs, name) for name in dir(configs) if name.endswith("Config")}
"""Of options that the oldest tested PEFT does not have."""

SELECTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
SELECTS += ("layer_replication", "target_parameters", "ensure_weight_tying", "megatron_config", "megatron_core")
"""Which modules are adapted, or shared; megatron_config: another class of layers. The rest of the
tests has them.
"""
STARTS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
"""How A and B start, or what else happens outside a forward pass."""
NAMES = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
NAMES += ("inference_mode",)

OPTIONS: dict[str, tuple[dict[str, Any], str | None]] = {
    # option: values of it and of what it needs, the code of its layers; None: fused
    "r": ({"r": 1}, None),
    "lora_alpha": ({"lora_alpha": 3}, None),
    "lora_dropout": ({"lora_dropout": 0.4}, None),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, None),  # PEFT takes it back for nn.Linear
    "bias": ({"bias": "all"}, None),
    "use_rslora": ({"use_rslora": True}, None),
    "init_lora_weights": ({"init_lora_weights": "gaussian"}, None),
    "rank_pattern": ({"rank_pattern": {"0": 1}}, None),
    "alpha_pattern": ({"alpha_pattern": {"1": 5}}, None),
    "trainable_token_indices": ({"trainable_token_indices": {"table": [1, 3]}}, None),
    "use_dora": ({"use_dora": True}, None),
    "lora_bias": ({"lora_bias": True}, None),
    "use_qalora": ({"use_qalora": True}, None),  # of GPTQ's layers alone
    "qalora_group_size": ({"qalora_group_size": 4}, None),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [1]}, None),
    "arrow_config": ({}, None),  # with its experts, below
    "kasa_config": ({"kasa_config": "KasaConfig"}, None),
    "velora_config": ({"velora_config": "VeloraConfig"}, "lora-variant"),
    "monteclora_config": ({"monteclora_config": "MontecloraConfig"}, "lora-variant"),
    "use_bdlora": ({"use_bdlora": "BdLoraConfig"}, "lora-variant"),
}
SETTINGS = {"BdLoraConfig": {"target_modules_bd_a": ["0", "1"], "nblocks": 2}, "VeloraConfig": {"num_groups": 1}}
FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}


class Small(nn.Module):
    """Two linears, and a table beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 12)
        self.layers = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))

    def forward(self, x: Tensor, **of_a_layer: Any) -> Tensor:
        x = x + self.table(torch.arange(x.shape[-2]) % 7)
        for layer in self.layers:
            x = layer(x, **of_a_layer)
        return x


def model(seed: int, dtype: torch.dtype = D, adapters: Any = None, **options: Any) -> Any:
    """A model with an adapter of these options, or several by name, all of whose numbers are
    drawn.
    """
    torch.manual_seed(seed)
    adapters = adapters or {"default": options}
    made: Any = None
    base = Small().to(dtype)
    for name, given in adapters.items():
        config = peft.LoraConfig(**{"r": 4, "target_modules": ["0", "1"]} | given)
        if made is None:
            made = peft.get_peft_model(base, config, name)
        else:
            made.add_adapter(name, config)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            drawn = 0.5 + torch.rand_like(parameter) if "magnitude" in name else torch.randn_like(parameter) / 3
            parameter.data = drawn
            parameter.requires_grad_()
    return made


def check(made: Any, seed: int, code: str | None = None, tolerance: float = 1e-11, **call: Any) -> None:
    """PEFT's numbers with and without acceleration, and the report's code of each layer."""
    found = []
    for accelerated in (False, True):
        model = copy.deepcopy(made)
        if accelerated:
            report = dk.accelerate(model, prove=False)
            # tokens that PEFT trains beside are a layer of its own, which is named
            layers = [each for each in report.layers if each.method != "trainable_tokens.layer.TrainableTokensLayer"]
            assert [each.code for each in layers] == [code] * 2
            assert all(each.state is State.FUSED for each in layers) == (code is None)
            assert {each.code for each in report.layers} <= {code, "layer-class"}
        dtype = next(model.parameters()).dtype
        x = torch.randn(3, 5, 12, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        torch.manual_seed(seed)
        y = model.base_model.model(x, **call)
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        found.append({"y": y.detach(), "x": x.grad} | gradients(model))
    check_same(found[1], found[0], tolerance)


def test_the_table_has_every_option() -> None:
    assert FIELDS <= {*OPTIONS, *SELECTS, *STARTS, *NAMES}


@pytest.mark.parametrize("option", [name for name in OPTIONS if name in FIELDS and name != "arrow_config"])
def test_an_option(option: str, seed: int) -> None:
    given, code = OPTIONS[option]
    made = {
        name: NEW[value](**SETTINGS.get(value, {})) if isinstance(value, str) and value in NEW else value
        for name, value in given.items()
    }
    if option == "lora_dropout":  # masks differ: in eval
        check(model(seed, **made).eval(), seed)
    elif option == "monteclora_config":
        check(model(seed, **made).eval(), seed, code)
    else:
        check(model(seed, **made), seed, code)


@pytest.mark.parametrize(("rslora", "bias", "pattern", "dora"), list(product([False, True], repeat=4)))
def test_options_together(rslora: bool, bias: bool, pattern: bool, dora: bool, seed: int) -> None:
    if dora and bias:
        pytest.skip("PEFT refuses it")
    alphas = {"0": 3, "1": 11} if pattern else {}
    check(model(seed, use_rslora=rslora, lora_bias=bias, alpha_pattern=alphas, use_dora=dora), seed)


@pytest.mark.parametrize("offsets", [[2, None, 9], [0, 5, 1], None, [None] * 3], ids=str)
def test_alora_acts_on_the_last_tokens(offsets: Any, seed: int) -> None:
    """Where it acts on none, its factors have gradients of zero, as PEFT's have."""
    made = model(seed, alora_invocation_tokens=[1])
    check(made, seed, alora_offsets=offsets)
    made.base_model.model.layers[0].scaling["default"] *= 2
    fused = copy.deepcopy(made)
    dk.accelerate(fused)
    tokens = torch.randn(3, 12, dtype=D)
    layers = (each.base_model.model.layers[0] for each in (fused, made))
    torch.testing.assert_close(*(layer(tokens, alora_offsets=offsets) for layer in layers), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 12), (0, 12), (0, 0, 12), (2, 0, 12)], ids=str)
@pytest.mark.parametrize("given", [True, False])
def test_alora_of_an_empty_batch(shape: tuple[int, ...], given: bool, seed: int) -> None:
    """Shapes and gradients are PEFT's: zeros, of the factors too."""
    made = model(seed, alora_invocation_tokens=[1])
    fused = copy.deepcopy(made)
    dk.accelerate(fused, strict=True)
    found = []
    for each in (fused, made):
        layer, x = each.base_model.model.layers[0], torch.randn(shape, dtype=D, requires_grad=True)
        y = layer(x, alora_offsets=[None] * len(x) if given else None)
        leaves = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
        assert len(leaves) == 3
        grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
        found.append({"y": y.detach(), **dict(zip(leaves, grads, strict=True))})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("subtract", [False, True])
def test_arrow_is_a_mixture_with_given_gates(subtract: bool, seed: int) -> None:
    """What its first call makes of the weights is made then, not when the model is accelerated."""
    experts = {f"task_{i}": {} for i in range(3)} | ({"gks_0": {}} if subtract else {})
    arrow = peft.ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=1, use_gks=subtract)
    arrow.task_adapter_names, arrow.gks_adapter_names = list(experts)[:3], list(experts)[3:]
    made = model(seed, adapters=experts | {"arrow_router": {"arrow_config": arrow}})
    made.set_adapter("arrow_router")
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("lora_" in name)
    check(made, seed)
    state = copy.deepcopy(made.state_dict())
    dk.accelerate(made)
    assert not made.base_model.model.layers[0].lora_arrow["arrow_router"]._protos_ready
    assert all(torch.equal(state[name], value) for name, value in made.state_dict().items())


def test_a_variant_beside_others_runs_pefts_own(seed: int) -> None:
    made = model(seed, adapters={"alora": {"alora_invocation_tokens": [1]}, "lora": {}})
    made.base_model.set_adapter(["alora", "lora"])
    report = dk.accelerate(made)
    assert {layer.code for layer in report.layers} == {"lora-variant"}
    assert all("ALoraLinearVariant is not fused beside other adapters" in str(each.reason) for each in report.layers)
    dropping = model(seed, alora_invocation_tokens=[1], lora_dropout=0.3)
    assert {layer.code for layer in dk.accelerate(dropping).layers} == {"lora-variant"}


@pytest.mark.skipif("kasa_config" not in FIELDS, reason="MiCA came with KaSA, to a newer PEFT")
def test_mica_is_lora(seed: int) -> None:
    """PEFT makes its start in float32, and keeps B frozen."""
    made = model(seed, torch.float32, init_lora_weights="mica").double()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    check(made, seed)
    table = model(seed, torch.float32, init_lora_weights="mica", target_modules=["table", "1"]).double()
    check(table, seed)


class Attended(nn.Module):
    """torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_torchs_attention_is_named_with_what_to_do(seed: int) -> None:
    """Its output projection too, whose weight it reads: an adapter beside that is never called."""
    torch.manual_seed(seed)
    options = {"target_modules": ["attention"], "init_lora_weights": False}
    made = peft.get_peft_model(Attended().to(D), peft.LoraConfig(r=2, **options))
    x = torch.randn(2, 5, 12, dtype=D)
    theirs = made(x)
    report = dk.accelerate(made)
    assert [(each.state, each.code) for each in report.layers] == [(State.OWN_FORWARD, "multihead-attention")] * 2
    assert torch.equal(made(x), theirs)
