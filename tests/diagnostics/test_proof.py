"""An automatic choice takes a backend's kernels where they are right, with stand-ins for those that
can't run here.
"""

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import stand_in_backends
import torch
from stand_in_backends import Op, wrong
from torch import Tensor

from delora_kernels import dispatch, explain
from delora_kernels import functional as F
from delora_kernels.backends import eager
from delora_kernels.diagnostics import proof

BF16, WIDE = torch.bfloat16, torch.float32


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every backend runs on a CPU with eager's ops, until a test changes one; none is proved
    yet.
    """
    call: Any = SimpleNamespace(x=torch.ones(1))
    assert "on a CPU its kernels are for tests" in str(dispatch.reason_unasked("triton", call))
    assert dispatch.reason_unasked("eager", call) is None
    return stand_in_backends.put_in_place(monkeypatch)


def arguments(rank: int = 2, dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    return {
        "x": torch.ones(5, 3, dtype=dtype),
        "weight": torch.ones(4, 3, dtype=dtype),
        "A": torch.ones(rank, 3, requires_grad=True),
        "B": torch.ones(4, rank, requires_grad=True),
    }


def test_right_kernels_are_proved_once_for_each_case(
    stand_ins: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, proof.__name__)
    for _ in range(2):
        assert explain("lora_linear", **arguments()).backend == "triton"
    assert explain("lora_linear", **arguments(16)).backend == "triton"  # of the same class
    assert list(proof._verdicts) == [("triton", "lora_linear", False, False, BF16, WIDE, False, 16, "cpu")]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "the triton kernels of lora_linear in bfloat16 and float32 on cpu" in caplog.records[0].getMessage()
    explain("lora_linear", **arguments(17))
    explain("lora_linear", **arguments(500), bias=torch.ones(4, dtype=BF16))
    explain("lora_linear", **arguments(), dropout_p=0.5, seed=1)
    explain("lora_linear", **arguments(dtype=WIDE))
    monkeypatch.setattr(proof, "allow_tf32", lambda: True)
    explain("lora_linear", **arguments())
    explain("lora_linear", **arguments(dtype=WIDE))
    with torch.autocast("cpu", BF16):
        explain("delora_linear", **arguments(dtype=WIDE), lam=torch.ones(()), weight_norm=torch.ones(3))
    mixture = {"A": torch.ones(5, 9, 3), "B": torch.ones(5, 4, 9), "router": torch.ones(5, 3)}
    explain("moe_lora_linear", **arguments(dtype=WIDE) | mixture)
    assert [tuple(case)[1:8] for case in proof._verdicts][1:] == [
        ("lora_linear", False, False, BF16, WIDE, False, 32),
        ("lora_linear", False, True, BF16, WIDE, False, 128),
        ("lora_linear", True, False, BF16, WIDE, False, 16),
        ("lora_linear", False, False, WIDE, WIDE, False, 16),
        ("lora_linear", False, False, WIDE, WIDE, True, 16),
        ("delora_linear", False, False, BF16, BF16, False, 16),
        ("moe_lora_linear", False, False, WIDE, WIDE, True, 64),
    ]
    assert set(proof._verdicts.values()) == {None}


def failing(*given: Any) -> Any:
    raise RuntimeError("no kernel image is available\n for execution")


@pytest.mark.parametrize(
    ("op", "replacement", "words"),
    [
        ("expand", wrong(eager.expand, 0, 1.1), "y of lora: error"),
        ("expand_backward", wrong(eager.expand_backward, 1, 1.1), "dB of lora: error"),
        ("input_backward", wrong(eager.input_backward, 1, float("nan")), "dA of lora: NaN or Inf"),
        ("project", failing, "RuntimeError: no kernel image is available for execution"),
    ],
)
def test_wrong_kernels_are_left_alone(
    op: str, replacement: Op, words: str, stand_ins: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The next backend takes the calls, a warning says it once, and `explain` why; on request they
    run.
    """
    setattr(stand_ins["triton"], op, replacement)
    for _ in range(2):
        found = explain("lora_linear", **arguments())
        assert found.backend == "cuda"
        assert words in found.reasons["triton"]
        assert "its kernels failed on cpu" in found.reasons["triton"]
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert words in warning.getMessage()
    assert "Please report it" in warning.getMessage()
    setattr(stand_ins["cuda"], op, replacement)
    proof._verdicts.clear()
    assert explain("lora_linear", **arguments()).backend == "eager"
    F.lora_linear(**arguments()).sum().backward()
    with dispatch.use_backend("triton"):
        assert explain("lora_linear", **arguments()).backend == "triton"


def test_the_caller_shows_in_no_verdict_and_a_verdict_not_in_the_caller(stand_ins: dict[str, Any]) -> None:
    """The proof has its own autocast, inference mode, saved-tensor hooks and default device; no
    random number goes.
    """
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    given, before = arguments(), torch.get_rng_state()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.device("meta"),
        torch.autocast("cpu", torch.float16),
        torch.inference_mode(),
    ):
        assert explain("lora_linear", **given).backend == "triton"
    assert proof._verdicts == {
        proof.Case("triton", "lora_linear", False, False, torch.float16, torch.float16, False, 16, "cpu"): None
    }
    assert packed == []
    assert torch.equal(torch.get_rng_state(), before)


