"""docs/stored-bases.md: its table lists the registered forms, its example is a form."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from delora_kernels.bases import stored
from delora_kernels.bases.read import base_in
from delora_kernels.functional import lora_linear

TEXT = (Path(__file__).parents[2] / "docs" / "stored-bases.md").read_text(encoding="utf-8")


def test_the_table_lists_the_registered_forms() -> None:
    """Every row that says fused, and no other."""
    rows = [line.split("|")[2:4] for line in TEXT.splitlines() if line.startswith("| ") and "fused |" in line]
    fused = {re.findall("`(.*?)`", kind)[0] for kind, state in rows if state.strip() == "fused"}
    assert fused == {name for name, form in stored.FORMS.items() if isinstance(form, tuple) or _is_ours(form)}
    assert len(rows) > len(fused)


def _is_ours(form: type) -> bool:
    return form.__module__.startswith("delora_kernels.")


class PackedLinear(nn.Module):
    """The class that the example speaks of."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 10
        self.codes, self.scales = torch.randint(-7, 8, (10, 6), dtype=torch.int8), torch.rand(10, 1)
        self.bias = nn.Parameter(torch.randn(10), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.codes.to(x.dtype) * self.scales.to(x.dtype), self.bias)


def test_the_example_is_a_form(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "register(" in block]
    assert len([line for line in example.splitlines() if line and "import" not in line]) <= 11
    monkeypatch.setattr(stored, "FORMS", dict(stored.FORMS))
    monkeypatch.setattr(PackedLinear, "__module__", "my_package")
    monkeypatch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
    exec(example, {})
    module = PackedLinear()
    base: Any = base_in(module)
    assert type(base).__name__ == "PackedBase"
    x, A, B = torch.randn(3, 6), torch.randn(2, 6), torch.randn(10, 2)
    torch.testing.assert_close(lora_linear(x, base, A, B, 2.0, module.bias), module(x) + 2 * x @ A.T @ B.T)
