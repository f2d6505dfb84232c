"""Supported versions: the table, where a version lies in it, and the check of a PEFT that no test
has run with.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

from delora_kernels.diagnostics import versions
from delora_kernels.integrations.peft.fused import layer_check, plan, verdicts

pytestmark = pytest.mark.oldest_peft

ROOT = Path(__file__).parents[3]
PEFT_NEWEST = versions.TABLE["peft"].newest


@pytest.fixture
def kept() -> Iterator[None]:
    """What this process knows of the installed PEFT is put back."""
    known, against = dict(verdicts.reasons), list(verdicts.against_experts)
    yield
    verdicts.reasons.update(known)
    verdicts.against_experts[:] = against


def found() -> dict[str, str | None]:
    """The verdicts of a fresh process."""
    layer_check.judge_installed_peft()
    return dict(verdicts.reasons)


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("peft", None, versions.MISSING),
        ("peft", "0.17.1", versions.OLDER),
        ("peft", "0.18.0.dev0", versions.OLDER),
        ("peft", "0.18.0", versions.TESTED),
        ("peft", "0.20.1.dev0", versions.PRE_RELEASE),
        ("peft", "0.21.2", versions.TESTED),
        ("peft", "0.21.3.dev0", versions.NEWER),
        ("peft", "0.21.10", versions.NEWER),
        ("peft", "1.0", versions.NEWER),
        ("torch", "2.6.0+cu124", versions.OLDER),
        ("torch", "2.7.0+cu126", versions.TESTED),
        ("torch", "2.13.0+cpu", versions.TESTED),
        ("torch", "2.15.9", versions.TESTED),
        ("torch", "2.16.0", versions.NEWER),
        ("torch", "2.10.0a0+git1234", versions.PRE_RELEASE),
        ("torch", "my build", versions.PRE_RELEASE),
        ("python", "3.9.20", versions.OLDER),
        ("python", "3.13.7", versions.TESTED),
        ("transformers", "5.24.0", versions.NEWER),
    ],
)
def test_status(name: str, version: str | None, expected: str) -> None:
    assert versions.status(name, version) == expected


def test_describe() -> None:
    assert versions.describe("peft", None) == "not installed"
    assert versions.describe("peft", "0.25.0") == f"0.25.0 (newer than the tested {PEFT_NEWEST})"
    assert versions.describe("torch", "2.5.1") == "2.5.1 (older than the supported 2.7)"
    assert versions.describe("torch", "2.13.0+cpu") == "2.13.0+cpu (tested)"
    assert versions.describe("torch", "2.10.1") == "2.10.1 (supported, but the tests ran with 2.7, 2.13, 2.15)"
    for name, row in versions.TABLE.items():
        assert row.oldest in row.ran[0], name
        assert row.newest == row.ran[-1], name
        assert all("(tested)" in versions.describe(name, ran) for ran in row.ran), name


def test_installed() -> None:
    assert versions.installed("peft") == peft.__version__
    assert versions.installed("torch") == torch.__version__.partition("+")[0] or "+" in torch.__version__
    assert versions.version_of("no-such-package", "peft") == peft.__version__
    assert versions.version_of("no-such-package") is None


def test_a_peft_that_stands_before_the_installed_one(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    """A checkout on the import path: what is imported counts, not what the installed package's
    metadata says.
    """
    checked: list[str] = []
    monkeypatch.setattr(peft, "__version__", "0.99.0.dev0")
    monkeypatch.setattr(layer_check, "difference", checked.append)
    assert versions.installed("peft") == "0.99.0.dev0"
    assert found()["lora"] is None
    assert checked == list(verdicts.METHODS)


@pytest.mark.parametrize("document", ["README.md", "docs/versions.md"])
def test_documents_show_the_table(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    missing = [line for line in versions.as_markdown().splitlines() if line not in text]
    assert not missing, f"{document} lacks rows of versions.as_markdown()"


def test_files_agree_with_the_table() -> None:
    """The lower bounds of setup.py, its classifiers, and the pins of the two constraints files."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert re.search(r'python_requires=">=([\d.]+)"', setup)[1] == versions.TABLE["python"].oldest  # type: ignore[index]
    for name in ("torch", "peft", "transformers"):
        assert set(re.findall(rf'"{name}>=([\d.]+)"', setup)) == {versions.TABLE[name].oldest}
    minors = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", setup)]
    bounds = (versions.TABLE["python"].oldest, versions.TABLE["python"].newest)
    assert (f"3.{minors[0]}", f"3.{minors[-1]}") == bounds
    assert minors == list(range(minors[0], minors[-1] + 1))
    for name in ("torch", "triton", "peft", "transformers"):
        oldest, pinned = (_pin(file, name) for file in ("constraints-oldest.txt", "constraints.txt"))
        assert oldest == f"{versions.TABLE[name].oldest}.0"
        assert versions.status(name, pinned) == versions.TESTED
    assert _pin("constraints.txt", "peft") == PEFT_NEWEST


