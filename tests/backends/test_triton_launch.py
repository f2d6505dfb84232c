"""The direct launch: the driver gets what Triton's own path gives it, from every kernel; and where
it must not go.

Nothing is compiled or run: benchmarks/stand_in.py takes the driver's place, and `Variant` a
compiled kernel's.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

from launches_seen import KERNELS, Seen, Variant, checked, misaligned, ready
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from benchmarks import launch_overhead
from benchmarks.stand_in import Launcher, StandIn
from benchmarks.timing import Budget
from delora_kernels import use_backend
from delora_kernels.backends.triton import forms, launch
from delora_kernels.backends.triton.add_parts import add_parts_kernel
from delora_kernels.backends.triton.scaled import scaled_kernel
from delora_kernels.backends.triton.token_sums import token_sums
from delora_kernels.testing import METHODS

if launch.knobs is None:
    pytest.skip("Triton 3.3 has its own path alone", allow_module_level=True)

SIZES = ((64, 128, 256, 16), (7, 19, 13, 3), (1, 1, 1, 1), (130, 48, 33, 36), (2100, 16, 32, 40))
DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32))


@pytest.mark.parametrize("form", [forms.UPDATE, forms.PREFILL, forms.OWN])
def test_the_driver_gets_what_tritons_path_gives_it(
    form: str, seen: Seen, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Every method, forward and backward: sizes of one, odd, aligned; misaligned inputs; the second
    time directly.
    """
    monkeypatch.setattr(forms, "DEFAULT", form)
    launched = checked(monkeypatch, seen)
    for name, method in METHODS.items():
        if form != forms.UPDATE and method.function.startswith(("ether", "grouped")):
            continue
        for i, sizes in enumerate(SIZES):
            dtype, wide = DTYPES[(i + len(name)) % len(DTYPES)]
            inputs = method.draw(*sizes, dtype=dtype, adapter_dtype=wide, seed=seed)
            with use_backend("triton"):
                for shifted in (False, True):
                    if shifted:
                        inputs |= {name: misaligned(inputs[name]) for name in ("x", "weight", "grad_out")}
                    method.fused(inputs)
                    before, count = seen.direct, len(launched)
                    method.fused(inputs)
                    assert seen.direct - before == len(launched) - count > 0
    ran = {kernel.__name__ for kernel in launched}
    if form == forms.UPDATE:
        rest = {"mask_kernel", "rank_gemm_kernel", "reflect_chunked_kernel", "reflect_sums_kernel"}
        assert set(KERNELS) - ran == rest
    assert ("rank_gemm_kernel" in ran) == (form == forms.OWN)


def test_a_variant_for_each_alignment_and_each_kind_of_integer(seen: Seen) -> None:
    """Whichever was launched first."""
    rows = torch.zeros(4, 65)
    functions = {}
    for _ in range(2):
        for at, C in ((rows[0], 16), (rows[1], 16), (rows[0], 17), (rows[0], 1), (rows[0], 2**31 + 16)):
            made = launch.record(scaled_kernel, (C, 16), BY_ROW=True, BM=16, BC=512)
            seen.pair(made, (1,), (at, rows, rows), (3,))
            functions[at.data_ptr() % 16, C] = seen.launches[0][2]
    assert len(set(functions.values())) == len(functions) == 5
    assert seen.direct == 5
    signatures = [variant.kernel.src.signature["C"] for variant in ready()]
    assert sorted(signatures) == ["constexpr", "i32", "i32", "i32", "i64"]


def test_what_changes_from_call_to_call_keeps_its_variant(seen: Seen) -> None:
    """Tokens, parts: neither 1 nor a multiple of 16 counts, but 64 bits do."""
    x, h = torch.zeros(400, 32, dtype=torch.bfloat16), torch.zeros(400, 16, dtype=torch.bfloat16)
    for T in (400, 64, 1, 37):
        token_sums(x[:T], h[:T])
    assert len(ready()) == 1
    assert seen.direct == 3
    parts = torch.zeros(8)
    for count in (3, 1, 16, 2**31, 2**31 + 5):
        seen.pair(launch.record(add_parts_kernel, AT_ONCE=1, BLOCK=1024), (1,), (parts, parts), (count, 5))
    assert len({launched[2] for launched in seen.launches}) == 1
    assert {r.kernel.src.signature["parts"] for r in ready() if "M" in r.kernel.src.signature} == {
        "i32",
        "i64",
    }


