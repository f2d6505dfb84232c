"""What DoRA promises, held by the reference: lengths of rows, finite values at zero norms."""

import pytest
import torch
from golden_cases import relative_error
from reference_calls import Maker, run, weight_of

from delora_kernels import reference


def test_dora_rows_have_length_m() -> None:
    arguments = Maker().arguments("dora_peft")
    assert relative_error(weight_of("dora_linear", arguments).norm(dim=1), arguments["magnitude"].abs()) <= 1e-14


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", ["dora_peft", "dora_branch"])
def test_dora_row_of_zero_norm(variant: str, masked: bool) -> None:
    maker = Maker()
    arguments = maker.arguments(variant)
    arguments["weight"][2], arguments["B"][2] = 0, 0
    if not masked:
        arguments["dropout_mask"] = None
    grad_out = maker.tensor(5, 6)
    y, grads = run("dora_linear", arguments, grad_out)
    assert torch.equal(y[:, 2], arguments["bias"][2].expand(5))
    assert weight_of("dora_linear", arguments)[2].abs().max() == 0
    assert grads["magnitude"][2] == 0
    assert grads["B"][2].abs().max() == 0
    # the other rows do not notice: the same call without row 2
    keep = [0, 1, 3, 4, 5]
    for name in ("weight", "B", "bias", "magnitude"):
        arguments[name] = arguments[name][keep]
    small_y, small_grads = run("dora_linear", arguments, grad_out[:, keep])
    assert relative_error(y[:, keep], small_y) <= 1e-14
    for name, grad in small_grads.items():
        whole = grads[name] if name in ("x", "A") else grads[name][keep]
        assert relative_error(whole, grad) <= 1e-13, name


def test_dora_nan_stays_visible() -> None:
    arguments = Maker().arguments("dora_peft")
    arguments["weight"][2, 3] = torch.nan
    y, grads = run("dora_linear", arguments)
    assert torch.equal(y.isnan(), (torch.arange(6) == 2).expand(5, 6))
    assert torch.equal(grads["B"].isnan(), (torch.arange(6) == 2)[:, None].expand(6, 3))
    assert torch.equal(grads["magnitude"].isnan(), torch.arange(6) == 2)


def test_dora_unknown_dropout() -> None:
    arguments = Maker().arguments("dora_peft") | {"dropout": "both"}
    with pytest.raises(ValueError, match="dropout must be 'peft' or 'branch', got 'both'"):
        reference.dora_linear(**arguments)
