"""The recorder: what it replays is what was done, on the tensors of the day; what depends on
content or on tensors from elsewhere is never replayed; nothing is kept of a tensor.
"""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from delora_kernels.backends import tape


class Pair(NamedTuple):
    """A result with a place for each of two tensors."""

    one: Tensor | None
    two: Tensor | None


def add_launch(tensors: tuple[Any, ...], factor: float) -> None:
    """Stands for a launch: out = x + factor."""
    if tape.recording and tape.launched(add_launch, bound, tensors, factor):
        return
    x, out = tensors
    torch.add(x, factor, out=out)


def bound(tensors: tuple[Any, ...], factor: float) -> Any:
    def again(stream: int, *tensors: Any) -> None:
        STREAMS.append(stream)
        torch.add(tensors[0], factor, out=tensors[1])

    return again, tensors


STREAMS: list[int] = []


@pytest.fixture(autouse=True)
def _new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "_known", {})
    STREAMS.clear()


def done(function: Callable[..., Any], *inputs: Tensor | None, key: Any = "key", stream: int | None = 7) -> Any:
    return tape.run(lambda device: stream, (function.__name__, key), inputs, lambda: function(*inputs))


def compute(x: Tensor, w: Tensor, nothing: None = None) -> dict[str, Any]:
    """Memory, views, a launch, in-place and multi-result functions; a result that is an input."""
    out = x.new_empty(x.shape)
    add_launch((x, out), 2.0)
    out.addmm_(x, w.t())
    first, second = out.unbind(1)[:2]
    unused = x.new_zeros(3)
    assert unused.shape == (3,)
    return {"pair": Pair(first.contiguous(), None), "both": (torch.cat([first, second]), x), "wide": out.to(x.dtype)}


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 4, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2))  # type: ignore[return-value]


def check(found: dict[str, Any], x: Tensor, w: Tensor) -> None:
    out = x + 2 + x @ w.T
    limit = 8 * torch.finfo(torch.float64).eps * 16
    for got, expected in (
        (found["pair"].one, out[:, 0]),
        (found["both"][0], torch.cat([out[:, 0], out[:, 1]])),
        (found["wide"], out),
    ):
        assert (got - expected).abs().max() <= limit * out.abs().max()
    assert type(found["pair"]) is Pair
    assert found["pair"].two is None
    assert found["both"][1] is x


def replays() -> int:
    return sum(isinstance(known, tuple) for known in tape._known.values())


def test_it_replays_from_the_fourth_call_on(seed: int) -> None:
    for i in range(6):
        x, w = drawn(seed + i)
        check(done(compute, x, w, None), x, w)
        assert replays() == (i >= 2)
        assert STREAMS == [7] * max(0, i - 2)


def test_nothing_is_kept_of_a_tensor(seed: int) -> None:
    """Neither inputs nor results outlive their owners, and temporaries go as they are used up."""
    refs = []
    for i in range(5):
        x, w = drawn(seed + i)
        found = done(compute, x, w, None)
        refs += [weakref.ref(each) for each in (x, w, found["wide"], found["pair"].one)]
    del x, w, found
    gc.collect()
    assert [ref for ref in refs if ref() is not None] == []
    (known,) = tape._known.values()
    assert [value for value in known[1].__globals__.values() if isinstance(value, Tensor)] == []