def _pin(file: str, name: str) -> str:
    return re.search(rf"^{name}==([^;\s]+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)[1]  # type: ignore[index]


def test_a_tested_peft_is_not_checked(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    monkeypatch.setattr(layer_check, "difference", lambda method: pytest.fail("checked"))
    monkeypatch.setattr(versions, "installed", lambda name: PEFT_NEWEST)
    assert found() == dict.fromkeys(verdicts.METHODS)


def test_an_older_peft_is_declined(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    monkeypatch.setattr(versions, "installed", lambda name: "0.17.1")
    assert found()["dora"] == "PEFT 0.17.1 is older than the supported 0.18"


def test_an_unknown_peft_is_checked(
    monkeypatch: pytest.MonkeyPatch, kept: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The installed PEFT, under another version: it passes, silently, and leaves the random numbers
    alone.
    """
    monkeypatch.setattr(versions, "installed", lambda name: "0.99.0")
    before = torch.get_rng_state()
    with caplog.at_level(logging.DEBUG), torch.no_grad(), torch.device("meta"):
        assert found() == dict.fromkeys(verdicts.METHODS)
    assert [record for record in caplog.records if "integrations" in record.name] == []
    assert torch.equal(torch.get_rng_state(), before)


def _scaled(right: Any, factor: float) -> Any:
    return lambda self, x, *args, **kwargs: factor * right(self, x, *args, **kwargs)


def _new_option(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y: Tensor = self.base_layer(x)
    return y + self.lora_gate if self.lora_gate else y


class _Backward(torch.autograd.Function):
    """The identity whose gradient is doubled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


def _wrong_gradient(right: Any) -> Any:
    doubled = _Backward.apply
    return lambda self, x, *args, **kwargs: right(self, doubled(x), *args, **kwargs)


CHANGES: dict[str, tuple[type, str, Any, dict[str, str | None]]] = {
    "a new option": (
        LoraLinear,
        "forward",
        lambda right: _new_option,
        {"lora": "Linear.forward reads lora_gate, as in no tested version", "dora": "lora_gate", "delora": None},
    ),
    "another number": (
        LoraLinear,
        "forward",
        lambda right: _scaled(right, 1.0001),
        {"lora": "its output is off by 1e-04 of its maximum", "dora": "its output is off by", "delora": None},
    ),
    "another gradient": (
        DeloraLinear,
        "forward",
        _wrong_gradient,
        {"lora": None, "dora": None, "delora": "the gradient of its input is off by 5e-01 of its maximum"},
    ),
    "another norm": (
        DoraLinearLayer,
        "get_weight_norm",
        lambda right: lambda self, weight, *args, **kwargs: weight.norm(dim=1),
        {"lora": None, "dora": "its output is off by", "delora": None},
    ),
    "a renamed method": (
        DoraLinearLayer,
        "get_weight_norm",
        None,
        {"lora": None, "dora": "has no attribute 'get_weight_norm'", "delora": None},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_unknown_peft_that_differs_is_declined(name: str, monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    owner, attribute, change, expected = CHANGES[name]
    right = getattr(owner, attribute)
    if change is None:
        monkeypatch.delattr(owner, attribute)
    else:
        monkeypatch.setattr(owner, attribute, change(right))
        # it is what such a PEFT would define itself
        monkeypatch.setitem(plan._DEFINED[owner], attribute, getattr(owner, attribute))
    monkeypatch.setattr(versions, "installed", lambda name: "0.99.0")
    titles = {"lora": "LoRA", "dora": "DoRA", "delora": "DeLoRA"}
    answers = found()
    for method, reason in expected.items():
        answer = answers[method]
        if reason is None:
            assert answer is None, method
        else:
            assert answer is not None, method
            start = f"PEFT 0.99.0 is newer than the tested {PEFT_NEWEST} and its {titles[method]} layer differs: "
            assert answer.startswith(start)
            assert reason in answer


def test_reads_sees_nested_and_wrapped_code() -> None:
    def inner(self: Any) -> Any:
        return [item.nested for item in self.first]

    def outer(self: Any) -> Any:
        return inner(self).second

    assert layer_check.reads(outer) == layer_check.reads(property(outer)) == {"first", "nested", "second"}
