"""GOAT and ETHER as PEFT methods on stored bases: the numbers of the same adapters on the
dequantised weight, one dequantisation each way, and no merging into few bits.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import assert_close, step
from stored_layers import bare, dequantisations
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.memory import allocations
from delora_kernels import reference
from delora_kernels.bases.read import base_in
from delora_kernels.functional.moe import moe_rank_term
from delora_kernels.integrations.peft.verdict import State

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")

TARGETS: dict[str, Any] = {"target_modules": ["first", "second"]}
CONFIGS: dict[str, Any] = {
    "goat": lambda **more: dk.GoatConfig(**TARGETS | {"r": 2, "num_experts": 4, "top_k": 2, "eta": 0.5} | more),
    "normalised": lambda **more: dk.GoatConfig(
        **TARGETS | {"r": 2, "num_experts": 2, "init_weights": False, "normalize": True} | more
    ),
    "dora": lambda **more: CONFIGS["goat"](**{"use_dora": True, "init_weights": False} | more),
    "ether": lambda **more: dk.EtherConfig(**TARGETS | {"n_blocks": 2, "side": "both"} | more),
    "ether_plus": lambda **more: dk.EtherPlusConfig(**TARGETS | {"n_blocks": 4, "init_weights": False} | more),
    "ether_official": lambda **more: dk.EtherConfig(**TARGETS | {"n_blocks": 2, "blocks": "official"} | more),
}
methods = pytest.mark.parametrize("method", CONFIGS)


@pytest.fixture(autouse=True)
def _registered() -> None:
    dk.register_peft_methods()


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 5, 32)


def adapted(method: str, form: str, seed: int, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A PEFT model on two stored linears."""
    model = bare(form, seed, dtype=dtype)
    for layer in (model.first, model.second):
        base_in(layer)  # compared once here, not while dequantisations are counted
    torch.manual_seed(seed + 1)
    return peft.get_peft_model(model, CONFIGS[method](**more))


def on_dense(method: str, form: str, seed: int) -> Any:
    """The same on nn.Linear with the weights dequantised."""
    stored = bare(form, seed, dtype=torch.float32)
    dense = bare(form, seed, dtype=torch.float32)
    for name in ("first", "second"):
        base: Any = base_in(getattr(stored, name))
        linear = nn.Linear(32, 32).requires_grad_(False)
        linear.weight.data, linear.bias.data = base.dense(torch.float32), base.bias.clone()
        setattr(dense, name, linear)
    torch.manual_seed(seed + 1)
    return peft.get_peft_model(dense, CONFIGS[method]())


@pytest.mark.parametrize("form", ["nf4-nested", "torchao-int8", "hqq-4"])
@methods
def test_the_numbers_of_the_dequantised_weight(method: str, form: str, x: Tensor, seed: int) -> None:
    """The start, made once of it, too."""
    made, dense = adapted(method, form, seed), on_dense(method, form, seed)
    report = dk.accelerate(made, strict=True)
    assert [layer.state for layer in report.layers] == ["fused", "fused"]
    with dequantisations() as count:
        ours = step(made, x)
    each = 1 if method == "ether_official" else 2  # which makes W', and keeps it
    assert len(count) == (2 * each if form == "nf4-nested" else 0)
    assert_close(ours, step(dense, x))


@pytest.mark.parametrize(("method", "times"), [("goat", 2), ("normalised", 2), ("ether", 0), ("ether_plus", 0)])
def test_the_weight_is_dequantised_for_a_start_alone(method: str, times: int, seed: int) -> None:
    adapted(method, "nf4-nested", seed)
    with dequantisations() as count:
        adapted(method, "nf4-nested", seed)
    assert len(count) == times


@methods
def test_two_adapters_autocast_and_wide_tokens(method: str, x: Tensor, seed: int) -> None:
    """Under autocast the base multiplies in bfloat16; without, it multiplies float32 tokens itself,
    and the adapter sees them unrounded.
    """
    made, dense = (adapted(method, "nf4-nested", seed), on_dense(method, "nf4-nested", seed))
    for model in (made, dense):
        torch.manual_seed(seed)
        model.add_adapter("other", CONFIGS[method]())
        model.base_model.set_adapter(["default", "other"])
    assert_close(step(made, x), step(dense, x))
    narrow, dense = adapted(method, "nf4-nested", seed, torch.bfloat16), on_dense(method, "nf4-nested", seed)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = {name: value.to(torch.bfloat16) for name, value in step(dense, x).items()}
        ours = {name: value.to(torch.bfloat16) for name, value in step(narrow, x).items()}
    assert_close(ours, theirs, torch.bfloat16)
    if method == "ether_official":
        with pytest.raises(RuntimeError, match="can't be read here: its input is torch.float32, and its base"):
            narrow(x)
        return
    ours, theirs = step(narrow, x), step(dense, x)
    assert ours["y"].dtype == torch.float32
    assert_close(ours, theirs, torch.bfloat16)


@pytest.mark.parametrize("method", ["goat", "ether", "ether_plus"])
def test_compiled_without_a_break(method: str, x: Tensor, seed: int) -> None:
    """Forward and backward in one graph each: y and every gradient."""
    made = adapted(method, "nf4-nested", seed)
    dk.accelerate(made, strict=True)
    expected = step(made, x)
    torch._dynamo.reset()
    made.compile(fullgraph=True, backend="aot_eager")
    assert_close(step(made, x), expected)


