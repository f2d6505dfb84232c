"""The traffic contract, counted: what each form of each method reads and writes beyond small
tensors.

The frozen linear itself reads x and W and writes y; backward reads dy and W and writes dx. Every
other pass below is the adapter's.
"""

import os
from collections import Counter
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from traffic import Traffic

from delora_kernels import functional as F
from delora_kernels import use_backend
from delora_kernels.backends.triton import forms, tables
from delora_kernels.testing.errors import relative_error

T, K, N, R, E = 96, 56, 72, 5, 2
SIZES = {"x": T * K, "y": T * N, "W": N * K}

FORWARD = {"x": 1, "W": 1}, {"y": 1}
BACKWARD = {"y": 1, "W": 1}, {"x": 1}
"""Reads and writes of the frozen linear; dy counts as y, dx as x."""

ADAPTER: dict[str, tuple[tuple[dict[str, int], dict[str, int]], tuple[dict[str, int], dict[str, int]]]] = {
    # form: (reads, writes) beyond those, forward and backward: h = x Âᵀ reads x; dv and dB̂ read
    # dy; dÂ reads x
    forms.UPDATE: (({"x": 1, "y": 1}, {"y": 1}), ({"y": 1, "x": 2}, {"x": 1})),
    forms.PREFILL: (({"x": 1, "y": 1}, {"y": 1}), ({"y": 1, "x": 2}, {"x": 1})),
    forms.OWN: (({"x": 1}, {}), ({"y": 1, "x": 1}, {})),
}

DORA: dict[str, tuple[tuple[dict[str, int], dict[str, int]], tuple[dict[str, int], dict[str, int]]]] = {
    # besides: the norm reads W; x Wᵀ is kept, and read for dm; c ⊙ W is the transient of dx
    forms.UPDATE: (({"W": 1}, {}), ({"y": 1, "W": 1}, {"W": 1})),
    forms.PREFILL: (({"W": 1}, {}), ({"y": 1, "W": 1}, {"W": 1})),
    forms.OWN: (({"W": 1}, {"y": 1}), ({"y": 1, "W": 1}, {"W": 1})),
}

LAUNCHES = {
    # fold or cast, project, GEMM and update or prefill; reading dy, its sums, reading x, its sums,
    # GEMM and update
    ("lora", forms.UPDATE): (4, 6),
    ("lora", forms.PREFILL): (4, 5),
    ("lora", forms.OWN): (3, 5),
    ("delora", forms.UPDATE): (4, 7),
    ("delora", forms.PREFILL): (4, 6),
    ("delora", forms.OWN): (3, 6),
    ("dora", forms.UPDATE): (5, 7),
    ("dora", forms.PREFILL): (5, 6),
    ("dora", forms.OWN): (4, 6),
    # factors stacked and cast, backward too; the gating rides in the projection, its gradient in
    # what adds up the sums of dy; the sums of the statistics
    ("moe_lora", forms.UPDATE): (5, 7),
    ("moe_lora", forms.PREFILL): (5, 6),
    ("moe_lora", forms.OWN): (4, 6),
}
"""Launches of a forward and of a backward pass with float32 adapters under bfloat16 autocast,
library GEMM included.
"""


@pytest.fixture(params=[forms.UPDATE, forms.PREFILL, forms.OWN])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(forms, "DEFAULT", request.param)
    return str(request.param)


