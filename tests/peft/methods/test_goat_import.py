"""import_goat: checkpoints in the layout of GOAT's source, of layers whose outputs its own code
computed (golden).
"""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from goat_cases import GoatCase, goat_cases
from goat_models import layers
from golden_cases import relative_error
from safetensors.torch import save_file
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.goat_loop import goat_loop

CASES = [case for case in goat_cases() if not case.name.startswith("goat_official_perexpert")]


def state_of(name: str, A: Tensor, B: Tensor, router: Tensor) -> dict[str, Tensor]:
    """The keys of the source's file for one layer: A and B, once more under moe_layer, and the
    router.
    """
    state = {f"base_model.model.{name}.lora_gating.weight": router.clone()}
    for role, stack in (("A", A), ("B", B)):
        for e, value in enumerate(stack):
            state[f"base_model.model.{name}.lora_{role}.{e}.weight"] = value.clone()
            state[f"base_model.model.{name}.moe_layer.experts.{e}.lora_{role}.weight"] = value.clone()
    return state


def save(folder: Path, state: dict[str, Tensor], binary: bool = False, **settings: Any) -> Path:
    """A folder as the source's training script leaves it."""
    config = {"peft_type": "GOAT", "task_type": None, "bias": "none", "lora_dropout": 0.05, "use_rslora": False}
    config |= {"init_lora_weights": True, "target_modules": ["linear"], "init_type": "goat"}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    if binary:
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors")
    return folder


def saved_case(folder: Path, case: GoatCase, **options: Any) -> Path:
    E, _, r = case.arguments["B"].shape
    state = state_of("linear", *(case.arguments[name] for name in ("A", "B", "router")))
    settings = {"r": E * r, "num_experts": E, "top_k": case.arguments["top_k"], "init_cof": case.init_cof}
    return save(folder, state, lora_alpha=case.scaling[0] * r, **settings, **options)


def base_of(case: GoatCase) -> nn.Module:
    N, K = case.weight0.shape
    linear = nn.Linear(K, N, bias=case.arguments["bias"] is not None, dtype=torch.float64)
    linear.weight.data.copy_(case.weight0)
    if linear.bias is not None:
        linear.bias.data.copy_(case.arguments["bias"])
    return nn.ModuleDict({"linear": linear})


@pytest.mark.filterwarnings("ignore:import_goat")  # far from their start
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_computes_what_the_source_computed(case: GoatCase, tmp_path: Path) -> None:
    made = dk.import_goat(base_of(case), saved_case(tmp_path, case), scaling="alpha/r")
    (layer,) = layers(made).values()
    assert layer.goat_scale["default"].tolist() == pytest.approx(case.scaling)
    # the start is subtracted as the source does it: from an SVD in float32
    start = case.A_init.norm() * case.B_init.norm() * max(case.scaling) / case.weight0.norm()
    assert start > 1e-3
    with torch.no_grad():
        y = layer.eval()(case.arguments["x"])
    assert relative_error(y, case.results["out"]) <= 1e-5
    assert relative_error(layer.router_stats["default"].balance_loss("code"), case.results["balance_loss"][0]) <= 1e-12
    made.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base_of(case), tmp_path / "ours")
    assert torch.equal(next(iter(layers(again).values()))(case.arguments["x"]), y)
    dora = dk.import_goat(base_of(case), tmp_path, scaling="alpha/r", use_dora=True)  # starts where it changes nothing
    with torch.no_grad():
        assert relative_error(next(iter(layers(dora).values())).eval()(case.arguments["x"]), y) <= 1e-6


