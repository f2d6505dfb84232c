"""Padding: a padded batch gives GOAT the losses, gradients and statistics of the same sequences
without padding.
"""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from goat_models import layers, move
from golden_cases import relative_error
from tiny_llama import base, tokens
from torch import Tensor, nn

import delora_kernels as dk

COEFFICIENTS = {"balance_coef": 0.4, "z_coef": 0.2}
LENGTHS = (9, 4, 6)
TARGETS = ["q_proj", "o_proj", "down_proj"]
TOLERANCE = 2e-5
"""Transformers' Llama computes its norms, rotations and loss in float32, 6e-8, also where the rest
is float64.
"""


def goat(seed: int, **options: Any) -> Any:
    """A Llama in float64 with four experts, which have moved, on three of its linears."""
    onto = base(seed, blocks=1).double()
    settings: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", "scaling": 1.0}
    settings |= {"num_experts": 4, "r": 2}
    made = peft.get_peft_model(onto, dk.GoatConfig(**settings | COEFFICIENTS | options))
    move(made)
    return made.train()


def padded(seed: int, left: bool = False) -> dict[str, Tensor]:
    """Three sequences in one batch; what stands in the padding should not matter."""
    ids = tokens(seed, len(LENGTHS), max(LENGTHS))
    place = torch.arange(max(LENGTHS)).flip(0) if left else torch.arange(max(LENGTHS))
    mask = place < torch.tensor(LENGTHS)[:, None]
    predicted = mask & mask.roll(1, 1)  # no token from padding
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~predicted, -100)}


def gradients(made: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in made.named_parameters() if p.requires_grad and p.grad is not None}


def without_padding(made: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Loss, gradients and (f, P) of every router, of one sequence after the other; losses added by
    their formula.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers(made)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2)))
        for name, layer in layers(made).items()
    ]
    options = {id(c): c for layer in layers(made).values() for c in layer.options.values()}
    for c in options.values():
        c.balance_coef = c.z_coef = 0.0
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row = ids[mask.bool()][None]
        logits = made(input_ids=row).logits
        total = total + nn.functional.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum")
        count += row.shape[1] - 1
    loss = whole = total / count
    shares = {}
    for name, layer in layers(made).items():
        logits = torch.cat(inputs[name]) @ layer.goat_router["default"].t()
        P = logits.softmax(-1)
        f = torch.zeros_like(P).scatter(1, P.topk(2).indices, 1.0).mean(0)
        shares[name] = (f, P.mean(0))
        whole = whole + 0.4 * 4 * (f * P.mean(0)).sum() + 0.2 * logits.logsumexp(-1).square().mean()
    for hook in hooks:
        hook.remove()
    whole.backward()
    for c in options.values():
        c.balance_coef, c.z_coef = COEFFICIENTS["balance_coef"], COEFFICIENTS["z_coef"]
    found = {name: grad.clone() for name, grad in gradients(made).items()}
    made.zero_grad()
    return loss, found, shares


def check_gradients(made: nn.Module, want: dict[str, Tensor]) -> None:
    got = gradients(made)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert relative_error(got[name], grad) <= TOLERANCE, name
    made.zero_grad()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_padding_counts_nowhere(reentrant: bool | None, left: bool, seed: int) -> None:
    """Losses, every gradient and the statistics, with checkpointing of both kinds and without."""
    made, batch = goat(seed), padded(seed, left)
    loss, want, shares = without_padding(made, batch)
    if reentrant is not None:
        made.enable_input_require_grads()
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with dk.watch_experts(made) as watch:
        ours = made(**batch).loss
        assert {use.tokens for use in watch.report().layers} == {sum(LENGTHS)}
        assert relative_error(ours, loss) <= TOLERANCE
        ours.backward()
        check_gradients(made, want)
    for use in watch.report().layers:
        f, P = shares[use.name]
        assert use.fraction == pytest.approx(f.tolist(), abs=TOLERANCE)
        assert use.probability == pytest.approx(P.tolist(), abs=TOLERANCE)
    made(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()  # all tokens: other gradients
    assert max(relative_error(grad, want[name]) for name, grad in gradients(made).items()) > 100 * TOLERANCE


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_two_passes_in_one_backward_keep_their_masks(reentrant: bool | None, seed: int) -> None:
    made, one, other = goat(seed), padded(seed), padded(seed + 1, left=True)
    (_, first, _), (_, second, _) = (without_padding(made, batch) for batch in (one, other))
    if reentrant is not None:
        made.enable_input_require_grads()
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for order in (1, -1):
        losses = [made(**one).loss, made(**other).loss]
        made.eval()(**padded(seed + 2))  # another pass in between, which no gradient reaches
        made.train()
        sum(losses[::order]).backward()  # type: ignore[union-attr]
        check_gradients(made, {name: grad + second[name] for name, grad in first.items()})
    losses = [made(**one).loss, made(**other).loss]
    for loss in losses:  # the earlier first
        loss.backward()
    check_gradients(made, {name: grad + second[name] for name, grad in first.items()})


def test_a_pass_leaves_no_mask_behind(seed: int) -> None:
    """Not after forward, an error in forward, backward or an error in backward: a layer by itself
    counts all.
    """
    made, batch = goat(seed), padded(seed)
    layer = next(iter(layers(made).values()))
    x = torch.randn(*batch["input_ids"].shape, layer.in_features, dtype=torch.float64)
    assert layer.padding is not None
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def counts_all() -> None:
        assert layer.padding is not None
        assert layer.padding.mask is layer.counted_tokens(x) is None

    counts_all()
    loss = made(**batch).loss
    counts_all()
    loss.backward()
    counts_all()
    with pytest.raises(IndexError):
        made(**batch | {"input_ids": batch["input_ids"] + 1000})
    counts_all()
    with torch.no_grad():
        made(**batch)
    counts_all()
    made.eval().generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)
    counts_all()


