"""What PEFT lets people do with an adapter of any method: train, save, load, switch and
delete it.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input of the small models."""
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def load(folder: Path, onto: nn.Module, **options: Any) -> Any:
    """The adapter on a copy of a base model; a missing key, or one that has no place, is an
    error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(onto), folder, **options)


def train(made: nn.Module, x: Tensor, steps: int = 3) -> None:
    """Some steps of AdamW, whose decay would show in what must not be trained."""
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    for _ in range(steps):
        made(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def check_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """Their states are the same bits."""
    state, other = ours.state_dict(), theirs.state_dict()
    assert state.keys() == other.keys()
    assert [k for k in state if state[k].dtype != other[k].dtype or not torch.equal(state[k], other[k])] == []


def check_goes_on(again: Any, made: Any, x: Tensor) -> None:
    """A loaded model is the saved one, and trains on as it does, bit for bit."""
    check_equal(again, made)
    assert torch.equal(again.train()(x), made(x))
    for one in (made, again):
        train(one, x)
    check_equal(again, made)
    theirs, ours = (one.peft_config["default"].to_dict() for one in (made, again))
    assert {k for k in ours if ours[k] != theirs[k]} <= {"inference_mode", "auto_mapping"}


def outputs_of_each(made: Any, onto: nn.Module, x: Tensor, mark: str) -> dict[str, Tensor]:
    """What the adapters "default" and "other" compute, each alone; of parameters with `mark`, its
    own are trained.
    """
    outputs = {}
    for name in ("default", "other"):
        made.set_adapter(name)
        outputs[name] = made.eval()(x)
        trained = {key for key, p in made.named_parameters() if p.requires_grad}
        assert trained == {key for key, _ in made.named_parameters() if mark in key and key.endswith(name)}
    assert not torch.equal(outputs["default"], outputs["other"])
    with made.disable_adapter():
        assert torch.equal(made(x), onto(x))
    assert torch.equal(made(x), outputs["other"])
    return outputs


def check_loaded_switched_and_deleted(folder: Path, onto: nn.Module, x: Tensor, outputs: dict[str, Tensor]) -> Any:
    """Both adapters saved in `folder` compute on a fresh base what they did; the one without "two"
    is returned.
    """
    again = load(folder, onto, adapter_name="one")
    again.load_adapter(folder / "other", "two")
    assert torch.equal(again(x), outputs["default"])
    again.set_adapter("two")
    assert torch.equal(again(x), outputs["other"])
    again.delete_adapter("two")
    assert not any("two" in key for key in again.state_dict())
    again.set_adapter("one")
    assert torch.equal(again(x), outputs["default"])
    return again
