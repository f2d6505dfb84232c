"""Two processes train an accelerated PEFT model as one trains it without accelerate(): DDP, FSDP,
tensor parallel.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed import accelerator, ddp, fsdp1, fsdp2, launch, mixtures, proving, tensor_parallel
from distributed.blocks import LAYERS
from distributed.launch import on_two_processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")

METHODS = ("lora", "dora", "delora")
BEFORE_AND_AFTER = (True, False)
DDP_OPTIONS = ({}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True})


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    yield
    launch.end()


@pytest.mark.parametrize("method", METHODS)
def test_ddp(method: str, seed: int) -> None:
    cases = [(method, seed, before, options, False) for options in DDP_OPTIONS for before in BEFORE_AND_AFTER]
    assert on_two_processes(ddp.train, *cases) == [[LAYERS] * len(cases)] * 2


@pytest.mark.parametrize("method", METHODS)
def test_ddp_with_checkpointing(method: str, seed: int) -> None:
    cases = [(method, seed, True, options, True) for options in ({}, {"static_graph": True})]
    assert on_two_processes(ddp.train, *cases) == [[2 * LAYERS] * len(cases)] * 2


def test_ddp_of_mixtures(seed: int) -> None:
    """With their balance losses; checkpointing of both kinds."""
    cases = [(seed, reentrant, {}) for reentrant in (None, False, True)]
    cases += [(seed, None, options) for options in DDP_OPTIONS[1:3]]
    assert on_two_processes(mixtures.train, *cases) == [[None] * len(cases)] * 2


def test_ddp_of_an_expert_model(seed: int) -> None:
    pytest.importorskip("transformers", "5")
    from distributed import experts

    assert on_two_processes(experts.train, (seed,)) == [[4], [4]]  # both projections of two blocks


@pytest.mark.parametrize("method", METHODS)
def test_hugging_face_accelerate(method: str, seed: int) -> None:
    pytest.importorskip("accelerate")
    cases = [(method, seed, before) for before in BEFORE_AND_AFTER]
    assert on_two_processes(accelerator.train, *cases) == [[LAYERS, LAYERS]] * 2


@pytest.mark.parametrize("method", METHODS)
def test_fsdp1(method: str, seed: int) -> None:
    """Weights are whole inside their unit's forward: fused. (With use_orig_params=False torch
    refuses these units.)
    """
    kinds = [("whole", True, "FULL_SHARD"), ("blocks", True, "FULL_SHARD"), ("blocks", True, "SHARD_GRAD_OP")]
    cases = [(method, seed, before, *kind) for kind in kinds for before in BEFORE_AND_AFTER]
    assert on_two_processes(fsdp1.train, *cases) == [[LAYERS] * len(cases)] * 2


@pytest.mark.parametrize("method", METHODS)
def test_fsdp1_with_checkpointing(method: str, seed: int) -> None:
    cases = [(method, seed, before, "blocks", True, "FULL_SHARD", True) for before in BEFORE_AND_AFTER]
    assert on_two_processes(fsdp1.train, *cases) == [[2 * LAYERS] * 2] * 2


@pytest.mark.parametrize(
    ("method", "use_orig_params", "calls"),
    # PEFT's DoRA reads lora_A's shape, which use_orig_params=True hides; torch refuses DeLoRA's
    # units with False
    [("lora", True, 0), ("lora", False, 0), ("dora", False, 0), ("delora", True, LAYERS)],
)
def test_fsdp1_by_pefts_policy(method: str, use_orig_params: bool, calls: int, seed: int) -> None:
    """lora_A and lora_B are units of their own, gathered only where they are called, which PEFT's
    forward does.
    """
    cases = [(method, seed, before, "peft", use_orig_params) for before in BEFORE_AND_AFTER]
    assert on_two_processes(fsdp1.train, *cases) == [[calls] * 2] * 2


@pytest.mark.parametrize("units", ["blocks", "layers"])
@pytest.mark.parametrize("method", METHODS)
def test_fsdp2(method: str, units: str, seed: int) -> None:
    cases = [(method, seed, before, units, options) for options in fsdp2.OPTIONS for before in BEFORE_AND_AFTER]
    assert on_two_processes(fsdp2.train, *cases) == [[LAYERS] * len(cases)] * 2


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_fsdp2_on_the_factors_alone(method: str, seed: int) -> None:
    cases = [(method, seed, before, "leaves", "reshard") for before in BEFORE_AND_AFTER]
    assert on_two_processes(fsdp2.train, *cases) == [[0, 0]] * 2


def test_fsdp2_in_mixed_precision(seed: int) -> None:
    """PEFT's own DeLoRA raises there: its float32 norms meet bfloat16 factors."""
    if torch.__version__ < "2.8":
        pytest.skip("with gloo and a reduce_dtype torch 2.7 adds gradients up where it should average them")
    cases = [(method, seed, units) for method in METHODS for units in ("blocks", "layers")]
    assert on_two_processes(fsdp2.mixed_precision, *cases) == [[LAYERS] * len(cases)] * 2


@pytest.mark.parametrize(
    ("sharded", "methods", "calls"),
    # DoRA is missing where it does not run without accelerate() either: PEFT mixes plain tensors
    # and DTensors there
    [
        ("base", ("lora", "delora"), 4),  # two of them the rank term beside a base that runs itself
        ("factors", ("lora", "dora"), 2),
        ("both", ("lora",), 2),
        ("replicated", ("lora", "delora"), 0),
    ],
)
def test_tensor_parallel(sharded: str, methods: tuple[str, ...], calls: int, seed: int) -> None:
    """Layers with a sharded part run PEFT's forward; the two layers that have none are fused."""
    if sharded == "replicated" and torch.__version__ < "2.8":
        pytest.skip("torch 2.7 can't differentiate PEFT's DeLoRA on DTensors")
    cases = [(method, seed, before, sharded) for method in methods for before in BEFORE_AND_AFTER]
    assert on_two_processes(tensor_parallel.train, *cases) == [[calls] * len(cases)] * 2


def test_transformers_tensor_parallel(seed: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.17")  # where PEFT shards its factors as DTensors
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "vocab_size": 96, "num_hidden_layers": 2}
    settings = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(settings).save_pretrained(tmp_path)
    assert on_two_processes(tensor_parallel.llama, (str(tmp_path), seed)) == [[0], [0]]


def test_ranks_take_the_weakest_proof(seed: int) -> None:
    """Kernels that are wrong on one rank are used on none, and `strict` raises on all."""
    (right, right_strict), (wrong, wrong_strict) = on_two_processes(proving.accelerate, (seed, False), (seed, True))
    assert (right[0], wrong[0]) == ("eager", "eager")
    assert all("its kernels failed on rank 1: y of lora: error" in reason for reason in right[1:])
    assert all("its kernels failed on cpu: y of lora: error" in reason for reason in wrong[1:])
    assert len(right) == len(wrong) == 3  # with a bias and without
    words = "accelerate: strict=True, but kernels failed when they proved themselves"
    assert all(said[0].startswith(words) for said in (right_strict, wrong_strict))
