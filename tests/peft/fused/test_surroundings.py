"""What surrounds the adapters of an accelerated model: hooks, casts, saving, scale contexts, and
other kinds of models.

As in test_adapter_life.py, an accelerated model is compared with a plain one: outputs, every
gradient, state.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fused_count import counted
from peft.helpers import rescale_adapter_scale
from peft_models import METHODS, Small, config, model
from peft_pairs import TARGETS, add, batch, check_alike, check_same, pair, step
from torch import Tensor, nn

import delora_kernels as dk

torch.set_num_threads(1)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_scale_context(method: str, seed: int) -> None:
    made, plain = pair(method, seed)
    with rescale_adapter_scale(made, 0.3), rescale_adapter_scale(plain, 0.3):
        check_alike(made, plain, batch(seed), 3)
        scaled = made(batch(seed))
    check_alike(made, plain, batch(seed), 3)
    assert not torch.allclose(scaled, made(batch(seed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_casts_of_the_whole_model(method: str, dtype: torch.dtype, seed: int) -> None:
    made, plain = pair(method, seed)
    cast = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}[dtype]
    # each side rounds a few times in each of some twenty operations on the way forth and back
    check_alike(getattr(made, cast)(), getattr(plain, cast)(), batch(seed, dtype), 3, 64 * torch.finfo(dtype).eps)
    check_alike(made.to(torch.float64), plain.to(torch.float64), batch(seed), 3)


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_saved_files_and_what_they_load(method: str, autocast_adapter_dtype: bool, seed: int, tmp_path: Path) -> None:
    """The saved bytes are PEFT's own; loaded onto a half-precision base, adapters get the dtype
    they get with PEFT.
    """
    made = model(method, seed, dtype=torch.bfloat16, modules_to_save=["third"], target_modules=["first", "second"])
    made.save_pretrained(tmp_path / "before")
    dk.accelerate(made)
    made.save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = []
    for _ in range(2):
        torch.manual_seed(seed)
        base = Small(method != "delora").bfloat16()
        path, dtype = tmp_path / "after", autocast_adapter_dtype
        loaded.append(peft.PeftModel.from_pretrained(base, path, is_trainable=True, autocast_adapter_dtype=dtype))
    made, plain = loaded
    assert len(dk.accelerate(made, strict=True).fused) == 2
    dtypes = {p.dtype for name, p in made.named_parameters() if p.requires_grad and "lora_" in name}
    assert dtypes == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
    check_alike(made, plain, batch(seed, torch.bfloat16), 2, 64 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_on_the_adapter_layer(method: str, seed: int) -> None:
    """They see and change what they do with PEFT; the layer stays fused."""
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    made, plain = pair(method, seed)
    for both, log in ((made, ours), (plain, theirs)):
        layer = both.base_model.model.second
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        layer.register_forward_hook(lambda _, args, y, log=log: log.update(input=args[0].detach()) or y + 1)
        layer.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 3,))
        layer.register_full_backward_hook(lambda _, dx, dy, log=log: log.update(dx=dx[0], dy=dy[0]))
    check_alike(made, plain, batch(seed), 3)
    assert ours.keys() == {"input", "dx", "dy"}
    check_same(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_on_the_base_layer(method: str, seed: int) -> None:
    """Only the base's own forward calls them, beside a fused rank term; DoRA is declined."""
    calls: list[str] = []

    def hook(base: nn.Module, args: Any, y: Tensor) -> Tensor:
        calls.append("base")
        return y * 2

    made, plain = pair(method, seed)
    for both in (made, plain):
        both.base_model.model.first.base_layer.register_forward_hook(hook)
    check_alike(made, plain, batch(seed), 2 if method == "dora" else 3)
    assert calls == ["base", "base"]
    layers = dk.accelerate(made).layers
    assert [layer.reason for layer in layers] == ["the base layer has hooks", None, None]
    assert layers[0].state == ("own forward" if method == "dora" else "rank term fused")


@pytest.mark.parametrize("method", METHODS)
def test_bare_model_with_injected_adapters(method: str, seed: int) -> None:
    bare = []
    for _ in range(2):
        torch.manual_seed(seed)
        options = config(method, target_modules=TARGETS)
        bare.append(peft.inject_adapter_in_model(options, Small(method != "delora").double()))
    made, plain = bare
    report = dk.accelerate(made, strict=True)
    assert [layer.name for layer in report.layers] == TARGETS
    assert dk.accelerate(made) == report  # once more changes nothing
    check_alike(made, plain, batch(seed), 3)


def test_mixed_model(seed: int) -> None:
    """PeftMixedModel: the LoRA layers fuse, the LoHa layers keep their own forward."""
    mixed = []
    for _ in range(2):
        torch.manual_seed(seed)
        lora = config("lora", target_modules=["first", "second"])
        made = peft.PeftMixedModel(Small(False).double(), lora, "one")
        made.add_adapter("two", peft.LoHaConfig(r=2, init_weights=False, target_modules=["second", "third"]))
        made.set_adapter(["one", "two"])
        mixed.append(made.double())
    made, plain = mixed
    report = dk.accelerate(made)
    assert {layer.name.removeprefix("base_model.model."): layer.reason for layer in report.layers} == {
        "first": None,
        "second": "loha.layer.Linear layers are not fused",
        "second.base_layer": None,
        "third": "loha.layer.Linear layers are not fused",
    }
    check_alike(made, plain, batch(seed), 2)