class Model(nn.Module):
    """Three linears, the last too small for the adapter: the source leaves it alone without a
    word.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.tiny = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tiny(self.down(torch.relu(self.up(x))))
        return y


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("init_type", "scaling"), [("goat", "theory"), ("goat_mini", 5.0), ("pissa", 2.0), ("mole", "alpha/r")]
)
def test_whole_model(binary: bool, init_type: str, scaling: Any, seed: int, tmp_path: Path) -> None:
    """Against the source's way: the start written into the weights, a loop over experts."""
    torch.manual_seed(seed)
    base, E, r, k = Model(), 4, 2, 2
    state, expected = {}, {}
    for name, linear in (("up", base.up), ("down", base.down)):
        N, K = linear.weight.shape
        s = {"theory": math.sqrt(3 * K / r), "alpha/r": 8 / r}.get(scaling, scaling)
        U, S, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        t = len(S) // E
        rows = {
            "goat": [e * t + i for e in range(E) for i in range(r)],
            "goat_mini": [(e + 1) * t - r + i for e in range(E) for i in range(r)],
            "pissa": list(range(E * r)),
        }.get(init_type, [])
        A, B = torch.randn(E * r, K) / K, torch.zeros(N, E * r)
        weight = linear.weight.detach()
        if rows:
            root = (S[rows] / (s * 10)).sqrt()
            A, B = root[:, None] * Vh[rows], U[:, rows] * root
            weight = weight - s / E * B @ A
        A = A.view(E, r, K) + 0.01 * torch.randn(E, r, K)
        B = B.view(N, E, r).transpose(0, 1) + 0.01 * torch.randn(E, N, r)
        router = torch.randn(E, K)
        state |= state_of(name, A, B, router)
        expected[name] = (weight, list(A), list(B), router, k, s)
    settings = {"r": E * r, "num_experts": E, "top_k": k, "init_cof": 1 / E, "lora_alpha": 8, "init_type": init_type}
    save(tmp_path, state, binary, target_modules=["up", "down", "tiny"], **settings)
    made = dk.import_goat(base, tmp_path, scaling=scaling, adapter_name="theirs")
    assert sorted(name.rpartition(".")[2] for name in layers(made)) == ["down", "up"]
    assert made.peft_config["theirs"].dropout_kind == "independent"
    x = torch.randn(9, 24)
    y = torch.relu(goat_loop(x, *expected["up"])[0] + base.up.bias)
    y = base.tiny(goat_loop(y, *expected["down"])[0] + base.down.bias)
    assert relative_error(made.eval()(x), y) <= 1e-5


def test_doubtful_scale_is_said(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.scaling[0] == 8 and len(case.arguments["B"]) == 4)
    folder = saved_case(tmp_path, case)
    with pytest.warns(UserWarning, match="import_goat: the checkpoint's experts are .* its scale was"):
        dk.import_goat(base_of(case), folder, scaling=200.0)


@pytest.mark.parametrize(("folder", "got"), [("someone/goat", "where there is no folder"), ("", "which has none")])
def test_a_name_on_a_hub_is_no_folder(folder: str, got: str, tmp_path: Path) -> None:
    expected = rf"import_goat: directory must be a local folder with adapter_config.json, got '.*{folder}', {got}; "
    with pytest.raises(ValueError, match=f"{expected}download.*snapshot_download"):
        dk.import_goat(nn.Sequential(nn.Linear(3, 3)), folder or tmp_path, scaling=1.0)


def test_what_is_no_such_checkpoint_is_refused(tmp_path: Path) -> None:
    case = CASES[0]
    base, folder = base_of(case), saved_case(tmp_path, case)
    with pytest.raises(ValueError, match="init_type must be left out.*import_goat"):
        peft.PeftModel.from_pretrained(base_of(case), folder)
    E, _, r = case.arguments["B"].shape
    whole = state_of("linear", *(case.arguments[name] for name in ("A", "B", "router")))
    settings = {"r": E * r, "num_experts": E, "top_k": 1, "init_cof": 1.0, "lora_alpha": 1}
    copy = "base_model.model.linear.moe_layer.experts.0.lora_A.weight"
    router = "base_model.model.linear.lora_gating.weight"
    without_first = {key: value for key, value in whole.items() if "A.0" not in key and key != copy}
    elsewhere = state_of("other", *(case.arguments[name] for name in ("A", "B", "router")))
    for state, options, words in (
        (whole | {copy: whole[copy] + 1}, {}, "layer 'linear' must be one with one A for each expert, got two of"),
        ({key: value for key, value in whole.items() if key != router}, {}, "one with lora_gating, got none"),
        (without_first, {}, "without \\['lora_A.0'\\]"),
        (whole | {"base_model.model.linear.lora_C.weight": whole[router].clone()}, {}, "its keys must be those of"),
        (whole, {"init_type": "hydralora"}, "init_type must be one of pissa"),
        (whole, {"bias": "all"}, "bias must be 'none'"),
        (whole, {"r": E * r * 2}, "the experts' rank must be r // num_experts"),
        (elsewhere, {}, "Target modules .* not found"),
    ):
        save(folder, state, **settings | options)
        with pytest.raises(ValueError, match=words):
            dk.import_goat(base_of(case), folder, scaling="alpha/r")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(ValueError, match="directory must be a checkpoint of GOAT's source, got a config"):
        dk.import_goat(base, folder, scaling="alpha/r")
