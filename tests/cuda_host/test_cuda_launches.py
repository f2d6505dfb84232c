"""What a forward and a backward pass launch: our kernels, library GEMMs, and every other torch op
that computes.
"""

from typing import Any

import pytest
import torch
from host_backend import SANITIZED
from torch import Tensor

from delora_kernels import functional as F
from delora_kernels import use_backend
from delora_kernels.backends.cuda import launch

if SANITIZED:
    pytest.skip("addresses are tested elsewhere", allow_module_level=True)

T, K, N = 300, 200, 260
WIDE, BF16 = torch.float32, torch.bfloat16
FREE = {
    *("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "promote_types"),
    *("reshape", "resolve_conj", "select", "slice", "squeeze", "t", "to", "transpose", "unbind", "unsqueeze", "view"),
}
"""Torch ops that launch nothing."""

FORWARD = {
    "lora": ["times_small", "add_parts", "rank_update", "addmm_"],
    "dora": ["row_norm", "times_small", "add_parts", "mm", "rank_update"],  # x Wᵀ is kept: form (b)
    "delora": ["fold", "times_small", "add_parts", "rank_update", "addmm_"],
}
BACKWARD = {
    "lora": ["dy_sums", "finish_dy", "token_sums", "add_parts", "addmm_"],
    "dora": ["dy_sums", "finish_dy", "token_sums", "add_parts", "scaled", "addmm_"],
    "delora": ["dy_sums", "finish_dy", "token_sums", "add_parts", "addmm_", "fold_backward", "add_parts"],
}
"""Where the sums are split."""
SPLIT_READ = ["times_small", "add_parts", "token_sums", "finish_dy"]
"""In the place of dy_sums and finish_dy above rank 32."""
CASTS = {"lora": 2, "dora": 3, "delora": 1}
"""Gradients of A and B, m, λ that torch casts from float32 where the factors are in 16 bits."""


def passes(
    method: str, dtype: torch.dtype, factors: torch.dtype, R: int, autocast: bool, patch: pytest.MonkeyPatch
) -> list[list[str]]:
    """The names of what a forward and a backward pass launched, each in its order."""
    made: dict[str, Any] = {"x": torch.randn(T, K).to(dtype), "A": torch.randn(R, K).to(factors)}
    made["B"] = torch.randn(N, R).to(factors)
    if method == "dora":
        made["magnitude"] = torch.rand(N).to(factors)
    if method == "delora":
        made["lam"] = torch.tensor(2.0, dtype=factors)
    leaves = [value.requires_grad_() for value in made.values()]
    made["weight"] = torch.randn(N, K).to(dtype)
    if method == "delora":
        made["weight_norm"] = torch.rand(K).to(factors)
    dy = torch.randn(T, N).to(BF16 if autocast else dtype)

    def forward() -> Tensor:
        with torch.autocast("cpu", BF16, enabled=autocast):
            return getattr(F, f"{method}_linear")(**made)  # type: ignore[no-any-return]

    library = launch.library()

    class Noted:
        """The library; what is launched shows in the profile under its name."""

        def __getattr__(self, name: str) -> Any:
            function = getattr(library, name)
            if name.removeprefix("dk_") not in launch.LAUNCHERS:
                return function

            def launched(*arguments: Any) -> Any:
                with torch.profiler.record_function(f"ours::{name.removeprefix('dk_')}"):
                    return function(*arguments)

            return launched

    patch.setattr(launch, "library", Noted)
    with use_backend("cuda"):
        found = []
        with torch.profiler.profile(record_shapes=True) as profile:
            y = forward()
        found.append(_launched(profile))
        with torch.profiler.profile(record_shapes=True) as profile:
            torch.autograd.grad(y, leaves, dy)
        return [*found, _launched(profile)]


def _launched(profile: torch.profiler.profile) -> list[str]:
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.name.partition("::")[2] for event in events if _computes(event) and not _parts(event)]


def _computes(event: Any) -> bool:
    kind, _, name = event.name.partition("::")
    empty = any(0 in shape for shape in event.input_shapes or [])
    return kind == "ours" or (kind == "aten" and name not in FREE and not empty)


def _parts(event: Any) -> bool:
    return any(_computes(child) or _parts(child) for child in event.cpu_children)


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
@pytest.mark.parametrize(("dtype", "factors"), [(WIDE, WIDE), (BF16, BF16), (BF16, WIDE)], ids=str)
def test_launches(method: str, dtype: torch.dtype, factors: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = passes(method, dtype, factors, 16, False, monkeypatch)
    assert forward == FORWARD[method]
    assert backward == BACKWARD[method] + ["copy_"] * (CASTS[method] if factors == BF16 else 0)


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_autocast_folds_first(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 factors under autocast: their cast is a launch of its own, but for DeLoRA, whose fold
    casts.
    """
    forward, backward = passes(method, BF16, WIDE, 16, True, monkeypatch)
    assert forward == (FORWARD[method] if method == "delora" else ["fold", *FORWARD[method]])
    assert backward == BACKWARD[method]


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_above_rank_32(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reads of dy, each with its sum; c ⊙ B̂ is then an op of torch."""
    forward, backward = passes(method, WIDE, WIDE, 40, False, monkeypatch)
    assert forward == FORWARD[method]
    assert backward == ["mul"] * (method == "dora") + SPLIT_READ + BACKWARD[method][2:]


def test_sums_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SPLIT_TARGET", 1)
    forward, backward = passes("lora", WIDE, WIDE, 16, False, monkeypatch)
    assert forward == [name for name in FORWARD["lora"] if name != "add_parts"]
    assert backward == [name for name in BACKWARD["lora"] if name != "add_parts"]