def test_inside_a_checkpoint(stand_ins: dict[str, Any]) -> None:
    """The first call stands in a checkpointed region, whose recomputation must save the same
    tensors again.
    """
    from torch.utils.checkpoint import checkpoint

    given = arguments(dtype=WIDE)
    checkpoint(
        lambda x: F.lora_linear(**given | {"x": x}), given["x"].requires_grad_(), use_reentrant=False
    ).sum().backward()
    assert list(proof._verdicts.values()) == [None]
    assert given["A"].grad is not None


def test_under_compile(stand_ins: dict[str, Any]) -> None:
    """The verdict is found while torch.compile traces, in one graph."""
    torch._dynamo.reset()
    given = arguments(dtype=WIDE)
    compiled = torch.compile(lambda x: F.lora_linear(**given | {"x": x}), fullgraph=True, backend="aot_eager")
    expected = given["x"] @ given["weight"].t() + given["x"] @ given["A"].t() @ given["B"].t()
    assert torch.allclose(compiled(given["x"]), expected)
    assert list(proof._verdicts.values()) == [None]


GPU_CASE = ("triton", "lora_linear", False, False, BF16, WIDE, 16, "cuda:0")
LATER = "its kernels are not proved yet: "


def test_a_graph_that_is_captured_holds_no_proof(stand_ins: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert proof._verdict(*GPU_CASE) == LATER + "a CUDA graph is being captured"
    assert proof._verdicts == {}


def test_a_backward_pass_waits_for_no_proof(stand_ins: dict[str, Any]) -> None:
    """Its thread on a GPU would wait for the proof, whose backward pass waits for that thread."""
    given, found = arguments(dtype=WIDE), []
    y = given["A"].sum()
    y.register_hook(lambda grad: found.append(explain("lora_linear", **given)))
    y.backward()
    assert found[0].backend == "eager"
    assert found[0].reasons["triton"] == LATER + "this is a backward pass"
    assert proof._verdicts == {}
    assert explain("lora_linear", **given).backend == "triton"


def test_what_passes_is_no_verdict(stand_ins: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread while the interpreter ends: the next call asks again."""

    def ending(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", ending)
        assert "at interpreter shutdown" in str(proof._verdict(*GPU_CASE[:-1], "cpu"))
    assert explain("lora_linear", **arguments()).backend == "triton"


def test_without_memory_calls_keep_to_one_backend(stand_ins: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A layer's forward pass found no memory, another layer's would: the first one's recomputation
    must run as its forward did, so only warmup() asks again.
    """

    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stand_ins["triton"].project = full
    found = explain("lora_linear", **arguments())
    assert found.backend == "cuda"
    assert found.reasons["triton"] == LATER + "OutOfMemoryError: CUDA out of memory"
    stand_ins["triton"].project = eager.project
    assert explain("lora_linear", **arguments()).backend == "cuda"
    (warning,) = caplog.records
    assert warning.getMessage().endswith("CUDA out of memory. warmup(model) asks again.")
    proof.ask_again()
    assert explain("lora_linear", **arguments()).backend == "triton"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reason", ["its kernels failed on rank 1: y is off", LATER + "rank 1: no memory"])
def test_what_runs_again_runs_as_it_ran(reason: str, reentrant: bool, stand_ins: dict[str, Any]) -> None:
    """A proof fails between a forward pass and its backward pass: recomputation and backward are
    the forward's, and the next call another backend's.
    """
    from torch.utils.checkpoint import checkpoint

    ran: list[str] = []
    for name in ("triton", "eager"):
        for op in ("expand", "expand_backward"):
            original = getattr(eager, op)

            def counted(*given: Any, name: str = name, op: str = op, original: Op = original) -> Any:
                ran.append(f"{name} {op}")
                return original(*given)

            setattr(stand_ins[name], op, counted)
    stand_ins["cuda"].supports = lambda call: "not now"
    given = arguments(dtype=WIDE)
    explain("lora_linear", **given)
    ran.clear()
    tokens = given["x"].requires_grad_()
    y = checkpoint(lambda x: F.lora_linear(**given | {"x": x}), tokens, use_reentrant=reentrant)
    (case,) = proof._verdicts
    proof._change(case, reason)
    y.sum().backward()
    assert ran == ["triton expand", "triton expand", "triton expand_backward"]
    F.lora_linear(**given).sum().backward()
    assert ran[3:] == ["eager expand", "eager expand_backward"]
    assert proof._before == {}


def test_every_function_can_be_proved(stand_ins: dict[str, Any]) -> None:
    from delora_kernels.functional import CALLS

    for function in CALLS:
        for drops in (False, True):
            assert proof.prove(proof.Case("cuda", function, drops, True, BF16, WIDE, False, 16, "cpu")) == (
                "nothing to prove them with" if drops and function.startswith("ether") else None
            )


def test_other_threads_see_nothing_of_a_proof(stand_ins: dict[str, Any]) -> None:
    """While one thread proves a case, another's calls take what they take anyway."""
    proving, done, seen = threading.Event(), threading.Event(), []

    def slow(*given: Any) -> Any:
        proving.set()
        assert done.wait(60)
        return eager.project(*given)

    stand_ins["triton"].project = slow
    stand_ins["triton"].supports = lambda call: "not this one" if call.options.method == "dora_linear" else None
    thread = threading.Thread(target=lambda: seen.append(explain("lora_linear", **arguments()).backend))
    thread.start()
    assert proving.wait(60)
    with dispatch.use_backend("eager"):
        F.dora_linear(**arguments(), magnitude=torch.ones(4)).sum().backward()
        assert dispatch.requested() == "eager"
    assert dispatch.requested() is None
    done.set()
    thread.join()
    assert seen == ["triton"]
