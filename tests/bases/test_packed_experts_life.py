"""Experts in 4 bits through a model's life: copied, cast, saved, loaded, shared, and written to by
nobody.
"""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_models import adapted, assert_close, block, routed, step
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.bases.packed_experts import PackedExperts, Storing

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")
pytest.importorskip("transformers", "5")

torch.set_num_threads(1)


def experts_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if hasattr(module, "has_gate"))


@pytest.mark.parametrize("double_quant", [False, True], ids=["once", "twice"])
def test_life(double_quant: bool, seed: int) -> None:
    """Copied, cast, saved and loaded, switched; written to by nobody."""
    model = adapted(block(seed=seed), seed=seed + 1)
    dk.quantize_experts(model, double_quant=double_quant)
    dk.accelerate(model)
    inputs = routed(9, seed)
    theirs = step(model, inputs)
    assert_close(step(copy.deepcopy(model), inputs), theirs, 0)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    other = adapted(block(seed=seed + 2), seed=seed + 3)
    dk.quantize_experts(other, double_quant=double_quant)
    dk.accelerate(other)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_close(step(other, inputs), theirs, 0)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(RuntimeError, match="can't be written to.*export the adapter"):
            merge()
        assert_close(step(model, inputs), theirs, 0)
    with model.disable_adapter():
        plain = step(model, inputs, trained=False)["y"]
    assert (plain - theirs["y"]).abs().max() > 0.01 * plain.abs().max()
    model.to(torch.bfloat16)
    weight = experts_of(model)._parameters["down_proj"]
    assert (type(weight), weight.dtype, weight.packed.dtype) == (PackedExperts, torch.bfloat16, torch.uint8)
    x, chosen, weights = routed(9, seed, dtype=torch.bfloat16)
    halved = step(model, (x, chosen, weights))
    assert float((halved["y"].float() - theirs["y"]).abs().max()) < 0.05 * float(theirs["y"].abs().max())


def test_a_fresh_process_loads_a_state_dict(tmp_path: Any) -> None:
    made = block()
    dk.quantize_experts(made)
    torch.save(made.state_dict(), tmp_path / "state.pt")
    code = (
        "import sys, torch; from delora_kernels import quantize_experts; "
        "print(type(torch.load(sys.argv[1], weights_only=True)['experts.down_proj']).__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code, tmp_path / "state.pt"], capture_output=True, text=True)
    assert found.stdout.strip() == "PackedExperts", found.stderr


def _set(packed: Tensor, other: Tensor) -> None:
    packed[0] = other[0]


def _add_to_one(packed: Tensor, other: Tensor) -> None:
    packed[0] += other[0]


def _step(packed: Tensor, other: Tensor, foreach: bool) -> None:
    """An optimiser's, of a parameter that somebody gave a gradient."""
    parameter = nn.Parameter(packed)
    parameter.grad = other
    torch.optim.SGD([parameter], lr=1.0, foreach=foreach).step()


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "in place": lambda packed, other: packed.add_(other),
    "through .data": lambda packed, other: packed.data.mul_(2.0),
    "copy_": lambda packed, other: packed.copy_(other),
    "zero_": lambda packed, other: packed.zero_(),
    "out=": lambda packed, other: torch.add(other, other, out=packed),
    "foreach": lambda packed, other: torch._foreach_add_([other.clone(), packed], 1.0),
    "foreach of lists": lambda packed, other: torch._foreach_copy_([packed], [other]),
    "one expert": _set,
    "added to one expert": _add_to_one,
    "assigned to .data": lambda packed, other: setattr(packed, "data", other),
    "assigned to .data in another shape": lambda packed, other: setattr(nn.Parameter(packed, False), "data", other[0]),
    "an optimiser": lambda packed, other: _step(packed, other, False),
    "an optimiser's foreach": lambda packed, other: _step(packed, other, True),
}