def test_each_constant_and_option_counts(seen: Seen) -> None:
    parts = torch.zeros(8)
    for _ in range(2):
        for constants in ({"BLOCK": 64}, {"BLOCK": 128}, {"BLOCK": 64, "num_warps": 8}, {"BLOCK": 64, "num_stages": 8}):
            seen.pair(launch.record(add_parts_kernel, AT_ONCE=1, **constants), (2, 3), (parts, parts), (3, 5))
    assert len(ready()) == seen.direct == 4


def test_each_block_and_dtype_of_a_descriptor_counts(seen: Seen) -> None:
    """Of what it describes they alone: sizes and strides are read at each launch."""
    matrices = torch.zeros(64, 64), torch.zeros(64, 64).half(), torch.zeros(48, 128)
    for _ in range(2):
        for matrix, block in ((0, [16, 32]), (0, [32, 16]), (1, [16, 32]), (2, [16, 32])):
            described = launch.TensorDescriptor.from_tensor(matrices[matrix], block)
            seen.pair(launch.record(add_parts_kernel, AT_ONCE=1, BLOCK=64), (1,), (described, matrices[0]), (3, 5))
    assert len(ready()) == 3
    assert seen.direct == 5


def test_current_stream_and_another_device(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is asked for at each launch; a kernel runs on the device of its tensors, which
    Triton takes to be the
    current one; each device has its own variant."""

    class Pointer:
        dtype = torch.float32

        def __init__(self, device: int) -> None:
            self.get_device = lambda: device

        def data_ptr(self) -> int:
            return 64

    entered = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, seen.stand_in.device = seen.stand_in.device, index
        entered.append(index)
        yield
        seen.stand_in.device = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(seen.stand_in, "get_current_stream", lambda index: 100 * index + seen.stand_in.stream)
    seen.stand_in.device, functions = 1, []
    for stream in (5, 6):
        seen.stand_in.stream = stream
        for index in (1, 2):
            pointers = (Pointer(index), None if index == 3 else Pointer(index))
            launch.launch(launch.record(add_parts_kernel, AT_ONCE=1, BLOCK=64), (1,), pointers, (3, 5))
            assert seen.launches[-1][1] == 100 * index + stream
            functions.append(seen.launches[-1][2])
    assert functions[:2] == functions[2:]
    assert functions[0] is not functions[1]
    assert (seen.direct, entered, seen.stand_in.device) == (2, [2, 2], 1)


def _direct(seen: Seen) -> bool:
    before = seen.direct
    seen.pair(launch.record(add_parts_kernel, AT_ONCE=1, BLOCK=64), (1,), (torch.zeros(8), torch.zeros(8)), (3, 5))
    return seen.direct > before


def test_what_wants_to_see_each_launch_does(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler's hooks get each launch, debugging and instrumentation are compiled in: all by
    Triton's path.
    """
    from triton import knobs

    called: list[Any] = []
    assert not _direct(seen)
    assert _direct(seen)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(knobs.runtime, name)
        if chain is None:  # Triton 3.4
            monkeypatch.setattr(knobs.runtime, name, called.append)
        else:
            monkeypatch.setattr(chain, "calls", [called.append])
        assert not _direct(seen)
        monkeypatch.undo() if chain is None else monkeypatch.setattr(chain, "calls", [])
        assert _direct(seen)
    for where, name, value in (
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "fpsan"),
        (knobs.runtime, "add_stages_inspection_hook", lambda: ("a", "b")),
        (add_parts_kernel, "pre_run_hooks", [lambda *a, **kw: called.append(a)]),
    ):
        if not hasattr(where, name):
            continue  # this Triton does not know it
        before = getattr(where, name)
        monkeypatch.setattr(where, name, value)
        assert not _direct(seen)
        monkeypatch.setattr(where, name, before)
        assert _direct(seen)
    assert len(called) == 2  # the hook of a kernel: `pair` launches twice