OTHERS: dict[str, Any] = {
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=[], init_ia3_weights=False),
    "loha": peft.LoHaConfig(r=2, init_weights=False, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, init_weights=False, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=2, init_weights=False, target_modules=["first"]),
    "oft": peft.OFTConfig(oft_block_size=2, r=0, init_weights=False, target_modules=["first"]),
    "adalora": peft.AdaLoraConfig(total_step=9, init_r=3, target_r=2, init_lora_weights=False, target_modules=TARGETS),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_other_tuners_are_left_alone(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    made = peft.get_peft_model(Small(False).double(), OTHERS[name]).double().eval()
    theirs, kinds = step(made, batch(seed)), [type(module) for module in made.modules()]
    report = dk.accelerate(made)
    assert report.fused == ()
    assert all(f"{name}.layer." in (layer.reason or "") for layer in report.layers)
    assert [type(module) for module in made.modules()] == kinds
    assert all(torch.equal(a, b) for a, b in zip(step(made, batch(seed)).values(), theirs.values(), strict=True))


def test_prompt_learning_has_no_adapter_layers() -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, n_positions=8, vocab_size=11)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    made = peft.get_peft_model(transformers.GPT2LMHeadModel(settings), prompt)
    with pytest.raises(ValueError, match="model must hold PEFT adapter layers, got a PeftModelForCausalLM without any"):
        dk.accelerate(made)


@pytest.mark.parametrize("name", ["my_adapter", "lora_A", "default_0", "weight", "ünïcode-1"])
@pytest.mark.parametrize("method", METHODS)
def test_adapter_names(method: str, name: str, seed: int) -> None:
    made, plain = pair(method, seed)
    for both in (made, plain):
        add(both, name, method)
        both.set_adapter(name)
    check_alike(made, plain, batch(seed), 3)
    with pytest.raises((KeyError, ValueError), match="contain"):
        add(made, "with.dots", method)


def test_batches_of_several_adapters(seed: int) -> None:
    """adapter_names=: each row its own adapter or the bare base."""
    made, plain = pair("lora", seed)
    x = batch(seed).repeat(2, 1, 1)
    names = ["default", "__base__", "other", "default"]
    results = []
    for both in (made, plain):
        add(both, "other", "lora", target_modules=["first", "third"])
        with torch.no_grad(), counted() as passes:
            results.append(both.eval()(x, adapter_names=names))
        assert len(passes) == (3 if both is made else 0)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    check_alike(made, plain, batch(seed), 3)  # and fused again without them


@pytest.mark.parametrize("method", METHODS)
def test_reference_model_by_disabled_adapters(method: str, seed: int) -> None:
    """Preference training: the same weights without adapters are the reference within each step."""
    made, plain = pair(method, seed)
    for both in (made, plain):
        optimizer = torch.optim.SGD([p for p in both.parameters() if p.requires_grad], lr=1e-2, momentum=0.5)
        for number in range(3):
            x = batch(seed + number)
            with torch.no_grad(), both.disable_adapter():
                reference = both(x)
            loss = -nn.functional.logsigmoid(both(x) - reference).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with both.disable_adapter():  # PEFT's gradients through the bare base, too
                (dx,) = torch.autograd.grad(both(x.requires_grad_()).sum(), x)
            assert dx.shape == x.shape
    check_alike(made, plain, batch(seed), 3)


@pytest.mark.parametrize("method", METHODS)
def test_two_models_around_one_base_layer(method: str, seed: int) -> None:
    """One is accelerated, the other is not touched; a layer used twice by one model counts once and
    runs twice.
    """
    torch.manual_seed(seed)
    bases = [Small(False).double(), Small(False).double()]
    bases[1].first = bases[0].first
    bases[1].third = bases[0].third
    made, other = (peft.get_peft_model(base, config(method, target_modules=TARGETS)) for base in bases)
    theirs = [step(made, batch(seed)), step(other, batch(seed))]
    assert len(dk.accelerate(made, strict=True).fused) == 3
    for both, expected, fused in ((made, theirs[0], 3), (other, theirs[1], 0)):
        with counted() as passes:
            check_same(step(both, batch(seed)), expected)
        assert len(passes) == fused
    twice = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Identity()).double()
    made = peft.get_peft_model(twice, config(method, target_modules=["0"]))
    twice[2] = twice[0]
    expected = step(made, batch(seed))
    assert len(dk.accelerate(made, strict=True).fused) == 1
    with counted() as passes:
        check_same(step(made, batch(seed)), expected)
    assert len(passes) == 2
