"""Bad arguments: one clear error before anything is computed, naming the argument, what came and
what to do.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from delora_kernels import backends, dispatch, explain, functional, use_backend
from delora_kernels.functional import plain_torch

T, K, N, R = 5, 8, 6, 3


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def arguments(function: str) -> dict[str, Any]:
    """A good call."""
    made: dict[str, Any] = {"x": t(T, K), "weight": t(N, K), "A": t(R, K), "B": t(N, R)}
    if function == "dora_linear":
        made["magnitude"] = t(N)
    if function == "delora_linear":
        made |= {"lam": t(1), "weight_norm": t(K)}
    if function == "moe_lora_linear":
        made |= {"A": t(2, R, K), "B": t(2, N, R), "router": t(2, K)}
    if function.startswith("ether"):
        made = {"x": made["x"], "weight": made["weight"], "u": t(2, K // 2)}
    if function == "ether_plus_linear":
        made["v"] = t(2, K // 2)
    if function.startswith("grouped"):
        made |= {"weight": t(2, N, K), "A": t(2, R, K), "B": t(2, N, R), "offsets": torch.tensor([1, T])}
    if function == "grouped_dora_linear":
        made["magnitude"] = t(2, N)
    if function == "grouped_delora_linear":
        made |= {"lam": t(2), "weight_norm": t(2, K)}
    return made


NAN = float("nan")
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("lora_linear", {"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    (
        "lora_linear",
        {"x": t(T, K).long()},
        TypeError,
        "x must be one of float16, bfloat16, float32, float64, got torch",
    ),
    ("lora_linear", {"x": t(T, K + 1)}, ValueError, f"x must be [..., K] with K = {K}, weight's columns, got shape"),
    ("lora_linear", {"x": t()}, ValueError, "x must be [..., K]"),
    (
        "lora_linear",
        {"x": t(T, K).bfloat16()},
        TypeError,
        "x must be torch.float32, weight's dtype, got torch.bfloat16",
    ),
    ("lora_linear", {"x": t(T, K).to_sparse()}, TypeError, "x must be dense (torch.strided), got torch.sparse_coo"),
    ("lora_linear", {"x": t(T, K).to("meta")}, ValueError, "x must be a tensor with data, got a meta tensor"),
    ("lora_linear", {"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ("lora_linear", {"weight": t(K)}, ValueError, f"weight must be 2-D [N, K], got shape [{K}]"),
    ("lora_linear", {"weight": t(N, K).to("meta")}, ValueError, "weight must be a tensor with data, got a meta tensor"),
    (
        "lora_linear",
        {"weight": t(N, K).to(torch.uint8)},
        TypeError,
        "got torch.uint8; convert it, or dequantise it first",
    ),
    ("lora_linear", {"weight": t(K, N)}, ValueError, "weight is [N, K] as in nn.Linear"),
    ("lora_linear", {"bias": t(K)}, ValueError, f"bias must be [N] = [{N}], got [{K}]"),
    ("lora_linear", {"bias": 0.0}, TypeError, "bias must be a torch.Tensor, got float"),
    ("lora_linear", {"A": t(K, R)}, ValueError, f"A must be [r, K] = [{K}, {K}], got [{K}, {R}]"),
    ("lora_linear", {"A": t(K)}, ValueError, "A must be 2-D [r, K]"),
    (
        "lora_linear",
        {"A": t(0, K), "B": t(N, 0)},
        ValueError,
        "A must be [r, K] with r ≥ 1, got [0, 8]; use the frozen",
    ),
    ("lora_linear", {"A": t(R, K).to("meta")}, ValueError, "A must be a tensor with data"),
    ("lora_linear", {"A": t(R, K).to(torch.complex64)}, TypeError, "A must be one of float16"),
    (
        "lora_linear",
        {"B": t(R, N)},
        ValueError,
        f"B must be [N, r] = [{N}, {R}], got [{R}, {N}]; r is A's number of rows",
    ),
    ("lora_linear", {"B": t(N, R + 1)}, ValueError, "B must be [N, r]"),
    ("lora_linear", {"scale": "2"}, TypeError, "scale must be a number, got str; pass a float"),
    ("lora_linear", {"scale": t()}, TypeError, "scale must be a number, got Tensor"),
    ("lora_linear", {"scale": True}, TypeError, "scale must be a number, got bool"),
    ("lora_linear", {"scale": NAN}, ValueError, "scale must be finite, got nan"),
    ("lora_linear", {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ("lora_linear", {"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ("lora_linear", {"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
    ("lora_linear", {"dropout_p": NAN}, ValueError, "dropout_p must be in [0, 1), got nan"),
    ("lora_linear", {"dropout_p": None}, TypeError, "dropout_p must be a number, got NoneType"),
    ("lora_linear", {"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
    ("lora_linear", {"dropout_p": 0.1, "seed": True}, TypeError, "seed must be an int or a 0-d int64 tensor, got bool"),
    ("lora_linear", {"dropout_p": 0.1, "seed": 1 << 64}, ValueError, "seed must be a 64-bit signed integer"),
    ("lora_linear", {"dropout_p": 0.1, "seed": t(1).long()}, TypeError, "got torch.int64 of shape [1]"),
    ("lora_linear", {"dropout_p": 0.1, "seed": t()}, TypeError, "got torch.float32 of shape []"),
    ("dora_linear", {"magnitude": t(K)}, ValueError, f"magnitude must be [N] = [{N}], got [{K}]"),
    ("dora_linear", {"magnitude": t(N, 1)}, ValueError, "pass one value for each row of weight"),
    ("dora_linear", {"magnitude": 1.0}, TypeError, "magnitude must be a torch.Tensor, got float"),
    ("dora_linear", {"dropout": "all"}, ValueError, "dropout must be one of ('peft', 'branch'), got 'all'"),
    ("dora_linear", {"saved": "y"}, ValueError, "saved must be one of ('private', 'output'), got 'y'"),
    (
        "dora_linear",
        {"saved": "output", "bias": t(N)},
        ValueError,
        "saved must be 'private' here, got 'output' with a bias",
    ),
    ("dora_linear", {"saved": "output", "dropout_p": 0.1}, ValueError, "got 'output' with dropout='peft'"),
    ("delora_linear", {"lam": t(2)}, ValueError, "lam must be a number, 0-d or [1], got shape [2]"),
    ("delora_linear", {"lam": None}, TypeError, "lam must be a number, got NoneType"),
    ("delora_linear", {"lam": NAN}, ValueError, "lam must be finite, got nan"),
    (
        "delora_linear",
        {"weight_norm": t(N)},
        ValueError,
        f"weight_norm must be [K] = [{K}], got [{N}]; pass ‖W‖ of each",
    ),
    (
        "delora_linear",
        {"weight_norm": t(K).requires_grad_()},
        ValueError,
        "weight_norm must be a constant, got a tensor",
    ),
    ("delora_linear", {"weight_norm": "auto"}, TypeError, "weight_norm must be a number, got str"),
    ("delora_linear", {"eps": -1e-4}, ValueError, "eps must be ≥ 0, got -0.0001; 0 means no clamp"),
    (
        "delora_linear",
        {"frozen_A": t(R, K)},
        ValueError,
        "frozen_B must be a tensor, got None; a frozen start needs both",
    ),
    ("delora_linear", {"frozen_B": t(N, R)}, ValueError, "frozen_A must be a tensor, got None"),
    ("delora_linear", {"frozen_A": t(R, N), "frozen_B": t(N, R)}, ValueError, "frozen_A must be [r, K]"),
    ("delora_linear", {"frozen_A": t(R, K), "frozen_B": t(N, 2)}, ValueError, "r is frozen_A's number of rows"),
    ("delora_linear", {"frozen_lam": 2.0}, ValueError, "frozen_lam must be None, got a value; it scales frozen_A"),
    (
        "delora_linear",
        {"frozen_A": t(R, K).requires_grad_(), "frozen_B": t(N, R)},
        ValueError,
        "frozen_A must be a constant, got a tensor that requires grad; pass .detach()",
    ),
    ("ether_linear", {"x": t(T, K + 1)}, ValueError, f"x must be [..., K] with K = {K}, weight's columns, got shape"),
    ("ether_linear", {"u": None}, ValueError, "u must be a tensor where u_out is None, got None; pass the vectors"),
    ("ether_linear", {"u": t(K)}, ValueError, f"u must be 2-D [blocks, K / blocks], got shape [{K}]"),
    (
        "ether_linear",
        {"u": t(3, 2)},
        ValueError,
        f"u must be [blocks, K / blocks] with K = {K}, weight's columns, got [3, 2]",
    ),
    ("ether_linear", {"u": t(2, 4).long()}, TypeError, "u must be one of float16"),
    ("ether_linear", {"u": t(2, 4).to("meta")}, ValueError, "u must be a tensor with data"),
    ("ether_linear", {"u_out": t(2, 4)}, ValueError, f"u_out must be [blocks, N / blocks] with N = {N}, weight's rows"),
    ("ether_linear", {"blocks": "rows"}, ValueError, "blocks must be one of ('paper', 'official'), got 'rows'"),
    ("ether_plus_linear", {"v": None}, ValueError, "v must be a tensor, got None; pass both u and v"),
    ("ether_plus_linear", {"u": None}, ValueError, "u must be a tensor, got None; pass both u and v"),
    (
        "ether_plus_linear",
        {"v": t(4, 2)},
        ValueError,
        "v must be [blocks, K / blocks] = [2, 4], got [4, 2]; u and v have",
    ),
    (
        "ether_plus_linear",
        {"u_out": t(2, 3)},
        ValueError,
        "v_out must be a tensor, got None; pass both u_out and v_out",
    ),
    ("grouped_lora_linear", {"offsets": [1, 2]}, TypeError, "offsets must be an int32 or int64 tensor, got list"),
    ("grouped_lora_linear", {"weight": t(N, K)}, ValueError, "weight must be 3-D [E, N, K], got shape"),
    ("grouped_dora_linear", {"magnitude": t(N)}, ValueError, "magnitude must be [E, N] = [2, "),
    ("grouped_delora_linear", {"lam": 2.0}, TypeError, "lam must be a torch.Tensor, got float"),
    ("grouped_delora_linear", {"weight_norm": t(2, N)}, ValueError, "weight_norm must be [E, K] or [E]"),
]


@pytest.mark.parametrize(("function", "bad", "kind", "text"), CASES, ids=[f"{c[0]}-{c[3][:40]}" for c in CASES])
def test_bad_argument(
    function: str, bad: dict[str, Any], kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: Any) -> None:
        raise AssertionError("the call went on")

    monkeypatch.setattr("delora_kernels.autograd.function.run", computed)
    before = torch.get_rng_state()
    with pytest.raises(kind) as caught:
        getattr(functional, function)(**arguments(function) | bad)
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"{function}: ")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", [CASES[i] for i in (2, 19, 27, 35, 45)], ids=str)
def test_same_text_compiled(case: tuple[str, dict[str, Any], type[Exception], str]) -> None:
    function, bad, kind, _ = case
    call = getattr(functional, function)
    with pytest.raises(kind) as eager:
        call(**arguments(function) | bad)
    torch._dynamo.reset()
    with pytest.raises(kind) as compiled:
        torch.compile(call, backend="eager")(**arguments(function) | bad)
    assert str(compiled.value) == str(eager.value)


def test_device_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked through a stand-in device: the text is what a CUDA x and a CPU adapter give."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 1)

    A = t(R, K).as_subclass(Elsewhere)
    with pytest.raises(ValueError, match="A must be on x's device cpu, got cuda:1; move it to cpu"):
        functional.lora_linear(t(T, K), t(N, K), A, t(N, R))


@pytest.mark.parametrize("function", functional.CALLS)
def test_good_calls_pass(function: str) -> None:
    """The table is about what it changes: unchanged, each call is fine."""
    found = getattr(functional, function)(**arguments(function))
    assert (found if isinstance(found, Tensor) else found[0]).shape == (T, N)


def test_every_function_has_bad_calls() -> None:
    theirs = {function for function, *_ in CASES} | {"moe_lora_linear"}  # whose are in test_moe.py
    missing = sorted(functional.CALLS.keys() - theirs)
    assert missing == [], f"CASES lacks {missing}"


def test_a_method_without_a_formula_in_plain_torch_is_refused() -> None:
    call = functional.call_of("lora_linear", **arguments("lora_linear"))
    call = call._replace(options=call.options._replace(method="new_linear"))
    with pytest.raises(NotImplementedError, match="new_linear: .* can't be exported yet.* list one in FORMULAS there"):
        plain_torch.run(call, (T, K))


def test_use_backend() -> None:
    with (
        pytest.raises(ValueError, match="name must be one of 'triton', 'cuda', 'eager', got 'cpu'"),
        use_backend("cpu"),
    ):
        pass
    reasons = {name: backends.unavailable(name) for name in ("triton", "cuda")}
    for name, reason in reasons.items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=re.escape(reason)), use_backend(name):
                pass
    assert reasons["cuda"] is not None
    with pytest.raises(ValueError, match="name must be one of"):
        use_backend("nope")  # at once, not only where the block begins
    with use_backend("eager"):
        assert dispatch.requested() == "eager"
    assert dispatch.requested() is None


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_requested", "nonsense")
    with pytest.raises(ValueError, match="DELORA_KERNELS_BACKEND must be one of"):
        functional.lora_linear(**arguments("lora_linear"))
    monkeypatch.setattr(dispatch, "_requested", "cuda")
    monkeypatch.setitem(backends._unavailable, "cuda", "no card")
    with pytest.raises(RuntimeError, match="'cuda' was requested but can't take this call: no card"):
        functional.lora_linear(**arguments("lora_linear"))


def test_explain() -> None:
    found = explain(functional.lora_linear, **arguments("lora_linear"))
    assert (found.backend, found.compute_dtype, found.rank_dtype) == ("eager", torch.float32, torch.float32)
    assert found.reasons == {name: backends.unavailable(name) for name in ("triton", "cuda")}
    assert str(found).splitlines()[0] == (
        "lora_linear runs on the eager backend (GEMMs in float32, low-rank branch in float32)"
    )
    mixed = {"x": t(T, K).bfloat16(), "weight": t(N, K).bfloat16()}
    assert explain("lora_linear", **arguments("lora_linear") | mixed).rank_dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert explain("dora_linear", **arguments("dora_linear")).compute_dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match="function must be one of lora_linear, dora_linear, delora_linear, moe_.*got 'relu'"
    ):
        explain(torch.relu, t(1))
    with pytest.raises(ValueError, match="B must be"):
        explain("lora_linear", t(T, K), t(N, K), t(R, K), t(R, N))


@pytest.mark.parametrize("function", list(functional.CALLS))
def test_explain_takes_every_function_and_draws_no_seed(function: str) -> None:
    """A call with dropout would draw one; explaining it leaves torch's generator as it was."""
    state = torch.get_rng_state()
    dropout = {} if function.startswith("ether") else {"dropout_p": 0.5}
    found = explain(function, **arguments(function), **dropout)
    assert found.backend == "eager"
    assert ("reflections in" in str(found)) == function.startswith("ether")
    assert torch.equal(torch.get_rng_state(), state)
