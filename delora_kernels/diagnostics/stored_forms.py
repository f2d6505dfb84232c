"""Small frozen linears in each form that an installed library stores weights in, for
`python -m delora_kernels check`: one job a form.

    forward        the module's own forward, as far off float64 as numeric_check.py lets it be
    y, dx, dA ...  LoRA and DoRA on the base, as the methods are judged on a dense weight
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from delora_kernels.bases import numeric_check
from delora_kernels.bases.read import base_in, stored_form
from delora_kernels.bases.stored import StoredBase
from delora_kernels.testing import METHODS, Measurement, Problem
from delora_kernels.testing.problem import judged

T, K, N, R = 7, 64, 48, 3
_METHODS = ("lora", "dora")


class Form(NamedTuple):
    """One form.

    Args:
        library: The package that stores so.
        extra: The extra of this package that installs it; None: none does.
        make: (nn.Linear, device) → the same linear, stored.
    """

    library: str
    extra: str | None
    make: Callable[[nn.Linear, str], nn.Module]


def bitsandbytes_4bit(linear: nn.Linear, device: str, quant_type: str = "nf4", nested: bool = False) -> nn.Module:
    """Store it in bitsandbytes' 4 bits; its compute dtype is the linear's."""
    import bitsandbytes

    options = {"quant_type": quant_type, "compress_statistics": nested}
    dtype = linear.weight.dtype
    made: Any = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, False, dtype, **options)
    made.weight.data = linear.weight.data.cpu()
    stored: nn.Module = made.to(device)
    return stored


def hqq(linear: nn.Linear, device: str, nbits: int = 4) -> nn.Module:
    """Store it in HQQ's codes; its compute dtype is the linear's."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    options, dtype = BaseQuantizeConfig(nbits=nbits, group_size=64), linear.weight.dtype
    made: nn.Module = HQQLinear(linear.float(), options, compute_dtype=dtype, device=device)
    return made


def torchao(linear: nn.Linear, device: str, config: str = "Int8WeightOnlyConfig") -> nn.Module:
    """Store it as one of torchao's weight-only tensors."""
    from torchao import quantization

    model = nn.Sequential(linear.to(device))
    options = {"set_inductor_config": False}
    quantization.quantize_(model, getattr(quantization, config)(**options))
    return model[0]


def gptq(linear: nn.Linear, device: str, bits: int = 4) -> nn.Module:
    """Return GPTQModel's linear for its torch kernel, of the same sizes and of random codes: who
    quantises by GPTQ needs data.
    """
    with contextlib.redirect_stdout(sys.stderr):  # where the library's log does not stand among the check's rows
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear

        sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
        made: Any = TorchLinear(bits=bits, group_size=16, sym=False, desc_act=False, bias=False, **sizes)
        made.optimized = True  # it would compile how it dequantises
        made.post_init()
    for codes in (made.qweight, made.qzeros):
        codes.copy_(torch.randint(-(2**31), 2**31, codes.shape))
    made.scales = (torch.rand(made.scales.shape) * 2.0**-bits / linear.in_features**0.5).to(linear.weight.dtype)
    made.g_idx = (torch.arange(linear.in_features) // 16).to(torch.int32)
    stored: nn.Module = made.to(device)
    return stored


FORMS: dict[str, Form] = {
    "nf4": Form("bitsandbytes", "bnb", bitsandbytes_4bit),
    "nf4 double": Form("bitsandbytes", "bnb", partial(bitsandbytes_4bit, nested=True)),
    "fp4": Form("bitsandbytes", "bnb", partial(bitsandbytes_4bit, quant_type="fp4")),
    "hqq 8 bits": Form("hqq", "hqq", partial(hqq, nbits=8)),
    "hqq 4 bits": Form("hqq", "hqq", hqq),
    "hqq 2 bits": Form("hqq", "hqq", partial(hqq, nbits=2)),
    "gptq 4 bits": Form("gptqmodel", None, gptq),
    "gptq 8 bits": Form("gptqmodel", None, partial(gptq, bits=8)),
    "torchao int8": Form("torchao", "torchao", torchao),
    "torchao float8": Form("torchao", "torchao", partial(torchao, config="Float8WeightOnlyConfig")),
}
"""Name → form."""


def why_not(name: str) -> str | None:
    """Say why a form is not here, or None."""
    form = FORMS[name]
    if importlib.util.find_spec(form.library) is None:
        what = form.library if form.extra is None else f"'delora-kernels[{form.extra}]'"
        return f"{form.library} is not installed (pip install {what})"
    return None


def check(name: str, device: str, dtype: torch.dtype, seed: int) -> Iterator[Any]:
    """Measure one problem after the other on a linear of a form, as a `Job` does.

    Raises:
        NotFused: its forward is not x Wᵀ + bias of what its form reads.
    """
    torch.manual_seed(seed)
    linear = nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False)
    module = FORMS[name].make(linear, device)
    form = stored_form(module)
    if form is None:
        raise NotFused(f"its {type(module).__name__} with a {type(module.weight).__name__} is of no registered form")
    reason = form.why_not(module)
    if reason is not None:
        raise NotFused(reason)
    theirs, ours = numeric_check.errors(module, form.of(module))
    base = base_in(module)
    if not isinstance(base, StoredBase):
        raise NotFused(base)
    yield [[Measurement("forward", theirs, 2 * ours, ours)]]
    for method in _METHODS:
        yield judged(_problem(method, base, dtype, seed))


class NotFused(Exception):
    """Layers on such bases run the base's own forward; the text says why."""


def _problem(name: str, base: StoredBase, dtype: torch.dtype, seed: int) -> Problem:
    """`name` on the base, judged beside eager PyTorch on its dense weight."""
    method, device = METHODS[name], str(base.device)
    inputs = method.draw(T, K, N, R, dtype=dtype, adapter_dtype=torch.float32, device=device, seed=seed, bias=False)
    inputs |= {"weight": base.dense(dtype)}
    trained = [each for each in method.trained(inputs) if each != "weight"]
    whole = method.problem(T, K, N, R, dtype=dtype, adapter_dtype=torch.float32, device=device, seed=seed, bias=False)

    def run(given: Any) -> dict[str, Tensor]:
        return method.fused({**given, "weight": base}, trained)

    eager, oracle = partial(method.eager, trained=trained), partial(method.oracle, trained=trained)
    dtypes = {what: kind for what, kind in whole.dtypes.items() if what != "dweight"}
    return Problem(f"{name} on {base}", inputs, run, eager, oracle, dtypes, whole.through, whole.vector_dims)
