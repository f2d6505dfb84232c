"""A replayed pass launches what the call launches, with the pointers of the day; and where it must
not be replayed. Nothing is compiled or run (launches_seen.py).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)


from launches_seen import Seen, misaligned, ready

from benchmarks import tune_tiles
from delora_kernels import use_backend
from delora_kernels.backends import tape
from delora_kernels.backends.eager import grouped_library
from delora_kernels.backends.triton import launch
from delora_kernels.backends.triton.add_parts import add_parts_kernel
from delora_kernels.backends.triton.token_sums import token_sums
from delora_kernels.dtypes import allow_tf32
from delora_kernels.testing import METHODS

if launch.knobs is None:
    pytest.skip("Triton 3.3 has its own path alone", allow_module_level=True)


def replaying(method: str, seed: int, seen: Seen, **options: Any) -> tuple[dict[str, Any], Any]:
    """The inputs of a method, and its forward and backward pass, recorded by now."""
    inputs = METHODS[method].draw(
        *(64, 128, 256, 16), dtype=torch.bfloat16, adapter_dtype=torch.float32, seed=seed, **options
    )

    def run(inputs: dict[str, Any] = inputs) -> list[Any]:
        seen.launches.clear()
        with use_backend("triton"):
            METHODS[method].fused(inputs)
        return list(seen.launches)

    for _ in range(3):
        run()
    return inputs, run


def without_temporaries(launches: list[Any], inputs: dict[str, Any]) -> list[Any]:
    """The launches, with the name of an input for its pointer, "memory" for any other pointer."""
    names = {value.data_ptr(): name for name, value in inputs.items() if isinstance(value, Tensor) and value.numel()}

    def named(value: Any) -> Any:
        return names.get(value, "memory" if value > 1 << 32 else value) if type(value) is int else value

    return [(*launched[:4], [named(value) for value in launched[4]]) for launched in launches]


@pytest.mark.parametrize("method", METHODS)
def test_a_replay_launches_what_the_call_launches(
    method: str, seen: Seen, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the pointers of the day: of tensors that it has not seen before. Experts' GEMM is the
    library's, as on a GPU: nothing reads where their rows end.
    """
    monkeypatch.setattr(grouped_library, "takes", grouped_library.fits)
    inputs, run = replaying(method, seed, seen)
    assert [type(known) for known in tape._known.values()] == [tuple, tuple]
    fresh = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    before = seen.direct
    replayed = without_temporaries(run(fresh), fresh)
    assert seen.direct - before == len(replayed) > 0
    tape.enabled, enabled = False, tape.enabled
    try:
        assert without_temporaries(run(fresh), fresh) == replayed
    finally:
        tape.enabled = enabled