def eight_bit(seed: int) -> Any:
    torch.manual_seed(seed)
    made: Any = nn.Module()
    linear = bnb.nn.Linear8bitLt(32, 24, has_fp16_weights=False, threshold=0.0)
    linear.weight = bnb.nn.Int8Params(torch.randn(24, 32), requires_grad=False, has_fp16_weights=False)
    made.first = linear.to("cpu").requires_grad_(False)
    return made


def test_beside_a_base_that_rounds_its_tokens(x: Tensor, seed: int) -> None:
    """LLM.int8(): a mixture whose start needs no weight adds its term, an ETHER layer reflects what
    goes in and comes out; a start of the weight can't be made.
    """
    base, made = eight_bit(seed), eight_bit(seed)
    y = step(base.first, x)
    peft.inject_adapter_in_model(CONFIGS["goat"](target_modules=["first"], init_weights=False), made)
    layer = made.first
    assert layer.verdict().state == State.RANK_TERM
    ours = step(layer, x)
    mixture = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in layer._mixture("default").items()
    }
    given = x.double().requires_grad_()
    term, _ = reference.moe_lora_linear_dense(given, given.new_zeros(24, 32), top_k=2, **mixture)
    # of y = base(x) + term, from the gradient that enters
    (dx,) = torch.autograd.grad(term, given, 2 * ours["y"].double())
    into = x.clone().requires_grad_()
    (dx_base,) = torch.autograd.grad(base.first(into), into, 2 * ours["y"])
    both = {"y": y["y"] + term.detach().float(), "x": dx_base + dx.float()}
    assert_close({name: ours[name] for name in both}, both)

    made = eight_bit(seed)
    peft.inject_adapter_in_model(CONFIGS["ether_plus"](target_modules=["first"]), made)
    assert made.first.verdict().state == State.OWN_FORWARD
    vectors = {name: value.double() for name, value in made.first._vectors("default").items()}
    inside = {name: value for name, value in vectors.items() if not name.endswith("_out")}
    eye = torch.eye(32, dtype=torch.float64)
    reflected = reference.ether_plus_linear(x.double(), eye, **inside)
    outside = {name.removesuffix("_out"): value for name, value in vectors.items() if name.endswith("_out")}
    bias = base.first.bias.double()
    z = base.first(reflected.float()).double() - bias
    exact = reference.ether_plus_linear(z, torch.eye(24, dtype=torch.float64), **outside) + bias
    # reflections that round otherwise may tip a token's int8 rounding: 1/127 of the largest
    torch.testing.assert_close(made.first(x).double(), exact, rtol=0, atol=2 / 127 * float(exact.abs().max()))

    with pytest.raises(TypeError, match="a Linear8bitLt is needed, and can't be read.*init_weights=False"):
        peft.inject_adapter_in_model(CONFIGS["goat"](target_modules=["first"]), eight_bit(seed))


def test_a_mixture_beside_its_base_multiplies_no_zeros(seed: int) -> None:
    """Nothing of the size of a weight is made, forward or backward."""
    torch.manual_seed(seed)
    T, K, N, E, r = 16, 128, 96, 2, 2
    x, router = torch.randn(T, K, requires_grad=True), torch.randn(E, K)
    A, B = torch.randn(E, r, K, requires_grad=True), torch.randn(E, N, r, requires_grad=True)

    def one() -> None:
        y, _ = moe_rank_term(x, N, A=A, B=B, router=router)
        y.sum().backward()

    assert allocations(one).total < 4 * N * K


@methods
def test_merging_raises_and_says_what_to_do(method: str, x: Tensor, seed: int) -> None:
    more = {"num_experts": 1, "top_k": 1} if method in ("goat", "normalised", "dora") else {}
    made = adapted(method, "nf4-nested", seed, **more)
    before = made(x)
    with pytest.raises(ValueError, match="can't be merged into a Linear4bit: quantising W .* in 16 bits"):
        made.merge_adapter()
    assert torch.equal(made(x), before)


@pytest.mark.parametrize(("method", "save_start"), [*((method, True) for method in CONFIGS), ("goat", False)])
def test_saved_loaded_and_trained_on(method: str, save_start: bool, x: Tensor, seed: int, tmp_path: Path) -> None:
    """A resumed run goes on bit for bit."""
    made = adapted(method, "nf4-nested", seed, **({"save_start": save_start} if method == "goat" else {}))
    train(made, x)
    made.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare("nf4-nested", seed, dtype=torch.float32), tmp_path, is_trainable=True)
    exact = save_start or method != "goat"  # else made anew by an SVD
    assert torch.equal(again(x), made(x)) if exact else torch.allclose(again(x), made(x), atol=1e-4)
    for model in (made, again):
        train(model, x)
    theirs = dict(made.named_parameters())
    for name, value in again.named_parameters():
        if value.requires_grad:
            assert torch.equal(value, theirs[name]) if exact else torch.allclose(value, theirs[name], atol=1e-4), name


def train(model: Any, x: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@methods
def test_a_lost_state_is_refused(method: str, x: Tensor, seed: int) -> None:
    made = adapted(method, "fp4-nested-bf16-storage", seed)
    base = made.base_model.model.first.base_layer
    base.weight.data = base.weight.data.to(torch.float16)
    with pytest.raises(RuntimeError, match="can't run: its packed weight was stored as torch.bfloat16"):
        made(x)
