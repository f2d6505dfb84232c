"""`python -m delora_kernels check` on broken kernels: each of BREAKAGES fails, in the rows where it
must show.
"""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from delora_kernels import dispatch, ops
from delora_kernels.__main__ import main
from delora_kernels.backends import eager
from delora_kernels.backends.eager import low_rank
from delora_kernels.diagnostics import check
from delora_kernels.op_arguments import Branch, Frozen, Masks
from delora_kernels.testing import METHODS

LOW_RANK = {name for name, method in METHODS.items() if not method.function.startswith(("ether", "grouped"))}
"""Methods whose gradients come from input_backward."""


def part(index: int, change: Any) -> Any:
    """A breakage that changes one of an op's results."""

    def broken(right: Any, *arguments: Any) -> tuple[Tensor, ...]:
        results = list(right(*arguments))
        results[index] = change(results[index], *arguments)
        return tuple(results)

    return broken


def zero_last_row(result: Tensor, *_: Any) -> Tensor:
    result = result.clone()
    if result.numel():
        result[-1] = 0
    return result


def never_written(result: Tensor, *_: Any) -> Tensor:
    y = torch.empty_like(result)
    y[:-1] = result[:-1]
    return y


def other_seed(masks: Masks) -> Masks:
    return masks if masks.seed is None else masks._replace(seed=masks.seed + 1)


def one_mask(masks: Masks) -> Masks:
    return masks if masks.seed is None else masks._replace(ranks=[], seed=masks.seed.reshape(-1)[0])


def raises(*_: Any) -> None:
    raise RuntimeError("no such\nkernel")


