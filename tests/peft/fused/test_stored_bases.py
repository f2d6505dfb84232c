"""PEFT's layers on stored bases: fused, with PEFT's numbers, dequantised once each way, and never
run on a weight that is no longer what it was stored as.
"""

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.delora.model import DeloraModel
from peft_models import assert_close, config, step
from stored_layers import FORMS, Two, adapted
from tiny_llama import LAYERS, base, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import delora_kernels as dk
from delora_kernels import reference
from delora_kernels.bases import numeric_check
from delora_kernels.bases.read import base_in
from delora_kernels.functional import common

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")

from delora_kernels.bases import bitsandbytes_4bit  # noqa: E402

METHODS = ("lora", "rslora", "dora")


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 5, 32)


@contextmanager
def dequantisations() -> Iterator[list[int]]:
    """A list that grows by one for each dequantisation of ours."""
    made: list[int] = []
    own = bitsandbytes_4bit.dequantize_4bit

    def counting(*arguments: Any) -> Tensor:
        made.append(1)
        return own(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitsandbytes_4bit, "dequantize_4bit", counting)
        yield made


@pytest.mark.parametrize("form", ["nf4", "fp4-nested-bf16-storage", "torchao-int8", "torchao-float8", "hqq-4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity(form: str, method: str, dtype: torch.dtype, x: Tensor, seed: int) -> None:
    """Outputs and every gradient; float32 adapters."""
    made = adapted(form, method, seed, dtype=dtype)
    theirs = step(made, x.to(dtype))
    report = dk.accelerate(made, strict=True)
    assert len(report.fused) == 2
    assert_close(step(made, x.to(dtype)), theirs, dtype)
    assert dk.restore(made) == 2
    again = step(made, x.to(dtype))
    assert all(torch.equal(again[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("form", ["nf4-nested", "torchao-int8", "hqq-4"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(form: str, method: str, x: Tensor, seed: int) -> None:
    """Float32 tokens, and a base and branch that multiply in bfloat16; the output in the library's
    dtype.
    """
    made = adapted(form, method, seed, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(made, x)
        dk.accelerate(made, strict=True)
        with dequantisations() as count:
            ours = step(made, x)
    assert len(count) == (4 if form == "nf4-nested" else 0)
    assert_close(ours, theirs, torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_dropout_and_no_gradients(method: str, x: Tensor, seed: int) -> None:
    """Two stacked adapters; a dropout that is on; no gradient of x; inference."""
    made = adapted("nf4", method, seed, dropout_p=0.5)
    if method != "dora":
        made.add_adapter("other", config(method, r=2, target_modules=["first"]))
        made.base_model.set_adapter(["default", "other"])
    made.eval()
    theirs = step(made, x)
    dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs)
    with torch.no_grad(), dequantisations() as count:
        torch.testing.assert_close(made(x), theirs["y"])
    assert len(count) == 2
    made.train()
    with dequantisations() as count:
        made(x).sum().backward()  # nobody wants dx of the first layer
    assert len(count) == 3
    assert not torch.equal(made(x), made(x))


@pytest.mark.parametrize("method", METHODS)
def test_one_dequantisation_each_way_and_nothing_dense_is_kept(method: str, seed: int) -> None:
    """What is kept, by shape: no [N, K]; for DoRA at most 0.35 of what PEFT keeps."""
    made = adapted("nf4", method, seed, width=96, r=4, dtype=torch.float32).base_model.model.first
    x = torch.randn(64, 96).requires_grad_()
    theirs = kept(made, x)
    dk.accelerate(made)
    with dequantisations() as count:
        ours = kept(made, x)
        assert len(count) == 1
        step(made, x)
        assert len(count) == 1 + 2
    assert (96, 96) not in {tuple(tensor.shape) for tensor in ours}
    if method == "dora":
        assert sum(map(torch.numel, ours)) <= 0.35 * sum(map(torch.numel, theirs))


def kept(made: nn.Module, x: Tensor) -> list[Tensor]:
    """What a pass keeps for backward beside parameters, each memory once."""
    found: dict[int, Tensor] = {}
    own = {p.data_ptr() for p in (*made.parameters(), x)}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            found[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(x)
    return list(found.values())


def test_state_dict_deepcopy_and_pickle(x: Tensor, seed: int) -> None:
    """Keys, packed bytes and states stay; copies run fused and alone."""
    made = adapted("nf4-nested", "dora", seed, dtype=torch.float32)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    dk.accelerate(made)
    first = step(made, x)
    after = made.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        with dequantisations() as count:
            again = step(copied, x)
        assert len(count) == 4
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, x: Tensor, seed: int) -> None:
    """Unpacking what one layer has saved runs its equally shaped sibling again."""
    made = adapted("nf4", "dora", seed)
    dk.accelerate(made)
    expected = step(made, x)
    inner = made.base_model.model

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = made.base_model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(inner, x, use_reentrant=reentrant)
            return y

    assert_close(step(Checkpointed(), x), expected)


@pytest.mark.parametrize("form", ["nf4-nested", "torchao-int8", "hqq-4"])
def test_compiled_without_a_break(form: str, x: Tensor, seed: int) -> None:
    """And dequantised once each way there too: the compiled program has the library's own ops."""
    made = adapted(form, "dora", seed, dtype=torch.float32)
    dk.accelerate(made)
    expected = step(made, x)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = x.clone().requires_grad_()
    y = compiled(x)
    y.float().square().sum().backward()
    torch.testing.assert_close(y, expected["y"])
    torch.testing.assert_close(x.grad, expected["x"])


def test_a_base_first_met_by_a_compiler_runs_itself(x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not compared with its dense form, and says what to do."""
    made = adapted("nf4", "lora", seed, dtype=torch.float32)
    expected = made(x)
    dk.accelerate(made)
    monkeypatch.setattr(numeric_check, "_found", {})
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(made, backend="eager")(x), expected)
    assert not numeric_check._found


def test_two_threads(x: Tensor, seed: int) -> None:
    made = adapted("nf4", "dora", seed)
    dk.accelerate(made)
    expected = made(x)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.extend(made(x) for _ in range(20))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(torch.equal(y, expected) for y in found)


def test_the_first_input_settles_the_compute_dtype(x: Tensor, seed: int) -> None:
    """As bitsandbytes does it; and the bias stays in its dtype."""
    made, plain = adapted("nf4", "lora", seed), adapted("nf4", "lora", seed)
    dk.accelerate(made)
    assert not made.base_model.model.first.base_layer.compute_type_is_set
    for dtype in (torch.bfloat16, torch.bfloat16):
        assert_close(step(made, x.to(dtype)), step(plain, x.to(dtype)), dtype)
    base = made.base_model.model.first.base_layer
    assert (base.compute_type_is_set, base.compute_dtype) == (True, torch.bfloat16)
    assert base.bias.dtype == torch.float32


def test_a_lost_state_that_the_module_has_kept_is_put_back(x: Tensor, seed: int) -> None:
    made = adapted("nf4", "lora", seed)
    dk.accelerate(made)
    expected = step(made, x)
    base = made.base_model.model.first.base_layer
    base.weight.quant_state = None
    assert_close(step(made, x), expected)
    assert base.weight.quant_state is base.quant_state


def _loses_its_state(base: Any) -> None:
    base.quant_state = base.weight.quant_state = None


def _is_a_shard(base: Any) -> None:
    base.weight.data = base.weight.data[: base.weight.numel() // 2]


def _is_cast(base: Any) -> None:
    base.weight.data = base.weight.data.to(torch.float16)


def _is_packed(base: Any) -> None:
    base.weight.quant_state.packing_format_for_cpu = True


@pytest.mark.parametrize(
    ("breakage", "form", "reason"),
    [
        (_loses_its_state, "nf4", "its packed weight has no quant_state"),
        (_is_a_shard, "nf4", "its packed weight has 256 bytes where its \\[32, 32\\] weights take 512"),
        (_is_cast, "fp4-nested-bf16-storage", "was stored as torch.bfloat16 and is torch.float16 now"),
        (_is_packed, "nf4", "packed for inference on this CPU"),
    ],
)
def test_broken_bases_are_refused_with_the_reason(breakage: Any, form: str, reason: str, x: Tensor, seed: int) -> None:
    """Before a wrong number: by the report, by strict=True, and at a call."""
    made = adapted(form, "lora", seed)
    dk.accelerate(made, strict=True)
    breakage(made.base_model.model.first.base_layer)
    report = dk.accelerate(made)
    assert [layer.fused for layer in report.layers] == [False, True]
    with pytest.raises(RuntimeError, match=reason):
        dk.accelerate(made, strict=True)
    own = "quant_state is required" if breakage is _loses_its_state else reason  # bitsandbytes itself refuses
    with pytest.raises((RuntimeError, ValueError), match=own):
        made(x.requires_grad_())


def test_a_weight_packed_for_inference_still_infers(x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bitsandbytes' own forward."""
    made = adapted("nf4", "lora", seed).eval()
    dk.accelerate(made)
    base = made.base_model.model.first.base_layer
    _is_packed(base)
    monkeypatch.setattr(type(base), "forward", lambda self, x: x)
    with torch.no_grad():
        assert made.base_model.model.first(x).shape == x.shape


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda base, patch: base.register_forward_hook(lambda *_: None), "the base layer has hooks"),
        (lambda base, patch: setattr(base, "forward", lambda x: x), "the base layer has a forward of its own"),
        (
            lambda base, patch: patch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: x),
            "the forward of its base layer's class has been replaced",
        ),
    ],
)
def test_who_changes_the_base_gets_it(
    change: Any, reason: str, x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapted("nf4", "lora", seed)
    dk.accelerate(made)
    change(made.base_model.model.first.base_layer, monkeypatch)
    assert reason in str(dk.accelerate(made))
    with dequantisations() as count:
        made(x)
    assert len(count) < 2


def test_wide_tokens_are_left_to_pefts_branch(x: Tensor, seed: int) -> None:
    """Without autocast PEFT's branch sees them unrounded."""
    made = adapted("nf4", "lora", seed, dtype=torch.bfloat16)
    theirs = step(made, x)
    dk.accelerate(made)
    ours = step(made, x)
    assert_close(ours, theirs)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_eight_bit_bases_run_themselves(threshold: float, x: Tensor, seed: int) -> None:
    """LLM.int8() rounds its tokens: the rank term alone is fused."""
    torch.manual_seed(seed)
    made = nn.Module()
    linear = bnb.nn.Linear8bitLt(32, 24, has_fp16_weights=False, threshold=threshold)
    linear.weight = bnb.nn.Int8Params(torch.randn(24, 32), requires_grad=False, has_fp16_weights=False)
    made.first, made.is_loaded_in_8bit = linear.to("cpu"), True
    peft.inject_adapter_in_model(config("lora", target_modules=["first"]), made)
    layer = made.first
    layer.base_layer.bias.requires_grad_(False)
    theirs = step(layer, x)
    report = dk.accelerate(made)
    assert [each.state for each in report.layers] == ["rank term fused"]
    assert_close(step(layer, x), theirs)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeLoRA on stored bases, for this test."""
    monkeypatch.setattr(DeloraModel, "_create_new_module", staticmethod(DeloraModel._create_new_module))
    dk.allow_delora_on_stored_bases()


@pytest.mark.parametrize("form", ["nf4-nested", "torchao-int8", "hqq-4"])
@pytest.mark.usefixtures("allowed")
def test_delora(form: str, x: Tensor, seed: int, tmp_path: Path) -> None:
    """PEFT's own forward, the fused one and the float64 formula; saved, loaded and exported."""
    made = adapted(form, "delora", seed, dtype=torch.float32)
    layer = made.base_model.model.first
    base: Any = base_in(layer.base_layer)
    W = base.dense(torch.float32).double()
    norm = layer.delora_w_norm["default"]
    torch.testing.assert_close(norm.double(), W.norm(dim=0))
    theirs = step(made, x)
    report = dk.accelerate(made, strict=True)
    assert [each.method for each in report.fused] == ["delora", "delora"]
    ours = step(made, x)
    assert_close(ours, theirs)
    A, B, lam = (each["default"].double() for each in (layer.delora_A, layer.delora_B, layer.delora_lambda))
    exact = reference.delora_linear(x.double(), W, A, B, lam, W.norm(dim=0), base.bias.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    made.save_pretrained(tmp_path / "adapter")
    dk.export_lora(made, tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(_bare(form, seed), tmp_path / "adapter")
    torch.testing.assert_close(again(x), ours["y"])
    if form == "nf4-nested":
        exported = peft.PeftModel.from_pretrained(_bare(form, seed), tmp_path / "lora")
        torch.testing.assert_close(exported(x), ours["y"])
    with pytest.raises(ValueError, match="can't be merged into a .*: quantising W"):
        made.merge_adapter()
    assert dk.restore(made) == 2
    torch.testing.assert_close(made(x), ours["y"])


def _bare(form: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Two(lambda: FORMS[form][0](32, 32, **FORMS[form][1] | {"dtype": torch.float32}))


@pytest.mark.usefixtures("allowed")
def test_delora_elsewhere_is_pefts_own(x: Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    made = peft.get_peft_model(nn.Sequential(nn.Linear(32, 8)), config("delora", target_modules=["0"]))
    assert type(made.base_model.model[0]) is DeloraLinear
    lost = _bare("nf4", seed)
    _loses_its_state(lost.first)
    with pytest.raises(TypeError, match="DeLoRA needs the weight of its base layer, a Linear4bit, but its packed"):
        peft.get_peft_model(lost, config("delora", target_modules=["first"]))


class Three(nn.Module):
    """Three linears of one form that share an input."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = make(), make(), make()
        self.is_loaded_in_4bit = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@pytest.mark.parametrize("form", ["nf4-nested", "torchao-int8", "hqq-4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_siblings_share_x(form: str, dtype: torch.dtype, x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of three; each base is dequantised once forward and once backward."""
    torch.manual_seed(seed)
    make, options = FORMS[form]
    inner = Three(lambda: make(32, 32, **options | {"dtype": dtype}))
    made = peft.get_peft_model(inner, config("lora", target_modules=["q", "k", "v"]))
    theirs = step(made, x.to(dtype))
    report = dk.accelerate(made, strict=True)
    step(made, x.to(dtype))
    shared: list[int] = []
    run = common.run_shared
    monkeypatch.setattr(common, "run_shared", lambda calls, backend: shared.append(len(calls)) or run(calls, backend))
    with dequantisations() as count:
        for _ in range(2):
            assert_close(step(made, x.to(dtype)), theirs, dtype)
    assert shared == [3, 3]
    assert len(count) == (12 if form.startswith("nf4") else 0)
    assert [len(group) for group in report.groups] == [3]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x.to(dtype))
    assert sum(t.shape[-1] == 32 and t.numel() == x.numel() for t in {id(t): t for t in kept}.values()) == 1
    assert all(t.numel() <= x.numel() for t in kept)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_recipe_of_a_four_bit_model(method: str, seed: int, tmp_path: Path) -> None:
    """Loading, preparation, checkpointing, accumulation, AdamW: PEFT's losses."""
    base(seed).save_pretrained(tmp_path / "base")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantised = transformers.BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantised, device_map="cpu", dtype=torch.float32
    )
    loaded = peft.prepare_model_for_kbit_training(loaded, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(seed)
    plain = peft.get_peft_model(loaded, config(method, r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    made = copy.deepcopy(plain)
    report = dk.accelerate(made, strict=True)
    assert len(report.fused) == LAYERS
    losses: list[list[float]] = []
    for one in (plain, made):
        optimizer, found = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2), []
        for index in range(3):
            optimizer.zero_grad()
            for part in range(2):
                batch = tokens(seed + 2 * index + part, 2, 9)
                loss = one(input_ids=batch, labels=batch).loss
                loss.backward()
                found.append(float(loss.detach()))
            optimizer.step()
        losses.append(found)
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-4)
    assert losses[0][0] != losses[0][-1]