def test_a_replay_heeds_the_stream_the_device_and_alignment(
    seen: Seen, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, run = replaying("lora", seed, seen)
    seen.stand_in.stream = 11
    usual = run()
    assert {stream for _, stream, *_ in usual} == {11}
    seen.stand_in.device = 3  # another device is current: the tensors' own is entered for each launch
    entered: list[int] = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, seen.stand_in.device = seen.stand_in.device, index
        entered.append(index)
        yield
        seen.stand_in.device = before

    monkeypatch.setattr(torch.cuda, "device", device)
    assert [launched[2] for launched in run()] == [launched[2] for launched in usual]
    assert entered == [-1] * len(usual)
    seen.stand_in.device = -1
    shifted = run(inputs | {"x": misaligned(inputs["x"])})
    again = run(inputs | {"x": misaligned(inputs["x"])})
    differ = [ours[2] is not theirs[2] for ours, theirs in zip(shifted, usual, strict=True)]
    reads_x = [any("x" == value for value in launched[4]) for launched in without_temporaries(usual, inputs)]
    assert differ == reads_x
    assert any(reads_x)
    assert [launched[2] for launched in again] == [launched[2] for launched in shifted]
    assert [launched[2] for launched in run()] == [launched[2] for launched in usual]


def test_a_replay_is_seen_by_whoever_hooks_launches(seen: Seen, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    _, run = replaying("lora", seed, seen)
    count = len(run())
    before = seen.direct
    run()
    assert seen.direct - before == count
    chain = knobs.runtime.launch_enter_hook
    if chain is None:  # Triton 3.4
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda *_: None)
    else:
        monkeypatch.setattr(chain, "calls", [lambda *_: None])
    before = seen.direct
    assert len(run()) == count
    assert seen.direct == before
    monkeypatch.undo() if chain is None else monkeypatch.setattr(chain, "calls", [])
    called: list[Any] = []
    monkeypatch.setattr(add_parts_kernel, "pre_run_hooks", [lambda *a, **kw: called.append(a)])
    run()
    assert called


@pytest.mark.parametrize("what", ["dtype", "scale", "frozen A", "tf32", "bias"])
def test_what_decides_a_call_is_another_kind(what: str, seen: Seen, seed: int, request: pytest.FixtureRequest) -> None:
    inputs, run = replaying("lora", seed, seen)
    recorded = dict(tape._known)
    if what == "dtype":
        inputs = {n: v.half() if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else v for n, v in inputs.items()}
    elif what == "scale":
        inputs = inputs | {"scale": 0.25}
    elif what == "tf32":
        request.addfinalizer(partial(setattr, torch.backends.cuda.matmul, "allow_tf32", allow_tf32()))
        torch.backends.cuda.matmul.allow_tf32 = True
    elif what == "bias":
        inputs = inputs | {"bias": None}
    if what == "frozen A":
        with use_backend("triton"):
            (METHODS["lora"].forward(inputs | {"B": inputs["B"].requires_grad_()})).sum().backward()
    else:
        run(inputs)
    assert all(tape._known[key] is known for key, known in recorded.items())
    assert sorted(value for value in tape._known.values() if isinstance(value, int)) == [1, 1]


def test_tiles_that_are_tuned_are_planned_with(seen: Seen) -> None:
    x, h = torch.zeros(400, 32, dtype=torch.bfloat16), torch.zeros(400, 16, dtype=torch.bfloat16)

    def tokens() -> int:
        seen.launches.clear()
        token_sums(x, h)
        (record,) = [record for record in launch._records.values() if record.variants]
        return int(record.constants["BT"])

    shipped = tokens()
    with tune_tiles._using((9, 0), "token_sums", "16", (32, 32, 4, 2)):
        assert tokens() == 32 != shipped
    assert tokens() == shipped


def test_plans_can_be_switched_off(seen: Seen, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "enabled", False)
    replaying("lora", seed, seen)
    assert tape._known == {}


def test_two_hundred_lengths_plan_and_compile_nothing_new(seen: Seen, seed: int) -> None:
    """Lengths that were never seen launch what is compiled already; of those that come again, every
    call is a planned one.
    """
    inputs = METHODS["lora"].draw(*(600, 128, 256, 16), dtype=torch.bfloat16, adapter_dtype=torch.float32, seed=seed)
    lengths = (torch.randperm(600, generator=torch.Generator().manual_seed(seed))[:200] + 1).tolist()

    def epoch(lengths: list[int]) -> None:
        for tokens in lengths:
            with use_backend("triton"):
                METHODS["lora"].fused({n: v[:tokens] if n in ("x", "grad_out") else v for n, v in inputs.items()})

    epoch([1, 7, 200, 600])
    compiled = len(ready())
    epoch(lengths)
    again = lengths[:30]
    for _ in range(3):
        epoch(again)
    assert len(ready()) == compiled > 0
    known, calls = dict(tape._known), dict(tape.calls)
    assert sum(type(each) is tuple for each in known.values()) == 2 * len(again)
    assert len(set(map(id, calls.values()))) == len(again)
    epoch(again)
    assert (known, calls) == (tape._known, tape.calls)