def arguments(method: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    made: dict[str, Any] = {"x": normal(T, K).to(dtype).requires_grad_(), "weight": normal(N, K).to(dtype)}
    made |= {"A": normal(R, K).requires_grad_(), "B": normal(N, R).requires_grad_()}
    if method == "moe_lora":
        made |= {"A": normal(E, R, K).requires_grad_(), "B": normal(E, N, R).requires_grad_()}
        made |= {"router": normal(E, K).requires_grad_(), "top_k": 1, "balance_coef": 0.1}
    if method == "dora":
        made["magnitude"] = normal(N).abs().requires_grad_()
    if method == "delora":
        made |= {"lam": torch.tensor(2.0, requires_grad=True), "weight_norm": normal(K).abs()}
    return made


def plus(*parts: dict[str, int]) -> Counter[str]:
    return sum((Counter(part) for part in parts), Counter())


def token_sized(counter: Counter[str]) -> dict[str, float]:
    return {name: counter[name] for name in SIZES if counter[name]}


def counted(method: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Traffic, Traffic]:
    """The traffic of a forward and of a backward pass."""
    made, dy = arguments(method, seed, dtype), torch.ones(T, N).to(dtype)
    with use_backend("triton"):
        with torch.autocast("cpu", dtype), Traffic(SIZES) as forward:
            y = getattr(F, f"{method}_linear")(**made)
            y = y[0] if method == "moe_lora" else y
        with Traffic(SIZES) as backward:
            y.backward(dy)
    return forward, backward


@pytest.mark.parametrize("method", ["lora", "dora", "delora", "moe_lora"])
def test_passes_and_launches(method: str, form: str, seed: int) -> None:
    forward, backward = counted(method, seed)
    extra = DORA[form] if method == "dora" else (({}, {}), ({}, {}))
    for traffic, frozen, adapter, besides in zip(
        (forward, backward), (FORWARD, BACKWARD), ADAPTER[form], extra, strict=True
    ):
        assert token_sized(traffic.read) == plus(frozen[0], adapter[0], besides[0])
        assert token_sized(traffic.written) == plus(frozen[1], adapter[1], besides[1])
    assert (forward.launches, backward.launches) == LAUNCHES[method, form]


def test_dora_in_float16_reads_dy_once_more(seed: int) -> None:
    """c ⊙ B̂ is float32 beside a float16 dy, which has no exact parts in its dtype: dv and the sums
    read dy each.
    """
    _, backward = counted("dora", seed, torch.float16)
    _, in_bfloat16 = counted("dora", seed)
    assert backward.read["y"] == in_bfloat16.read["y"] + 1
    assert backward.written["y"] == in_bfloat16.written["y"] == 0


@pytest.mark.parametrize(("dtype", "products"), [(torch.bfloat16, 0), (torch.float16, 1)])
def test_who_multiplies_b_by_c(dtype: torch.dtype, products: int, seed: int) -> None:
    """The kernel that reads dy once; where dv has a kernel of its own, torch, in a launch that is
    not counted above.
    """
    with use_backend("triton"), torch.autocast("cpu", dtype):
        y = F.dora_linear(**arguments("dora", seed, dtype))
    with torch.profiler.profile() as profile:
        y.backward(torch.ones(T, N).to(dtype))
    assert sum(event.name == "aten::mul" for event in profile.events()) == products


@pytest.mark.parametrize("saved", ["private", "output"])
def test_dora_in_form_d_without_a_private_tensor(saved: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs nothing private runs on c ⊙ W, which the norm's own launch writes: one read and
    one write of W.
    """
    monkeypatch.setattr(forms, "DEFAULT", forms.PREFILL)
    made = arguments("dora", seed)
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16), Traffic(SIZES) as traffic:
        y = F.dora_linear(**made, saved=saved)
    lean = saved == "output"
    assert token_sized(traffic.read) == {"x": 2, "y": 1, "W": 2}
    assert token_sized(traffic.written) == ({"y": 2, "W": 1} if lean else {"y": 2})
    with use_backend("eager"), torch.autocast("cpu", torch.bfloat16):
        expected = F.dora_linear(**made)
    assert relative_error(y, expected.double()) <= 4 * torch.finfo(torch.bfloat16).eps  # each rounds W, h and y


@pytest.mark.parametrize("method", ["lora", "delora", "moe_lora"])
def test_a_split_projection_is_one_launch_more(method: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that adds the parts; it gates a mixture too."""
    monkeypatch.setitem(tables.TABLES, "times_small", {"128": tables.Tiles(64, 16, 4, 2)})
    split, _ = counted(method, seed)
    monkeypatch.setattr(tables, "SPLIT_TARGET", 1)
    whole, _ = counted(method, seed)
    assert split.launches == whole.launches + 1
    assert token_sized(split.read) == token_sized(whole.read)


def test_an_extra_read_is_seen() -> None:
    x = torch.ones(T, K)
    with Traffic(SIZES) as traffic:
        torch.mm(torch.mm(x, torch.ones(K, N)), torch.ones(N, K))
    assert token_sized(traffic.read) == {"x": 1, "y": 1, "W": 2}
    assert token_sized(traffic.written) == {"x": 1, "y": 1}