BREAKAGES: dict[str, tuple[str, Any, dict[str, str | None]]] = {
    # name: (op, what takes (right op, *arguments), rows that must fail)
    "branch lost in dx": (
        "input_backward",
        lambda right, dy, frozen, branch, masks: right(
            dy, frozen, branch._replace(A_hat=None if branch.A_hat is None else 0 * branch.A_hat), masks
        ),
        {"op input_backward": "dx", "lora": "dx", "delora-zero-b": None},
    ),
    "scale forgotten in dA": (
        "input_backward",
        part(1, lambda dA, dy, frozen, branch, masks: dA / branch.scale),
        {"op input_backward": "dA_hat", "lora": "dA", "dora": "dA", "delora": None},
    ),
    "1 / (1 - p) forgotten": (
        "project",
        lambda right, x, A_hat, masks: right(x, A_hat, masks) * (1 - masks.dropout_p[0]),
        {"op project": "h", "lora-dropout": "y", "lora": None},
    ),
    "branch rounded to bfloat16": (
        "project",
        lambda right, x, A_hat, *rest: right(x.bfloat16(), A_hat.bfloat16(), *rest).to(A_hat.dtype),
        {"op project": "h", "lora": "y", "delora": "y", "delora-zero-b": "dB"},
    ),
    "factors' last row lost": (
        "project",
        lambda right, *rest: zero_last_row(right(*rest).t()).t(),
        {"op project": "h", "lora": "dB", "delora-frozen-live": "dlam"},
    ),
    "bias scaled by c": (
        "expand",
        lambda right, x, weight, bias, term, rescaling: right(
            x, weight, bias if rescaling.c is None or bias is None else bias * rescaling.c, term, rescaling
        ),
        {"op expand": "y", "dora": "y", "lora": None},
    ),
    "last token never written": (
        "expand",
        part(0, never_written),
        {"op expand": "y", "lora": "y", "dora": "y", "delora": "y"},
    ),
    "dB without c": (
        "expand_backward",
        part(1, lambda dB, dy, term, done, *_: dB if done.c is None or term.h is None else dB / done.c[:, None]),
        {"op expand_backward": "dB_hat", "dora": "dB", "lora": None},
    ),
    "kept tensor mistaken for u": (
        "expand_backward",
        lambda right, dy, term, rescaled, need_bias: right(
            dy, term, rescaled._replace(kept_is_y=rescaled.kept is not None), need_bias
        ),
        {"op expand_backward": "dm", "dora": "dmagnitude", "lora": None, "dora-saved-output": None},
    ),
    "norm of W alone": (
        "row_norm",
        lambda right, weight, A_hat, B_hat, scale, m, scaled: right(weight, A_hat, 0 * B_hat, scale, m, scaled),
        {"op row_norm": "norm", "dora": "y", "lora": None},
    ),
    "dW without c": (
        "weight_grad",
        lambda right, dy, x, c, p, seed: right(dy, x, None, p, seed),
        {"op weight_grad": "dW", "dora": "dweight", "lora": None},
    ),
    "norms not clamped": (
        "fold",
        lambda right, A, B, strength, *rest: right(A, B, strength._replace(eps=0.0), *rest),
        {"op fold": "A_hat", "delora-clamped": "y", "delora": None},
    ),
    "start not negated": (
        "fold",
        part(1, lambda B_hat, A, *_: torch.cat([B_hat[:, : len(A)], -B_hat[:, len(A) :]], dim=1)),
        {"op fold": "B_hat", "delora-frozen-live": "y", "delora-frozen-paper": "dx", "delora": None},
    ),
    "residual not negated": (
        "stack_factors",
        lambda right, factors, dtype: right(
            factors if factors.residual is None else factors._replace(residual=-factors.residual), dtype
        ),
        {"op stack_factors": "columns", "goat": "y", "moe": None},
    ),
    "experts in another order": (
        "stack_factors",
        lambda right, factors, dtype: right(factors._replace(B=factors.B.flip(0)), dtype),
        {"op stack_factors": "columns", "moe": "y", "moe-gates": "dx", "lora": None},
    ),
    "norms in the wrong dtype": (
        "fold",
        part(2, lambda a, *_: a.double()),
        {"op fold": "a"},
    ),
    "norm taken as constant": (
        "fold_backward",
        part(
            0,
            lambda dA, dA_hat, dB_hat, folded, strength: (
                dA_hat * strength.weight_norm / folded.a[: len(folded.A), None] if dA.any() else dA
            ),
        ),
        {"op fold_backward": "dA", "delora": "dA", "lora": None},
    ),
    "start left out of dlam": (
        "fold_backward",
        lambda right, dA_hat, dB_hat, folded, *rest: right(dA_hat, dB_hat, folded._replace(frozen_B=None), *rest),
        {"op fold_backward": "dlam", "delora-frozen-live": "dlam", "delora-frozen-paper": None},
    ),
    "mask of another seed in backward": (
        "input_backward",
        lambda right, *rest: right(*rest[:3], other_seed(rest[3])),
        {"op input_backward": "dA_hat", "lora-dropout": "dA", "delora-dropout": "dA", "lora": None},
    ),
    "one mask for stacked adapters": (
        "input_backward",
        lambda right, *rest: right(*rest[:3], one_mask(rest[3])),
        {"op input_backward": "dx", "lora-stacked-dropout": "dx", "lora-dropout": None},
    ),
    "every element kept": (
        "dropout_mask",
        lambda right, T, K, p, seed: torch.ones(T, K, dtype=torch.bool),
        {"op dropout_mask": "rate", "op project": "h", "lora-dropout": "y", "lora": None},
    ),
    "raises": ("row_norm", raises, {"op row_norm": "raised", "dora": "raised", "lora": None}),
    "writes into x": (
        "project",
        lambda right, x, *rest: (right(x, *rest), x.zero_())[0],
        {"op project": "x", "delora": "x"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_op_fails(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    op, broken, failing = BREAKAGES[name]
    right = getattr(eager, op)
    monkeypatch.setattr(eager, op, lambda *arguments: broken(right, *arguments))
    monkeypatch.setattr(check, "SIZES", check.SIZES[:1])
    monkeypatch.setattr(ops, "NAMES", [name for name in ops.NAMES if f"op {name}" in failing])
    monkeypatch.setattr(check, "METHODS", {name: METHODS[name] for name in failing.keys() & METHODS.keys() | {"lora"}})
    assert main(["check", "--dtype", "float32", "--device", "cpu", "--seed", str(seed)]) == 1
    *rows, summary = capsys.readouterr().out.splitlines()
    failed = {(row.split("  ")[0], row[22:].split()[0]) for row in rows if "  FAIL" in row}
    for method, what in failing.items():
        if what is None:
            assert method not in {method for method, _ in failed}
        else:
            assert (method, what) in failed
            assert method in summary.split("FAILED: ")[1].split(", ")


def test_precision_lost_in_mixed_dtypes_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 adapters on a bfloat16 base must keep float32's precision in the adapters'
    gradients.
    """
    right = eager.input_backward

    def narrow(dy: Tensor, frozen: Frozen, branch: Branch, masks: Masks) -> tuple[Tensor, Tensor]:
        coarse = branch._replace(dv=branch.dv.bfloat16(), A_hat=None)
        _, dA_hat = right(dy, frozen._replace(weight=None), coarse, masks)
        return right(dy, frozen, branch._replace(x=None), masks)[0], dA_hat

    monkeypatch.setattr(eager, "input_backward", narrow)
    monkeypatch.setattr(check, "SIZES", check.SIZES[:1])
    assert main(["check", "--dtype", "bfloat16", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    failed = {(row["method"], row["what"], row["dtype"]) for row in rows if row["status"] == "FAIL"}
    mixed = {(name, "dA", "bfloat16+float32") for name in LOW_RANK if name != "delora-zero-b"}
    routed = {name for name, method in METHODS.items() if method.function == "moe_lora_linear"} - {"moe-gates"}
    mixed |= {(name, "drouter", "bfloat16+float32") for name in routed}  # its rows ride in the same product
    assert mixed | {("op input_backward", "dA_hat", "bfloat16+float32")} == failed


def test_wrong_gradient_in_float64_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = part(0, lambda dx, *_: dx * (1 + 1e-5))
    monkeypatch.setattr(eager, "input_backward", partial(broken, low_rank.input_backward))
    monkeypatch.setattr(check, "SIZES", check.SIZES[:1])
    assert main(["check", "--dtype", "float64", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    failed = [row for row in rows if row["status"] == "FAIL"]
    assert {row["method"] for row in failed if row["what"] == "gradcheck"} == LOW_RANK
    assert {row["method"] for row in failed if row["what"] == "dx"} == {*LOW_RANK, "op input_backward"}
    note = next(row["note"] for row in failed if row["what"] == "gradcheck")
    assert "with respect to input 0" in note
    assert "(inputs: x, weight" in note


def test_unasked_it_checks_the_first_backend_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU also one that an automatic choice would leave alone because it is wrong."""
    monkeypatch.setattr(dispatch, "reason_against", lambda name, call: "not here" if name == "triton" else None)
    for device, backend in (("meta", "cuda"), ("cpu", "eager")):
        call = SimpleNamespace(x=torch.empty(0, device=device))
        method: Any = SimpleNamespace(draw=lambda *_, **__: {}, call=lambda _, call=call: call)
        assert check._backend(method, device, torch.float32, torch.float32) == (backend, None)


def test_op_or_function_without_a_check_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "METHODS", {"lora": METHODS["lora"]})
    monkeypatch.setattr(ops, "NAMES", ("project", "refract"))
    assert main(["check", "--dtype", "float32"]) == 1
    *rows, summary = capsys.readouterr().out.splitlines()
    assert any(
        row.startswith("op refract ") and "refract has no entry in delora_kernels.testing.OPS" in row for row in rows
    )
    assert any(row.startswith("dora_linear ") and "no entry in delora_kernels.testing.METHODS" in row for row in rows)
    assert summary.endswith(
        "9 FAILED: op refract, delora_linear, dora_linear, ether_linear, ether_plus_linear, grouped_delora_linear, "
        "grouped_dora_linear, grouped_lora_linear, moe_lora_linear"
    )