def test_temporaries_are_dropped_before_the_end(seed: int) -> None:
    alive: list[bool] = []

    def chain(x: Tensor) -> Tensor:
        first = x * 2
        second = first + 1
        refs.append(weakref.ref(first))
        del first
        third = second * 3
        add_launch((third, third), 0.0)
        return third

    refs: list[Any] = []
    for i in range(3):
        x, _ = drawn(seed + i)
        done(chain, x)
    real = torch.add

    class Looking(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.Tensor.mul or function is torch.mul or function is torch.Tensor.__mul__:
                made.append(weakref.ref(result))
            if function is real:
                alive.append(made[0]() is not None)
            return result

    made: list[Any] = []
    with Looking():
        y = done(chain, x)
    assert torch.equal(y, (x * 2 + 1) * 3)
    assert alive == [False]


@pytest.mark.parametrize("what", ["dtype", "shape", "strides", "key", "none"])
def test_each_fact_is_another_kind(what: str, seed: int) -> None:
    def double(x: Tensor, w: Tensor | None = None) -> Tensor:
        made = x.new_empty(x.shape)
        return torch.mul(x, 2, out=made) if w is None else torch.mul(x, w, out=made)

    x, w = drawn(seed)
    for _ in range(4):
        done(double, x, w)
    assert replays() == 1
    key: Any = "key"
    if what == "dtype":
        x, w = x.float(), w.float()
    elif what == "shape":
        x, w = x[:2], w[:2]
    elif what == "strides":
        x = x.t()
    elif what == "key":
        key = "another"
    y = done(double, x, None if what == "none" else w, key=key)
    assert torch.equal(y, x * 2 if what == "none" else x * w)
    assert y.stride() == (4, 1)
    assert (len(tape._known), replays()) == (2, 1)


def by_item(x: Tensor, w: Tensor) -> Tensor:
    return x * 2 if x.sum().item() > 0 else x * 3


def by_truth(x: Tensor, w: Tensor) -> Tensor:
    return x * 2 if bool(x.sum() > 0) else x * 3


def by_address(x: Tensor, w: Tensor) -> Tensor:
    return x * 2 if x.data_ptr() % 16 == 0 else x * 3


ELSEWHERE = torch.ones(4, 4, dtype=torch.float64)


def with_a_stranger(x: Tensor, w: Tensor) -> Tensor:
    return x + ELSEWHERE


def that_returns_a_stranger(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2, ELSEWHERE


@pytest.mark.parametrize("function", [by_item, by_truth, by_address, with_a_stranger, that_returns_a_stranger])
def test_what_depends_on_more_is_never_replayed(function: Callable[..., Any], seed: int) -> None:
    for i in range(6):
        x, w = drawn(seed + i)
        found = done(function, x, w)
        found = found[0] if isinstance(found, tuple) else found
        expected = function(x, w)
        assert torch.equal(found, expected[0] if isinstance(expected, tuple) else expected)
    assert list(tape._known.values()) == [-1]


def test_two_inputs_that_are_one_tensor_are_no_kind_of_their_own(seed: int) -> None:
    x, _ = drawn(seed)
    for _ in range(4):
        done(compute, x, x, None)
    assert replays() == 0
    x, w = drawn(seed + 1)
    check(done(compute, x, w, None), x, w)


def test_where_launches_are_not_as_usual_the_function_runs(seed: int) -> None:
    x, w = drawn(seed)
    for _ in range(4):
        done(compute, x, w, None)
    assert STREAMS == [7]
    check(done(compute, x, w, None, stream=None), x, w)
    assert STREAMS == [7]
    done(compute, x, w, None, stream=0)
    assert STREAMS == [7, 0]


def test_it_forgets_before_it_grows_for_ever(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "MOST", 3)
    x, w = drawn(seed)
    for key in range(20):
        done(compute, x, w, None, key=key)
        assert len(tape._known) <= 3


def test_an_error_is_raised_and_nothing_recorded(seed: int) -> None:
    def fails(x: Tensor, w: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    x, w = drawn(seed)
    for _ in range(4):
        with pytest.raises(RuntimeError, match="no memory"):
            done(fails, x, w)
    assert (replays(), tape.recording, getattr(tape._recorder, "active", None)) == (0, 0, None)


def test_threads_record_and_replay_side_by_side(seed: int) -> None:
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for i in range(60):
                x, w = drawn(seed + 100 * thread + i)
                check(done(compute, x, w, None, key=i % 7), x, w)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert tape.recording == 0