def test_nothing_compiled_under_a_hook_is_remembered(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert not _direct(seen)
    assert ready() == []


@pytest.mark.parametrize("why", ["launcher", "backend", "no kernel"])
def test_what_it_does_not_know_goes_by_tritons_path(why: str, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Launcher):
        def __call__(self, gridX: int, gridY: int, gridZ: int, function: Any, stream: int, *args: Any) -> None:
            super().__call__(gridX, gridY, gridZ, function, stream, *args)

    if why == "launcher":
        monkeypatch.setattr(Variant, "run", Other())
    elif why == "backend":
        monkeypatch.setattr(StandIn, "get_current_target", lambda self: GPUTarget("cuda", 90, 32))
        monkeypatch.setattr(launch, "CompiledKernel", CompiledKernel)
        made = Variant.__init__

        def amd(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            self.metadata.target = GPUTarget("hip", "gfx942", 64)

        monkeypatch.setattr(Variant, "__init__", amd)
    else:
        monkeypatch.setattr(launch, "CompiledKernel", type("Another", (), {}))
    assert [_direct(seen) for _ in range(3)] == [False] * 3


def test_it_forgets_before_it_grows_for_ever(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST", 3)
    parts = torch.zeros(8)
    for BLOCK in (2, 4, 8, 16, 32, 16):
        seen.pair(launch.record(add_parts_kernel, AT_ONCE=1, BLOCK=BLOCK), (1,), (parts, parts), (3, 8))
    assert len(ready()) == 2
    assert seen.direct == 1


@pytest.mark.parametrize("tokens", [(1000, 1001, 1016, 1008), (33, 34, 47, 48)])
def test_another_number_of_tokens_is_no_other_variant(tokens: tuple[int, ...], seen: Seen, seed: int) -> None:
    """No kernel is compiled anew, or launched by Triton's path, because a batch has another
    length.
    """
    for method in METHODS.values():
        for T in tokens:
            inputs = method.draw(T, 48, 64, 12, dtype=torch.bfloat16, adapter_dtype=torch.float32, seed=seed)
            with use_backend("triton"):
                method.fused(inputs)
            if T == tokens[0]:
                remembered = set(map(id, ready()))
        assert set(map(id, ready())) == remembered, method.name


def test_parameters_are_in_the_order_that_launch_wants() -> None:
    """Those that a kernel is not specialised for are the first integers: `launch` counts on it."""
    for name, kernel in KERNELS.items():
        held = sorted(kernel.arg_names.index(argument) for argument in kernel.do_not_specialize)
        first = next(i for i, argument in enumerate(kernel.arg_names) if argument.islower() or argument in "TCNKM")
        assert held == list(range(first, first + len(held))), name


def test_a_kernel_in_another_order_is_refused(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(add_parts_kernel, "do_not_specialize", ["M"])
    with pytest.raises(TypeError, match="must follow its tensors"):
        _direct(seen)


def test_the_benchmark_launches_every_kernel_both_ways(
    seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks.launch_overhead: as many launches by one way as by the other, by the way that it
    says.
    """
    monkeypatch.setattr(launch_overhead, "REPEATS", 1)
    monkeypatch.setattr(launch_overhead, "standing_in", lambda: nullcontext())
    spent: dict[str, list[int]] = {}

    class Clock:
        def __init__(self, device: str) -> None:
            assert device == "cpu"

        def round(self, passes: Any) -> dict[str, Any]:
            for way, run in passes.items():
                run()  # Triton's path, where it is new
                direct, count = seen.direct, len(seen.launches)
                run()
                spent.setdefault(way, []).append(len(seen.launches) - count)
                assert seen.direct - direct == (spent[way][-1] if way == "direct" else 0)
            return {"triton": (0.5, None), "direct": (0.125, None)}

    monkeypatch.setattr(launch_overhead, "HostClock", Clock)
    file = tmp_path / "rows.json"
    assert launch_overhead.main(["--json", str(file)], Budget(0, 1, 1, 0)) == 0
    rows = json.loads(file.read_text())
    assert all((row["triton_us"], row["direct_us"]) == (500, 125) for row in rows)
    assert spent["triton"] == spent["direct"] == [row.get("launches", 1) for row in rows]
    kernels = {row["kernel"]: row["arguments"] for row in rows if "kernel" in row}
    rest = {"rank_gemm_kernel", "reflect_chunked_kernel", "reflect_sums_kernel"}
    rest |= {"mask_kernel", "grouped_total_kernel"}
    assert set(KERNELS) - set(kernels) == rest  # of which the last needs more tokens
    assert kernels["add_parts_kernel"] == 6
    assert "| add_parts_kernel | 6 | 500.0 | 125.0 | 0.25 |" in capsys.readouterr().out
    assert all(module.launch is launch.launch for module in launch_overhead._launchers())
