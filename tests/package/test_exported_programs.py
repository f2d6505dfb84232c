"""torch.export, torch.onnx.export and torch.jit.trace give plain torch: it runs in a process
without this library.

The programs hold the reference's formulas or PEFT's own; what they give is compared, in float64,
with what the ops and their written-out gradients give in this process, which share no code with
either.
"""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import Small, config
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.pytorch_utils import Conv1D

import delora_kernels as dk
from delora_kernels import functional as F
from delora_kernels import nn as dnn
from delora_kernels import reference

K, N = 12, 8
Make = Callable[[], nn.Module]


class One(nn.Module):
    """One layer for an adapter, a linear or a Conv1D: each layer takes a second to trace."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, Conv1D(N, K) if name == "second" else nn.Linear(K, N))

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.children()
        y: Tensor = layer(x)
        return y


def _own(config: Any) -> Make:
    (first, *others) = config.target_modules
    return lambda: peft.get_peft_model((Small(True) if others else One(first)).double(), config)


def _peft(method: str, *targets: str, names: tuple[str, ...] = ("default",)) -> Make:
    def make() -> nn.Module:
        base = Small(True) if targets[1:] else One(targets[0])
        made = peft.get_peft_model(base.double(), config(method, target_modules=list(targets)))
        for name in names[1:]:
            made.add_adapter(name, config(method, r=2, target_modules=["first"]))
        made.base_model.set_adapter(list(names))
        dk.accelerate(made)
        return made

    return make


class Calls(nn.Module):
    """A user's module that calls the functions itself: a mixture with its statistics, then stacked
    adapters.
    """

    def __init__(self) -> None:
        super().__init__()
        sizes = {"weight": (K, K), "A": (3, 2, K), "B": (3, K, 2), "router": (3, K), "A2": (5, K), "B2": (K, 5)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size).double() / 3))

    def forward(self, x: Tensor) -> Tensor:
        mask = x[..., 0] > -1
        y, stats = F.moe_lora_linear(x, self.weight, self.A, self.B, self.router, top_k=2, token_mask=mask)
        y = F.lora_linear(y, self.weight, self.A2, self.B2, 0.5, ranks=[2, 3])
        return y + stats.balance_loss() + stats.z


def _nn(kind: Any, *arguments: Any, **options: Any) -> Make:
    return lambda: kind(K, N, *arguments, **options, dtype=torch.float64)


BASES = ("first", "second", "third")
"""A linear, a Conv1D, a linear without bias: one method of PEFT's and one of ours have them all."""
OURS: dict[str, Make] = {
    "lora": _nn(dnn.LoRALinear, 3),
    "dora": _nn(dnn.DoRALinear, 3),
    "delora": _nn(dnn.DeLoRALinear, 3),
    "delora-live": _nn(dnn.DeLoRALinear, 3, start="frozen_live", weight_norm="frobenius"),
    "mixture": _nn(dnn.MoELoRALinear, 2, 3, 2, renormalize=False),
    "one-expert": _nn(dnn.MoELoRALinear, 2, 1, 1),
    "goat": _nn(dnn.GoatLinear, 2, 3, 2),
    "delora-mixture": _nn(dnn.DeLoRAMoELinear, 2, 3, 2),
    "ether": _nn(dnn.EtherLinear, 2),
    "ether+-official": _nn(dnn.EtherPlusLinear, 4, blocks="official"),
    "functions": Calls,
    "peft-goat": _own(
        dk.GoatConfig(r=2, num_experts=2, balance_coef=0.0, init_weights=False, target_modules=["second"])
    ),
    "peft-ether": _own(dk.EtherConfig(n_blocks=1, target_modules=list(BASES))),
    "peft-ether+": _own(dk.EtherPlusConfig(n_blocks=1, side="both", init_weights=False, target_modules=["first"])),
}
CASES = OURS | {
    "peft-lora": _peft("lora", *BASES),
    "peft-lora-two": _peft("lora", "first", "third", names=("default", "other")),
    "peft-dora": _peft("dora", "second"),
    "peft-delora": _peft("delora", "first"),
}


def made_of(make: Make, seed: int) -> Any:
    """A module whose adapter is away from its start."""
    torch.manual_seed(seed)
    made = make()
    for parameter in (p for p in made.parameters() if p.requires_grad):
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def exported(made: Any, x: Tensor, strict: bool, any_size: bool = True) -> torch.export.ExportedProgram:
    """Its program for every batch size and number of tokens, or for those of x."""
    if not any_size:
        return torch.export.export(made, (x,), strict=strict)
    dynamic = dict.fromkeys(range(x.dim() - 1), torch.export.Dim.AUTO)
    shapes: Any = {"args": (dynamic,)} if isinstance(made, peft.PeftModel) else (dynamic,)
    return torch.export.export(made, (x,), dynamic_shapes=shapes, strict=strict)


