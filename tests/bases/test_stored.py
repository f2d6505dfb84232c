"""The methods on stored bases: every result is that of the float64 formula on the dequantised
weight; one dequantisation each way, and nothing dense is kept.
"""

from typing import Any

import pytest
import torch
from stored_layers import FORMS, stored
from torch import Tensor

from delora_kernels.bases import numeric_check
from delora_kernels.bases.read import base_in
from delora_kernels.bases.stored import StoredBase
from delora_kernels.testing import METHODS, Problem, failures


def read(module: Any) -> StoredBase:
    base = base_in(module)
    assert isinstance(base, StoredBase), base
    return base


def problem(method: str, base: Any, dtype: torch.dtype, adapter_dtype: torch.dtype, seed: int, T: int) -> Problem:
    """A problem of a method whose weight is stored, and dense for eager PyTorch and the oracle."""
    N, K = base.shape
    made = METHODS[method]
    inputs = made.draw(T, K, N, 4, dtype=dtype, adapter_dtype=adapter_dtype, seed=seed, bias=base.bias is not None)
    inputs |= {"weight": base.dense(dtype)} | ({} if base.bias is None else {"bias": base.bias.to(dtype)})
    trained = [name for name in made.trained(inputs) if name not in ("weight", "bias")]

    def run(given: Any) -> dict[str, Tensor]:
        return made.fused({**given, "weight": base}, trained)

    whole = made.problem(T, K, N, 4, dtype=dtype, adapter_dtype=adapter_dtype, seed=seed)
    dtypes = {what: kind for what, kind in whole.dtypes.items() if what not in ("dweight", "dbias")}
    dtypes = {what: kind for what, kind in dtypes.items() if what[:1] != "d" or what[1:] in trained}
    eager, oracle = (lambda given: made.eager(given, trained)), (lambda given: made.oracle(given, trained))
    return Problem(f"{method} on {base}", inputs, run, eager, oracle, dtypes, whole.through, whole.vector_dims)


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_every_gradient(form: str, seed: int) -> None:
    """LoRA, rsLoRA, DoRA and DeLoRA in float32, with PEFT's dropouts, and a mixture."""
    base = read(stored(form, 48, 40, seed, dtype=torch.float32))
    for method in ("lora", "rslora", "dora", "delora", "dora-dropout", "moe"):
        assert failures(problem(method, base, torch.float32, torch.float32, seed, 37)) == [], method


@pytest.mark.parametrize("form", ["nf4-nested", "torchao-int8", "hqq-4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form: str, dtype: torch.dtype, seed: int) -> None:
    """Float32 adapters on a base that multiplies in 16 bits."""
    base = read(stored(form, 48, 40, seed, dtype=dtype))
    for method in ("lora", "dora", "delora"):
        assert failures(problem(method, base, dtype, torch.float32, seed, 21)) == [], method


HALVED = ["nf4", "nf4-nested", "fp4-nested-bf16-storage", "nf4-from-bf16"]


@pytest.mark.parametrize("form", HALVED)
def test_a_float32_backward_makes_one_half_after_the_other(form: str, seed: int, monkeypatch: Any) -> None:
    """Of a large W: together they are W bit for bit, also where blocks go over rows; every
    gradient.
    """
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")
    from delora_kernels.bases import bitsandbytes_4bit

    for N, K in ((48, 40), (65, 64), (33, 96), (17, 200), (8, 70)):
        base = read(stored(form, N, K, seed, dtype=torch.float32))
        assert [rows for rows, _ in base.dense_parts(torch.float32)] == [None]
        with monkeypatch.context() as patch:
            patch.setattr(bitsandbytes_4bit, "HALVED", 4 * N * K)
            parts = base.dense_parts(torch.float32)
            assert [rows for rows, _ in base.dense_parts(torch.bfloat16)] == [None]
            patch.setattr(bitsandbytes_4bit, "HALVED", 4 * N * K + 1)
            assert [rows for rows, _ in base.dense_parts(torch.float32)] == [None]
        assert torch.equal(torch.cat([make() for _, make in parts]), base.dense(torch.float32))
        assert len(parts) == (1 if N == 8 else 2)  # 8 rows of 70 have no whole block in a half
    monkeypatch.setattr(bitsandbytes_4bit, "HALVED", 0)
    base = read(stored(form, 48, 40, seed, dtype=torch.float32))
    for method in ("lora", "dora", "delora", "dora-dropout", "moe"):
        assert failures(problem(method, base, torch.float32, torch.float32, seed, 37)) == [], method


def test_torchao_weights_that_quantise_their_input(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own word, and by the numeric check without it."""
    pytest.importorskip("torchao", reason="needs torchao: pip install 'delora-kernels[torchao]'")
    from delora_kernels.bases.torchao_weight import TorchaoWeight

    module = stored("torchao-int8", 48, 40, seed, config="Int8DynamicActivationInt8WeightConfig")
    assert base_in(module) == "its torchao weight quantises its input"
    monkeypatch.setattr(TorchaoWeight, "why_not", lambda module: None)
    monkeypatch.setattr(numeric_check, "_found", {})
    assert "(it may quantise its input)" in str(base_in(module))