def as_bias(mask: Tensor) -> Tensor:
    """What a model adds to its scores: [batch, 1, queries, keys]."""
    seen = mask.bool()[:, None, None, :] & torch.ones(9, 9).tril().bool()
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("mask", [lambda m: None, lambda m: m.double(), as_bias], ids=["none", "float", "4-D"])
def test_what_does_not_say_counts_all(mask: Any, seed: int) -> None:
    made, batch = goat(seed), padded(seed)
    batch["attention_mask"] = mask(batch["attention_mask"])
    with dk.watch_experts(made) as watch:
        made(**batch)
    assert {use.tokens for use in watch.report().layers} == {9 * len(LENGTHS)}


def test_bool_and_numbered_masks_say_it_too(seed: int) -> None:
    """Some that pack sequences number them in the mask; 0 is padding there as well."""
    made, batch = goat(seed), padded(seed)
    layer = layers(made)["base_model.model.model.layers.0.self_attn.q_proj"]
    want = None
    for mask in (batch["attention_mask"], batch["attention_mask"].bool(), batch["attention_mask"] * 3):
        made(input_ids=batch["input_ids"], attention_mask=mask)
        got = layer.router_stats["default"]
        want = got if want is None else want
        assert torch.equal(got.probability, want.probability)
        assert torch.equal(got.fraction, want.fraction)


def test_encoder_and_decoder_count_all(seed: int) -> None:
    """Their sequences may have one shape by chance, the mask is the encoder's."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 97}
    settings = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    config = dk.GoatConfig(r=1, num_experts=3, target_modules=["q", "wi", "wo"], task_type="SEQ_2_SEQ_LM")
    made = peft.get_peft_model(transformers.T5ForConditionalGeneration(settings), config)
    with dk.watch_experts(made) as watch:
        made(**padded(seed))
    assert {use.tokens for use in watch.report().layers} == {9 * len(LENGTHS)}


def test_every_way_into_the_model(seed: int, process_group: None) -> None:
    """A PeftModel without a task, tensors injected by PEFT alone, a second adapter, a copy, DDP."""
    batch = padded(seed)
    made = goat(seed)
    loss, want, _ = without_padding(made, batch)
    copied = copy.deepcopy(made)
    assert next(iter(layers(copied).values())).padding is not next(iter(layers(made).values())).padding
    bare = made.base_model.model
    made.add_adapter("other", dk.GoatConfig(r=1, num_experts=3, target_modules=["k_proj"], init_weights="zero"))
    assert len({id(layer.padding) for layer in layers(made).values()}) == 1
    untold = peft.PeftModel(base(seed).double(), dk.GoatConfig(r=2, num_experts=4, target_modules=["q_proj"]))
    with dk.watch_experts(untold) as watch:
        untold(**batch)
    assert {use.tokens for use in watch.report().layers} == {sum(LENGTHS)}
    for model, owner in ((bare, made), (copied, copied), (nn.parallel.DistributedDataParallel(copied), copied)):
        ours = model(**batch).loss
        assert relative_error(ours, loss) <= TOLERANCE
        ours.backward()
        check_gradients(owner, want)


def test_two_active_adapters(seed: int) -> None:
    """Each gets the mask: the gradients of both are those of the batch's real tokens."""
    made, batch = goat(seed), padded(seed)
    options: dict[str, Any] = {"target_modules": TARGETS, "num_experts": 3, "init_weights": "zero", "r": 2}
    made.add_adapter("other", dk.GoatConfig(**options, task_type="CAUSAL_LM"))
    made.base_model.set_adapter(["default", "other"])
    made.eval()(**batch)
    padding = {use.name: use for use in dk.expert_report(made).layers}
    with dk.watch_experts(made) as watch:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            made(input_ids=ids[mask.bool()][None])
        sums = {use.name: use for use in watch.report().layers}
    assert padding.keys() == sums.keys()
    assert len(sums) == 2 * len(layers(made))
    for name, use in sums.items():
        assert padding[name].fraction == pytest.approx(use.fraction, abs=TOLERANCE)
        assert padding[name].probability == pytest.approx(use.probability, abs=TOLERANCE)


def test_compiled_model_is_one_graph_and_the_same(seed: int) -> None:
    made, batch = goat(seed), padded(seed)
    _, want, _ = without_padding(made, batch)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    compiled(**batch).loss.backward()
    check_gradients(made, want)


def test_unloaded_model_has_no_hooks(seed: int) -> None:
    onto = base(seed)
    before = [dict(hooks) for hooks in (onto._forward_hooks, onto._forward_pre_hooks)]
    made = peft.get_peft_model(onto, dk.GoatConfig(r=2, target_modules=["q_proj"]))
    made.add_adapter("other", dk.GoatConfig(r=2, target_modules=["v_proj"], init_weights="zero"))
    assert all([onto._forward_hooks, onto._forward_pre_hooks])
    made = copy.deepcopy(made)
    unloaded = made.unload()
    assert [dict(hooks) for hooks in (unloaded._forward_hooks, unloaded._forward_pre_hooks)] == before
    assert all([onto._forward_hooks, onto._forward_pre_hooks])
