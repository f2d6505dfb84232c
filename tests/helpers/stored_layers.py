"""Frozen linears in the forms that quantisation libraries store them in, small, of random weights;
a form whose library is not installed skips.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from peft_models import config
from torch import Tensor, nn


def bitsandbytes_4bit(
    N: int,
    K: int,
    *,
    bias: bool = True,
    quant_type: str = "nf4",
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
    weight_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A Linear4bit; `dtype` is its compute dtype, `weight_dtype` what it was quantised from."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")
    options = {"compress_statistics": nested, "quant_type": quant_type, "quant_storage": storage}
    linear: Any = bnb.nn.Linear4bit(K, N, bias, dtype, **options)
    linear.weight.data = torch.randn(N, K).div(K**0.5).to(weight_dtype)
    if bias:
        linear.bias.data = torch.randn(N)
        linear.bias.requires_grad_(False)
    made: nn.Module = linear.to("cpu")
    return made


def torchao(
    N: int, K: int, *, bias: bool = True, config: str = "Int8WeightOnlyConfig", dtype: torch.dtype | None = None
) -> nn.Module:
    """An nn.Linear of `dtype` with a weight-only quantised tensor for its weight."""
    quantization = pytest.importorskip(
        "torchao", reason="needs torchao: pip install 'delora-kernels[torchao]'"
    ).quantization
    model = nn.Sequential(nn.Linear(K, N, bias, dtype=dtype or torch.float32)).requires_grad_(False)
    name, _, group = config.partition(":")
    granularity = {"granularity": quantization.PerGroup(int(group))} if group else {}
    quantization.quantize_(model, getattr(quantization, name)(**granularity))
    return model[0]


def hqq(N: int, K: int, *, bias: bool = True, nbits: int = 4, dtype: torch.dtype | None = None) -> nn.Module:
    """An HQQLinear."""
    quantize = pytest.importorskip("hqq.core.quantize", reason="needs HQQ: pip install 'delora-kernels[hqq]'")
    linear = nn.Linear(K, N, bias).requires_grad_(False)
    config = quantize.BaseQuantizeConfig(nbits=nbits, group_size=8)
    made: nn.Module = quantize.HQQLinear(linear, config, compute_dtype=dtype or torch.float32, device="cpu")
    return made


FORMS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "nf4": (bitsandbytes_4bit, {"nested": False}),
    "nf4-nested": (bitsandbytes_4bit, {}),
    "fp4": (bitsandbytes_4bit, {"quant_type": "fp4", "nested": False}),
    "fp4-nested-bf16-storage": (bitsandbytes_4bit, {"quant_type": "fp4", "storage": torch.bfloat16}),
    "nf4-from-bf16": (bitsandbytes_4bit, {"weight_dtype": torch.bfloat16}),
    "torchao-int8": (torchao, {}),
    "torchao-int8-groups": (torchao, {"config": "Int8WeightOnlyConfig:8"}),
    "torchao-float8": (torchao, {"config": "Float8WeightOnlyConfig"}),
    "hqq-8": (hqq, {"nbits": 8}),
    "hqq-4": (hqq, {}),
    "hqq-2": (hqq, {"nbits": 2}),
}
"""Name → what makes it, and its options."""


def stored(form: str, N: int, K: int, seed: int, **options: Any) -> nn.Module:
    """A frozen linear of one of FORMS, the same for a seed."""
    make, own = FORMS[form]
    torch.manual_seed(seed)
    return make(N, K, **own | options)


class Two(nn.Module):
    """Two linears of one form and shape in a row."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(), make()
        self.is_loaded_in_4bit = True  # what Transformers says to PEFT

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(nn.functional.gelu(self.first(x)))
        return y


def bare(form: str, seed: int, width: int = 32, **options: Any) -> Any:
    """Two stored linears in a row, the same for a seed."""
    torch.manual_seed(seed)
    make, own = FORMS[form]
    return Two(lambda: make(width, width, **own | options))


def adapted(form: str, method: str, seed: int, width: int = 32, **options: Any) -> Any:
    """A PEFT model of two stored linears, its adapters and magnitudes away from their start."""
    lora = {name: options.pop(name) for name in ("dropout_p", "r") if name in options}
    made = peft.get_peft_model(
        bare(form, seed, width, **options), config(method, target_modules=["first", "second"], **lora)
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter *= 0.5 + torch.rand_like(parameter)
    return made


@contextmanager
def dequantisations() -> Iterator[list[int]]:
    """A list that grows by one for each dequantisation of ours."""
    made: list[int] = []
    from delora_kernels.bases import bitsandbytes_4bit

    own = bitsandbytes_4bit.dequantize_4bit

    def counting(*arguments: Any) -> Tensor:
        made.append(1)
        return own(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitsandbytes_4bit, "dequantize_4bit", counting)
        yield made
