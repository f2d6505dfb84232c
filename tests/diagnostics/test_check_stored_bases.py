"""`python -m delora_kernels check` on stored bases: numbers where a library is installed, and the
reason where not.
"""

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delora_kernels import functional, ops
from delora_kernels.__main__ import main
from delora_kernels.bases import StoredBase, numeric_check, register, stored
from delora_kernels.diagnostics import check, stored_forms
from delora_kernels.testing import METHODS

FORMS = dict(stored_forms.FORMS)


class Packed(nn.Module):
    """A linear of another library: int8 codes, and a scale."""

    def __init__(self, linear: nn.Linear, device: str, factor: float = 1.0) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.scale, self.bias, self.factor = linear.weight.abs().max() / 127, None, factor
        self.codes = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype)) * self.factor


class PackedBase(StoredBase):
    @classmethod
    def of(cls, module: Any) -> "PackedBase":
        base = cls((module.out_features, module.in_features), module.codes.device, compute_dtype=module.scale.dtype)
        base.codes, base.scale, base.key = module.codes, module.scale, (module.factor,)
        return base

    def dense(self, dtype: torch.dtype) -> Tensor:
        made: Tensor = self.codes.to(dtype) * self.scale.to(dtype)
        return made


class Doubled(PackedBase):
    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return 2 * y


@pytest.fixture(autouse=True)
def stored_bases_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rest one method; the registry and what has been found out are the test's own."""
    monkeypatch.setattr(check, "METHODS", {"lora": METHODS["lora"]})
    monkeypatch.setattr(functional, "CALLS", {"lora_linear": functional.CALLS["lora_linear"]})
    monkeypatch.setattr(ops, "NAMES", ())
    monkeypatch.setattr(stored, "FORMS", dict(stored.FORMS))
    monkeypatch.setattr(numeric_check, "_found", {})


def rows(capsys: pytest.CaptureFixture[str], status: int, *dtypes: str) -> list[dict[str, Any]]:
    """The base rows of the check."""
    assert main(["check", "--json", *[word for dtype in dtypes for word in ("--dtype", dtype)]]) == status
    found = json.loads(capsys.readouterr().out)["rows"]
    return [row for row in found if row["method"].startswith("base ")]


def has(form: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    register(f"{Packed.__module__}.Packed", form)
    made = stored_forms.Form("torch", "none", partial(Packed, **options))
    monkeypatch.setattr(stored_forms, "FORMS", {"packed": made})


def test_numbers_of_a_form(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    has(PackedBase, monkeypatch)
    found = rows(capsys, 0, "float64", "float32", "bfloat16")
    names = {"forward", "y", "dx", "dA", "dB", "dmagnitude"}
    for dtype in ("float32", "bfloat16"):
        assert {row["what"] for row in found if row["dtype"] == dtype} == names
    assert all(0 < row["error"] <= row["limit"] and row["status"] == "ok" for row in found)
    assert {row["dtype"] for row in found} == {"float32", "bfloat16"}


def test_a_broken_form_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fused way makes of it is not what eager PyTorch makes of its dense weight."""
    has(Doubled, monkeypatch)
    failed = {row["what"] for row in rows(capsys, 1, "float32") if row["status"] == "FAIL"}
    assert failed == {"y", "dx", "dA", "dB", "dmagnitude"}


def test_another_forward_is_skipped_with_its_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers on it run that forward: no wrong number comes of it."""
    has(PackedBase, monkeypatch, factor=1.01)
    (row,) = rows(capsys, 0, "float32")
    assert row["status"] == "skipped"
    assert "its forward is not x Wᵀ + bias of its dense form: it is off by 1e-02" in row["note"]


def test_what_is_not_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a form, which says what to install."""
    monkeypatch.setattr(stored_forms, "FORMS", FORMS)
    monkeypatch.setattr(stored_forms.importlib.util, "find_spec", lambda name: None)
    found = rows(capsys, 0, "float32", "bfloat16")
    assert [row["method"] for row in found] == [f"base {name}" for name in FORMS]
    assert {row["status"] for row in found} == {"skipped"}
    notes = {row["method"]: row["note"] for row in found}
    assert notes["base nf4"] == "bitsandbytes is not installed (pip install 'delora-kernels[bnb]')"
    assert notes["base gptq 4 bits"] == "gptqmodel is not installed (pip install gptqmodel)"


@pytest.mark.parametrize("name", FORMS)
def test_installed_forms(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    missing = stored_forms.importlib.util.find_spec(FORMS[name].library) is None
    if missing:
        pytest.skip(f"needs {FORMS[name].library}")
    monkeypatch.setattr(stored_forms, "FORMS", {name: FORMS[name]})
    found = rows(capsys, 0, "float32", "bfloat16")
    assert {(row["what"], row["dtype"]) for row in found} >= {("forward", "float32"), ("dx", "bfloat16")}
    assert {row["status"] for row in found} == {"ok"}