@pytest.mark.parametrize("double_quant", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("write", WRITES)
def test_writes_are_refused(write: str, double_quant: bool, seed: int) -> None:
    """Never silently lost in a copy, and nothing is written."""
    other = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(seed))
    packed = PackedExperts.quantised(other, Storing("nf4", 32, 256, double_quant))
    before = packed + 0
    with torch.no_grad(), pytest.raises(RuntimeError, match="can't be written to.*export the adapter"):
        WRITES[write](packed, other)
    assert torch.equal(packed + 0, before)


@pytest.mark.parametrize("double_quant", [False, True], ids=["once", "twice"])
def test_data_of_another_one(double_quant: bool, seed: int) -> None:
    """Assigned to `.data`, numbers, dtype and shape are the other one's, quantised as it is."""
    numbers = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(seed))
    packed = nn.Parameter(PackedExperts.quantised(numbers, Storing("nf4", 32)), requires_grad=False)
    other = PackedExperts.quantised(-numbers[:2].bfloat16(), Storing("nf4", 64, 256, double_quant))
    packed.data = other
    assert (type(packed), packed.shape, packed.dtype) == (PackedExperts, other.shape, torch.bfloat16)
    assert torch.equal(packed + 0, other + 0)
    assert torch.equal(packed.data[1], other[1])
    assert packed.storing == other.storing


SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "one expert": lambda weight: weight[1],
    "some": lambda weight: weight[0:2],
    "flat": lambda weight: weight.view(-1),
    "transposed": lambda weight: weight.mT,
    "narrowed": lambda weight: weight.narrow(0, 0, 1),
    "unbound": lambda weight: weight.unbind(0)[1],
}


@pytest.mark.parametrize("of", SLICES)
def test_slices_are_dense_copies(of: str, seed: int) -> None:
    """What docs/experts.md says of them: plain tensors, and the weight does not see a write."""
    numbers = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(seed))
    packed = PackedExperts.quantised(numbers, Storing("nf4", 32))
    before = packed + 0
    part = SLICES[of](packed)
    assert type(part) is Tensor
    assert torch.equal(part, SLICES[of](before))
    part.zero_()
    assert torch.equal(packed + 0, before)


def test_reads_beside_writes(seed: int) -> None:
    """What is written to is another tensor: `out=`, in place, in lists."""
    other = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(seed))
    packed = PackedExperts.quantised(other, Storing("nf4", 32))
    dense = packed + 0
    out, sums = torch.empty_like(other), other.clone()
    torch.mul(packed, 2.0, out=out)
    torch._foreach_add_([sums], [packed])
    assert torch.equal(out, dense * 2)
    assert torch.equal(sums, other + dense)
    assert torch.equal(torch.zeros_like(other).copy_(packed), dense)


def test_modules_that_share_a_weight_share_the_stored_one(seed: int) -> None:
    made = nn.ModuleList([block(seed=seed) for _ in range(3)])
    first, second, third = (experts_of(each) for each in made)
    second.gate_up_proj, third.down_proj = first.gate_up_proj, first.down_proj
    whole = sum(p.numel() * p.itemsize for p in made.parameters())
    inputs = routed(9, seed)
    single = copy.deepcopy(made[1])
    report = dk.quantize_experts(made)
    assert second.gate_up_proj is first.gate_up_proj
    assert third.down_proj is first.down_proj
    assert len({id(p) for p in made.parameters()}) == 4
    assert (len(report.parameters), report.bytes_before) == (6, whole)
    assert report.bytes_after == sum(p.held_bytes for p in made.parameters())  # type: ignore[attr-defined]
    dk.quantize_experts(single)
    assert_close(step(made[1], inputs, False), step(single, inputs, False), 0)


@pytest.mark.parametrize("double_quant", [False, True], ids=["once", "twice"])
def test_bytes(double_quant: bool) -> None:
    """½ + 4 / blocksize a number; twice quantised ½ + (1 + 4 / 256) / blocksize, and a mean."""
    packed = PackedExperts.quantised(torch.ones(5, 128, 256), Storing("nf4", 64, 256, double_quant))
    numbers = 128 * 256
    each = numbers / 2 + (numbers / 64 * (1 + 4 / 256) + 4 if double_quant else numbers / 64 * 4)
    assert packed.held_bytes == 5 * each