def targets(program: torch.export.ExportedProgram) -> list[str]:
    """What the program calls, in order."""
    graphs = [one for one in program.graph_module.modules() if isinstance(one, torch.fx.GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def attributes(made: nn.Module) -> Any:
    """Every attribute of every module; tensors and other objects by identity."""
    return {name: held(vars(module)) for name, module in made.named_modules()}


def held(value: Any) -> Any:
    """What containers hold, by identity: torch.export itself makes them anew."""
    if isinstance(value, dict):
        return {key: held(each) for key, each in value.items()}
    return [held(each) for each in value] if isinstance(value, (list, tuple)) else id(value)


def step(made: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the sum of its squares."""
    made.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = made(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


def run_all(folder: Path) -> None:
    """Run every program of the folder in a process without the library."""
    script = Path(__file__).parents[1] / "helpers" / "without_library.py"
    done = subprocess.run([sys.executable, str(script), str(folder)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the rounding of float64, of sums of a few hundred terms; a gradient that is missing is one
    of zeros.
    """
    assert {"y", "x"} <= found.keys() <= expected.keys()
    for name, want in expected.items():
        got = found.get(name, torch.zeros_like(want))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * float(want.abs().max().clamp(min=1)), msg=name)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
def test_programs_run_without_the_library(seed: int, tmp_path: Path) -> None:
    """Strict, non-strict and traced, after an ordinary call, at other sizes than they were
    made at.
    """
    want = {}
    for name, make in CASES.items():
        made, inputs = made_of(make, seed), (torch.randn(2, 3, K).double(), torch.randn(4, 5, K).double())
        made.train()(inputs[0])
        before = attributes(made)
        for way in ("strict", "free", "traced"):
            path = tmp_path / f"{name}-{way}"
            if way == "traced":
                torch.jit.trace(made, inputs[0], check_trace=False).save(path.with_suffix(".pt"))
            else:
                program = exported(made, inputs[0], way == "strict")
                assert not [target for target in targets(program) if "delora_kernels" in target], path.name
                torch.export.save(program, path.with_suffix(".pt2"))
            torch.save(inputs[1], path.with_suffix(".input"))
        assert attributes(made) == before, name
        want[name] = step(made, inputs[1])
    run_all(tmp_path)
    for name, expected in want.items():
        for way in ("strict", "free", "traced"):
            print(name, way)
            assert_same(torch.load(tmp_path / f"{name}-{way}.found"), expected)


def _merged(made: Any) -> Any:
    return made.merge() if isinstance(made, dnn.LoRALinear | dnn.EtherLinear) else made.merge_adapter()


def _off(made: Any) -> Any:
    return made.base_model.disable_adapter_layers()


SWITCHED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lora merged": ("lora", _merged),
    "ether merged": ("ether", _merged),
    "peft-lora merged": ("peft-lora", _merged),
    "peft-dora merged": ("peft-dora", _merged),
    "peft-ether merged": ("peft-ether", _merged),
    "peft-lora off": ("peft-lora", _off),
    "peft-goat off": ("peft-goat", _off),
    "peft-ether off": ("peft-ether", _off),
}


@pytest.mark.parametrize("switched", SWITCHED)
def test_merged_and_disabled_adapters(switched: str, seed: int) -> None:
    """The program is of the model as it stands: in plain torch, with its numbers."""
    name, switch = SWITCHED[switched]
    made, x = made_of(CASES[name], seed).eval(), torch.randn(4, 5, K).double()
    adapted = made(x).detach()
    switch(made)
    program = exported(made, x, strict=False, any_size=False)
    assert not [target for target in targets(program) if "delora_kernels" in target]
    y = program.module()(x)
    torch.testing.assert_close(y, made(x), rtol=0, atol=1e-12 * float(y.abs().max()))
    same = torch.allclose(y, adapted, rtol=0, atol=1e-9 * float(y.abs().max()))
    assert same is ("merged" in switched)


def with_masks(name: str, made: Any, x: Tensor, p: float) -> dict[str, Tensor]:
    """What the reference gives of a module whose input or branch is dropped by torch's dropout,
    seeded with 0.
    """
    ones, tensors = torch.ones(x.shape[:-1].numel(), K).double(), dict(made.named_parameters())
    torch.manual_seed(0)
    if "ether" in name:
        x = dropout(x, p)
        mask = {}
    else:
        masks = [dropout(ones, p) for _ in range(3 if "independent" in name else 1)]
        mask = {"dropout_mask": torch.stack(masks) if len(masks) > 1 else masks[0]}
    tensors = {key: value for key, value in tensors.items() if key != "base_weight"}
    if "lora" in name or "dora" in name:
        tensors["scale"] = made.scale
    if name.startswith("dora"):
        mask["dropout"] = made.dropout
    if "independent" in name:
        tensors |= {"scale": made.alpha / made.r, "top_k": made.top_k}
    function = {"LoRALinear": "lora", "DoRALinear": "dora", "EtherLinear": "ether", "MoELoRALinear": "moe_lora"}
    y = getattr(reference, f"{function[type(made).__name__]}_linear")(x, **tensors, **mask)
    return y[0] if isinstance(y, tuple) else y


DROPPING: dict[str, Make] = {
    "lora": _nn(dnn.LoRALinear, 3, dropout_p=0.4),
    "dora": _nn(dnn.DoRALinear, 3, dropout_p=0.4),
    "dora-branch": _nn(dnn.DoRALinear, 3, dropout_p=0.4, dropout="branch"),
    "moe-independent": _nn(dnn.MoELoRALinear, 2, 3, 2, dropout_p=0.4, dropout="independent"),
    "ether": _nn(dnn.EtherLinear, 2, dropout_p=0.4),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_torchs(name: str, seed: int) -> None:
    """In training mode, with the gradients of the reference under the same masks; in evaluation
    mode none drops.
    """
    made, x = made_of(DROPPING[name], seed), torch.randn(4, 5, K).double()
    example = torch.randn(2, 3, K).double()
    program = exported(made.train(), example, strict=False)
    assert {target for target in targets(program) if "rand" in target} == set()
    assert "aten.dropout.default" in targets(program)
    assert "aten.dropout.default" not in targets(exported(made.eval(), example, strict=False))
    runs = program.module()

    def theirs(given: Tensor) -> Tensor:
        return with_masks(name, made, given, 0.4)

    want = differentiated(theirs, x, made)
    assert_same(differentiated(runs, x, runs), want)


def differentiated(call: Any, x: Tensor, owner: nn.Module) -> dict[str, Tensor]:
    """The output of `call`, and the gradients of x and of what `owner` trains."""
    owner.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    y = call(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "free"])
@pytest.mark.parametrize("name", ["lora", "dora", "delora-live", "goat", "ether+-official", "peft-dora", "peft-goat"])
def test_low_precision(name: str, strict: bool, seed: int) -> None:
    """A bfloat16 base with float32 adapters, and a float32 model under autocast around the
    export.
    """
    made, x = made_of(CASES[name], seed).eval(), torch.randn(4, 5, K)
    made.float()
    example = torch.randn(4, 5, K)
    with torch.autocast("cpu", torch.bfloat16):
        if strict and "official" in name:  # docs/exporting.md; an error when run, no wrong number
            with pytest.raises(RuntimeError, match="Tensor dtype mismatch"):
                exported(made, example, strict, any_size=False).module()(x)
        else:
            assert_rounded(exported(made, example, strict, any_size=False).module()(x), made(x))
    if not name.startswith("peft"):
        for each in ("weight", "bias"):
            getattr(made, each).data = getattr(made, each).data.bfloat16()
        x, example = x.bfloat16(), example.bfloat16()
        assert_rounded(exported(made, example, strict, any_size=False).module()(x), made(x))


def assert_rounded(got: Tensor, want: Tensor) -> None:
    """Equal but for a few roundings of bfloat16 to the size of the terms."""
    assert got.dtype == want.dtype
    bound = 8 * torch.finfo(torch.bfloat16).eps * float(want.abs().max())
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=bound)


