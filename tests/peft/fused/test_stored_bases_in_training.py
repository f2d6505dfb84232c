"""PEFT's layers on stored bases in what people train with: copies and files, checkpointing,
compilers, threads, siblings, and the recipe of a 4-bit model.
"""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_models import assert_close, config, step
from stored_layers import FORMS, adapted, dequantisations
from tiny_llama import LAYERS, base, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import delora_kernels as dk
from delora_kernels.bases import numeric_check
from delora_kernels.functional import common

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 5, 32)


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


def test_siblings_are_dense_one_after_the_other(x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense W is gone before the next is made, forward and backward, of halves too."""
    from delora_kernels.bases import bitsandbytes_4bit

    torch.manual_seed(seed)
    make, options = FORMS["nf4-nested"]
    inner = Three(lambda: make(32, 32, **options | {"dtype": torch.float32}))
    made = peft.get_peft_model(inner, config("lora", target_modules=["q", "k", "v"]))
    theirs = step(made, x)
    dk.accelerate(made, strict=True)
    step(made, x)
    alive: list[Any] = []
    seen: list[int] = []
    own = bitsandbytes_4bit.dequantize_4bit

    def watched(*arguments: Any) -> Tensor:
        seen.append(sum(not weak.expired() for weak in alive))
        W: Tensor = own(*arguments)
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(W.untyped_storage()))
        return W

    monkeypatch.setattr(bitsandbytes_4bit, "dequantize_4bit", watched)
    assert_close(step(made, x), theirs)
    assert seen == [0] * 6
    monkeypatch.setattr(bitsandbytes_4bit, "HALVED", 0)
    assert_close(step(made, x), theirs)
    assert seen == [0] * (6 + 3 + 6)


def test_siblings_cast_x_once_and_keep_that(x: Tensor, seed: int) -> None:
    """Under autocast, around bases of 16 bits: PEFT casts x for each base and each branch, and
    keeps a copy for each branch.
    """
    torch.manual_seed(seed)
    make, options = FORMS["nf4-nested"]
    inner = Three(lambda: make(24, 32, **options | {"dtype": torch.bfloat16}))
    made = peft.get_peft_model(inner, config("lora", target_modules=["q", "k", "v"]))

    def casts_and_copies() -> tuple[int, int]:
        given = x.clone().requires_grad_() * 1  # autocast keeps what it has cast of a leaf
        kept: dict[int, Tensor] = {}
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as record,
        ):
            made(given)
        sizes = [event.input_shapes[0] for event in record.events() if event.name == "aten::_to_copy"]
        copies = sum(t.numel() == x.numel() and t.dtype == torch.bfloat16 for t in kept.values())
        return sum(size in ([3, 5, 32], [15, 32]) for size in sizes), copies

    assert casts_and_copies() == (6, 3)
    dk.accelerate(made, strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        step(made, x)  # in which siblings are found
    assert casts_and_copies() == (1, 1)


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
