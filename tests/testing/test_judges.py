"""The judges judged: errors, limits, poison, input makers and oracles must notice what they are
for.
"""

import contextlib
import inspect
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from delora_kernels import functional, ops, reference
from delora_kernels.backends import eager, load
from delora_kernels.testing import (
    METHODS,
    OPS,
    Problem,
    failures,
    gradcheck,
    measure,
    measure_dropout_mask,
    op_problems,
    relative_error,
    uninitialised_is_nan,
)
from delora_kernels.testing.methods.eager_forms import eager as eager_form
from delora_kernels.testing.methods.lora import ALPHA
from delora_kernels.testing.ops import formulas as naive

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf


def test_relative_error() -> None:
    expected = torch.tensor([[1.0, -4.0], [2.0, 0.5]])
    assert relative_error(expected, expected) == 0
    assert relative_error(expected + torch.tensor([[0, 0], [0, 0.25]]), expected) == 0.25 / 4
    assert relative_error(-expected, expected) == 2
    assert relative_error(expected.bfloat16(), expected.double()) == 0
    assert relative_error(torch.tensor([0.0, 3e-7]), torch.zeros(2)) == pytest.approx(3e-7)
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0
    with pytest.raises(ValueError, match=r"got has shape \[2\], expected \[2, 2\]"):
        relative_error(expected[0], expected)


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        ([1, NAN], [1, 2], INF),
        ([1, INF], [1, 2], INF),
        ([1, 2], [1, NAN], INF),
        ([1, INF], [1, NAN], INF),
        ([1, INF], [1, -INF], INF),
        ([NAN, 2, 3], [1, 2, NAN], INF),
        ([1, NAN], [1, NAN], 0),
        ([1, -INF], [2, -INF], 0.5),
        ([NAN, NAN], [NAN, NAN], 0),
    ],
)
def test_relative_error_of_what_is_no_number(got: list[float], expected: list[float], error: float) -> None:
    assert relative_error(torch.tensor(got), torch.tensor(expected)) == error


def test_relative_error_by_vector() -> None:
    expected = torch.tensor([[1e4, 2e4], [1.0, 2.0]])
    missing_row = torch.tensor([[1e4, 2e4], [0.0, 0.0]])
    assert relative_error(missing_row, expected) == 1e-4
    assert relative_error(missing_row, expected, dim=1) == 1
    assert relative_error(missing_row.T, expected.T, dim=0) == 1
    assert relative_error(torch.tensor([[1e4, 2e4], [0.0, 0.5]]), missing_row, dim=1) == 0.5


def test_poison_shows_what_was_not_written() -> None:
    with uninitialised_is_nan():
        like = torch.ones(3)
        made = [torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (1,))]
        made += [torch.empty(3, dtype=dtype) for dtype in (F64, BF16, F16)]
        assert all(tensor.isnan().all() for tensor in made)
        assert torch.empty(2, dtype=torch.int64).tolist() == [torch.iinfo(torch.int64).max] * 2
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_poison_leaves_everything_as_it_was(before: tuple[bool, bool]) -> None:
    flags: Any = torch.utils.deterministic
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        flags.fill_uninitialized_memory = False
        with contextlib.suppress(KeyError), uninitialised_is_nan():
            assert torch.empty(1).isnan()
            raise KeyError
        enabled, warn_only = torch.are_deterministic_algorithms_enabled(), before[1]
        assert (enabled, torch.is_deterministic_algorithms_warn_only_enabled() == warn_only) == (before[0], True)
        assert not flags.fill_uninitialized_memory
    finally:
        flags.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(False)