IN_ONNX = ("lora", "delora", "ether", "goat", "functions", "peft-lora", "peft-dora", "peft-delora", "peft-ether+")


@pytest.mark.filterwarnings("ignore")
def test_onnx(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch.export, for every batch size, run by ONNX's own evaluator without the library."""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from torch._export.utils import _collect_all_valid_cia_ops
    from torch.export import decomp_utils, exported_program
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    # each export reads what onnxscript knows of every op anew, a third of its time, and twice which
    # of torch's ops are made of others
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
    composite = functools.cache(_collect_all_valid_cia_ops)
    for module in (exported_program, decomp_utils):
        monkeypatch.setattr(module, "_collect_all_valid_cia_ops", composite, raising=False)
    want = {}
    for name in IN_ONNX:
        made, x = made_of(CASES[name], seed).eval().float(), torch.randn(4, 5, K)
        path = tmp_path / f"{name}.onnx"
        dynamic = {0: torch.export.Dim("batch", min=2)}
        shapes: Any = {"args": (dynamic,)} if name.startswith("peft") else (dynamic,)
        torch.onnx.export(made, (torch.randn(3, 5, K),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        assert {node.domain for node in onnx.load(path).graph.node} <= {"", "pkg.onnxscript.torch_lib.common"}, name
        torch.save(x, tmp_path / f"{name}.input")
        want[name] = made(x).detach()
    run_all(tmp_path)
    for name, y in want.items():
        bound = 100 * torch.finfo(torch.float32).eps * float(y.abs().max())
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.found")["y"], y, rtol=0, atol=bound, msg=name)