def product(dtype: torch.dtype = F32, run: Any = None, seed: int = 0, **changes: Any) -> Problem:
    """x W as a problem; `run` in the place of the code under test."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(9, 9, dtype=F64, generator=generator).to(dtype) for name in ("x", "W")}

    def right(tensors: Any) -> dict[str, Tensor]:
        return {"y": tensors["x"] @ tensors["W"]}

    values: dict[str, Any] = {"run": run or right, "eager": right, "oracle": right, "dtypes": {"y": dtype}} | changes
    return Problem("product", inputs, **values)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_measure_passes_what_is_right(dtype: torch.dtype, seed: int) -> None:
    (m,) = measure(product(dtype, seed=seed))
    assert m.ok
    assert m.what == "y"
    assert torch.finfo(dtype).eps / 100 < m.limit < 30 * torch.finfo(dtype).eps
    (m,) = measure(product(dtype, lambda t: {"y": (t["x"].double() @ t["W"].double()).to(dtype)}, seed=seed))
    assert m.ok, "better than eager"


def unwritten(t: Any) -> Tensor:
    y = torch.empty_like(t["x"])
    y[:-1] = (t["x"] @ t["W"])[:-1]
    return y


def into_input(t: Any) -> Tensor:
    y = t["x"] @ t["W"]
    t["W"][0, 0] += 1
    return y


@pytest.mark.parametrize(
    ("dtype", "wrong", "note"),
    [
        (F32, lambda t: {"y": 1.00001 * t["x"] @ t["W"]}, ""),
        (F64, lambda t: {"y": (1 + 1e-13) * t["x"] @ t["W"]}, ""),
        (BF16, lambda t: {"y": 0.8 * (t["x"] @ t["W"])}, ""),
        (F32, lambda t: {"y": (t["x"].bfloat16() @ t["W"].bfloat16()).float()}, ""),
        (F64, lambda t: {"y": (t["x"].float() @ t["W"].float()).double()}, ""),
        (F32, lambda t: {"y": -t["x"] @ t["W"]}, ""),
        (F32, lambda t: {"y": unwritten(t)}, "NaN or Inf in places where the oracle has none"),
        (F32, lambda t: {"y": into_input(t)}, "an input, and it was written to"),
        (F32, lambda t: {}, "missing"),
        (F32, lambda t: {"y": t["x"] @ t["W"], "z": t["x"]}, "not asked for"),
        (F32, lambda t: {"y": (t["x"] @ t["W"])[:-1]}, r"shape [8, 9] instead of [9, 9]"),
        (F32, lambda t: {"y": (t["x"] @ t["W"]).double()}, "torch.float64 instead of torch.float32"),
    ],
)
def test_measure_fails_what_is_wrong(dtype: torch.dtype, wrong: Any, note: str) -> None:
    failed = [m for m in measure(product(dtype, wrong)) if not m.ok]
    assert len(failed) == 1
    assert failed[0].note.startswith(note)
    assert bool(failed[0].note) == bool(note)
    assert failures(product(dtype, wrong)) == failed


@pytest.mark.parametrize("dtype", [F64, F32])
def test_failures_are_measures_verdict(dtype: torch.dtype, seed: int) -> None:
    """On either side of the limit; what is right by far takes a run or two of the oracle."""
    runs: list[int] = []

    def oracle(t: Any) -> dict[str, Tensor]:
        runs.append(1)
        return {"y": t["x"] @ t["W"]}

    def off(t: Any, by: float) -> dict[str, Tensor]:
        y = t["x"].double() @ t["W"].double()
        y.view(-1)[y.abs().argmin()] += by * y.abs().max()
        return {"y": y.to(dtype)}

    (m,) = measure(product(dtype, oracle=oracle, seed=seed))
    most = len(runs)
    for share, fails, least in ((0.0, False, 1), (0.999, False, 3), (1.001, True, most)):
        runs.clear()
        found = failures(product(dtype, lambda t, by=share * m.limit: off(t, by), oracle=oracle, seed=seed))
        assert bool(found) == fails, share
        assert least <= len(runs) <= (most if share else 2), share


def test_limit_knows_cancellation() -> None:
    """A difference that is 10⁻⁴ of its terms may be 10⁴ times less exact than a sum of them;
    nothing else may.
    """
    big = torch.linspace(1, 2, 64)
    inputs = {"a": big, "b": big * (1 - 1e-4)}

    def sums(t: Any) -> dict[str, Tensor]:
        return {"sum": t["a"] + t["b"], "difference": t["a"] - t["b"]}

    found = {m.what: m for m in measure(Problem("", inputs, sums, sums, sums, {"sum": F32, "difference": F32}))}
    eps = torch.finfo(F32).eps
    assert found["sum"].limit < 10 * eps
    assert 1e3 * eps < found["difference"].limit < 1e5 * eps


def test_limit_follows_the_coarsest_dtype_on_the_way() -> None:
    (direct,) = measure(product())
    (through,) = measure(product(through={"y": BF16}))
    assert through.limit > 1e4 * direct.limit
    (rounded,) = measure(product(run=lambda t: {"y": (t["x"] @ t["W"]).bfloat16().float()}, through={"y": BF16}))
    assert rounded.ok


def test_measure_refuses_inputs_that_overflow() -> None:
    def overflowing(t: Any) -> dict[str, Tensor]:
        return {"y": (300 * t["x"]) @ (300 * t["W"])}

    with pytest.raises(ValueError, match="product: eager PyTorch gives NaN or Inf in y; take smaller inputs"):
        measure(product(F16, overflowing, eager=overflowing, oracle=overflowing))


def test_every_op_and_function_is_covered() -> None:
    assert {*OPS, "dropout_mask"} == set(ops.NAMES)
    assert {method.function for method in METHODS.values()} == set(functional.CALLS)
    assert all(name == method.name for name, method in METHODS.items())
    for name in OPS:
        own, theirs = (inspect.signature(getattr(place, name)).parameters for place in (naive, ops))
        given = [(parameter.name, parameter.annotation) for parameter in theirs.values()]
        renamed = {"mask": "seed"}
        assert [(renamed.get(each.name, each.name), each.annotation) for each in own.values()] == given, name


@pytest.mark.parametrize("dtypes", [(F64, F64), (F32, F32), (BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_methods_pass(name: str, dtypes: tuple[torch.dtype, torch.dtype], seed: int) -> None:
    method = METHODS[name]
    problem = method.problem(5, 11, 9, 2, dtype=dtypes[0], adapter_dtype=dtypes[1], seed=seed)
    found = measure(problem)
    assert [m for m in found if not m.ok] == []
    statistics = {"probability", "z"} if method.function == "moe_lora_linear" else set()
    assert {m.what for m in found} == {"y"} | statistics | {f"d{trained}" for trained in method.trained(problem.inputs)}
    factors = {"u"} if method.function.startswith("ether") else {"A", "B"}
    assert {"x", "weight"} | factors <= set(method.trained(problem.inputs))


def test_inputs_are_the_same_numbers_everywhere(seed: int) -> None:
    for method in METHODS.values():
        exact = method.draw(5, 11, 9, 2, dtype=F64, seed=seed)
        mixed = method.draw(5, 11, 9, 2, dtype=BF16, adapter_dtype=F32, seed=seed)
        assert exact.keys() == mixed.keys()
        for name, value in mixed.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, exact[name].to(value.dtype)), name
                dtype = BF16 if name in ("x", "weight", "bias", "grad_out") else F32
                assert value.dtype == dtype or name in ("seed", "dropout_mask", "token_mask", "offsets")
        other = method.draw(5, 11, 9, 2, dtype=F64, seed=seed + 1)
        assert not torch.equal(other["x"], exact["x"])


def test_fused_asks_for_the_wanted_gradients_alone(seed: int) -> None:
    method = METHODS["delora-frozen-paper"]
    inputs = method.draw(5, 11, 9, 2, seed=seed)
    assert method.trained(inputs) == ("x", "weight", "A", "B", "bias", "lam")
    everything, some = method.fused(inputs), method.fused(inputs, trained=("lam", "A"))
    assert list(some) == ["y", "dA", "dlam"]
    assert all(relative_error(some[name], everything[name]) <= 1e-6 for name in some)
    assert list(method.fused(inputs, trained=())) == ["y"]


def test_oracle_uses_the_mask_of_the_fused_call(seed: int) -> None:
    for name in ("lora-dropout", "dora-dropout", "dora-branch-dropout", "delora-dropout"):
        method = METHODS[name]
        problem = method.problem(16, 16, 8, 2, dtype=F64, seed=seed)
        assert failures(problem) == []
        problem.inputs["dropout_mask"][3, 5] ^= True
        assert {"y", "dx", "dA"} <= {m.what for m in failures(problem)}


@pytest.mark.parametrize("name", ["lora", "dora", "delora"])
def test_mixed_eager_form_is_what_peft_computes(name: str, seed: int) -> None:
    peft = pytest.importorskip("peft")
    T, K, N, r = 33, 40, 24, 4
    inputs = METHODS[name].draw(T, K, N, r, dtype=BF16, adapter_dtype=F32, seed=seed, bias=False)
    if name == "delora":
        config = peft.DeloraConfig(r=r, target_modules=["0"])
    else:
        config = peft.LoraConfig(r=r, lora_alpha=ALPHA, use_dora=name == "dora", target_modules=["0"])
    base = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False, dtype=BF16))
    layer: Any = peft.get_peft_model(base, config).base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(inputs["weight"])
        if name == "delora":
            layer.delora_A["default"].copy_(inputs["A"])
            layer.delora_B["default"].copy_(inputs["B"])
            layer.delora_lambda["default"].copy_(inputs["lam"])
            layer.delora_w_norm["default"].copy_(inputs["weight_norm"])
        else:
            layer.lora_A["default"].weight.copy_(inputs["A"])
            layer.lora_B["default"].weight.copy_(inputs["B"])
        if name == "dora":
            layer.lora_magnitude_vector["default"].weight.copy_(inputs["magnitude"])
        theirs = layer(inputs["x"])
        ours = eager_form(METHODS[name].function, **{k: v for k, v in inputs.items() if k != "grad_out"})
    assert ours.dtype == theirs.dtype == BF16
    assert relative_error(ours, theirs) <= (0.01 if name == "delora" else 0.004)
    different = float((ours != theirs).float().mean())
    assert different <= (0.5 if name == "delora" else 0.05)  # PEFT's DeLoRA rounds the branch, too, before it adds it
    exact = METHODS[name].oracle(inputs, trained=())["y"]
    assert relative_error(theirs, exact) >= relative_error(ours, exact) / 2 > 0


def test_uniform_eager_form_is_the_reference(seed: int) -> None:
    for method in METHODS.values():
        inputs = method.draw(5, 11, 9, 2, dtype=BF16, seed=seed)
        arguments = method._reference_arguments(inputs)
        forms = (eager_form(method.function, **arguments), getattr(reference, method.function)(**arguments))
        eager_y, y = (found if isinstance(found, Tensor) else found[0] for found in forms)
        assert torch.equal(eager_y, y)


@pytest.mark.parametrize("name", OPS)
def test_op_problems_are_the_variants_with_their_dtypes(name: str, seed: int) -> None:
    for dtype, rank_dtype in ((F32, F32), (BF16, F32)):
        problems = list(op_problems(name, 5, 11, 9, 2, backend="eager", dtype=dtype, rank_dtype=rank_dtype, seed=seed))
        assert len(problems) >= (1 if name == "row_norm" else 2)
        for problem in problems:
            found = measure(problem)
            assert found
            assert [m for m in found if not m.ok] == []


@pytest.mark.parametrize(
    ("mask", "failing"),
    [
        (lambda T, K, p, seed: torch.ones(T, K, dtype=torch.bool), {"rate", "next row", "next column", "next seed"}),
        (lambda T, K, p, seed: ~eager.dropout_mask(T, K, p, seed), {"rate"}),
        (lambda T, K, p, seed: eager.dropout_mask(T, K, p + 0.05, seed), {"rate", "next row", "next column"}),
        (lambda T, K, p, seed: eager.dropout_mask(1, K, p, seed).expand(T, K), {"next row"}),
        (lambda T, K, p, seed: eager.dropout_mask(T, 1, p, seed).expand(T, K), {"next column"}),
        (lambda T, K, p, seed: eager.dropout_mask(T, K, p, 0 * seed), {"next seed"}),
        (lambda T, K, p, seed: torch.rand(T, K) >= p, {"repeat"}),
        (lambda T, K, p, seed: eager.dropout_mask(T, K, p, seed).float(), {"mask"}),
        (lambda T, K, p, seed: eager.dropout_mask(T, K + 1, p, seed), {"mask"}),
    ],
)
def test_dropout_mask_is_judged(mask: Any, failing: set[str], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    assert all(m.ok for m in measure_dropout_mask(121, 205, backend="eager", seed=seed))
    copy = ModuleType("broken")
    copy.__dict__.update(vars(load("eager")) | {"dropout_mask": mask})
    monkeypatch.setitem(load.__globals__["loaded"], "eager", copy)
    torch.manual_seed(seed)
    found = {m.what for m in measure_dropout_mask(121, 205, backend="eager", seed=seed) if not m.ok}
    assert failing <= found


def test_gradcheck_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    for name in ("dora", "delora-frozen-live"):
        assert gradcheck(METHODS[name], 2, 3, 3, 2, seed=seed) < 1e-6
    right = eager.input_backward
    monkeypatch.setattr(eager, "input_backward", lambda *a: (right(*a)[0] * 1.0001, right(*a)[1]))
    with pytest.raises(GradcheckError, match=r"with respect to input 0.* \(inputs: x, weight, A, B, bias\)"):
        gradcheck(METHODS["lora"], 2, 3, 3, 2, seed=seed)
