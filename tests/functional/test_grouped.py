"""grouped_lora_linear: values and every gradient against the formula in float64, whatever the
experts have of the rows.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from grouped_calls import ROWS, TRAINED, E, K, N, R, assert_close, made_of, step
from reference_calls import Maker
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from delora_kernels import functional as F
from delora_kernels import ops, reference, use_backend
from delora_kernels.backends import eager
from delora_kernels.backends.eager import grouped_library
from delora_kernels.functional.grouped import run_routed
from delora_kernels.testing import failures, op_problems

FORMULAS = (reference.grouped_lora_linear, reference.grouped_lora_linear_dense)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("rows", ROWS)
def test_values_and_gradients(rows: str, formula: Callable[..., Tensor], seed: int) -> None:
    made = made_of(Maker(seed), ROWS[rows])
    assert_close(step(F.grouped_lora_linear, made), step(formula, made))
    made["bias"], made["offsets"] = None, made["offsets"].to(torch.int32)
    assert_close(step(F.grouped_lora_linear, made), step(formula, made))


def test_no_row_at_all(seed: int) -> None:
    made = made_of(Maker(seed), [0, 0, 0, 0], nobody=0)
    found = step(F.grouped_lora_linear, made)
    assert found["y"].shape == (0, N)
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("T", [0, 1, 6])
def test_every_subset_of_gradients(T: int, seed: int) -> None:
    maker = Maker(seed)
    made = made_of(maker, [T // 2, 0, T - T // 2, 0])
    expected = step(reference.grouped_lora_linear, made)
    for count in range(len(TRAINED) + 1):
        for trained in itertools.combinations(TRAINED, count):
            assert_close(step(F.grouped_lora_linear, made, trained), {n: expected[n] for n in ("y", *trained)})


def test_weights_that_lie_transposed_and_factors_across_experts(seed: int) -> None:
    """As gpt-oss stores weights, [E, K, N], and as PEFT packs B, [N, r, E]."""
    made = made_of(Maker(seed), [2, 0, 3, 1])
    expected = step(reference.grouped_lora_linear, made)
    made["weight"] = made["weight"].mT.contiguous().mT
    made["B"] = made["B"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert_close(step(F.grouped_lora_linear, made), expected)


def test_an_expert_adds_only_its_gemms(seed: int) -> None:
    """Its views are made with those of all: 3 calls of torch forward, 5 backward, none else."""

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    counted = []
    for rows in ([2, 0, 0, 0], [2, 1, 3, 2]):
        made = made_of(Maker(seed), rows)
        x, W, A, B, offsets = (made[name] for name in ("x", "weight", "A", "B", "offsets"))
        with Calls() as forward:
            y, h = eager.grouped_linear(x, W, None, offsets, A, B, 0.5)
        with Calls() as backward:
            eager.grouped_backward(y, x, h, W, offsets, A, B, 0.5, False)
        counted.append((forward.count, backward.count))
    (one, one_back), (four, four_back) = counted
    assert (four - one, four_back - one_back) == (3 * 3, 3 * 5)


@pytest.fixture(params=["loop", "library"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The eager backend's two ways; the grouped GEMM runs on CPU tensors too."""
    if request.param == "library":
        if not hasattr(torch.nn.functional, "grouped_mm"):
            pytest.skip("this torch has no grouped GEMM for a CPU")
        monkeypatch.setattr(grouped_library, "takes", grouped_library.fits)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["grouped_linear", "grouped_backward", "grouped_weight_grad"])
def test_ops_by_either_way(name: str, dtype: torch.dtype, form: str, seed: int) -> None:
    """Ranks that fill no 16 bytes too, and sizes that the grouped GEMM does not take."""
    for T, k, n, r in ((21, 24, 16, 3), (18, 16, 40, 8), (5, 7, 9, 1)):
        for problem in op_problems(name, T, k, n, r, backend="eager", dtype=dtype, seed=seed):
            assert failures(problem) == []


def test_rows_of_no_expert_are_not_read(form: str, seed: int) -> None:
    """NaN there shows nowhere: 0 in y and in dx; nor does what dy holds there."""
    made = made_of(Maker(seed), [4, 0, 5, 0], nobody=3, dtype=torch.float32)
    clean = step(F.grouped_lora_linear, made)
    made["x"][-3:] = torch.nan
    x = made["x"].requires_grad_()
    A, B, W, bias = (made[name].requires_grad_() for name in ("A", "B", "weight", "bias"))
    y = F.grouped_lora_linear(x, W, A, B, made["offsets"], 0.7, bias)
    dy = torch.linspace(-1, 2, y.numel()).reshape(y.shape).bfloat16().float()
    dy[-3:] = torch.nan
    grads = torch.autograd.grad(y, (x, W, A, B, bias), dy)
    assert not y[-3:].any()
    assert not grads[0][-3:].any()
    assert_close({"y": y.detach()} | dict(zip(TRAINED, grads, strict=True)), clean, limit=1e-6)


def test_nothing_of_the_weights_size_is_kept(seed: int) -> None:
    """x, h, the factors, the offsets and the caller's own weight; without an x to train, less."""
    made = made_of(Maker(seed), [2, 2, 2, 2], dtype=torch.float32)
    for trained, others in ((("x", "A", "B"), 5), (("A", "B"), 4), (("x",), 3), (("B",), 2)):
        kept: list[Tensor] = []
        leaves = {name: made[name].clone().requires_grad_() for name in trained}

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            F.grouped_lora_linear(**made | leaves)
        own = [t for t in kept if t.data_ptr() != made["weight"].data_ptr()]
        assert len(own) == others, trained
        assert all(t.numel() < made["weight"].numel() for t in own)
        assert len(kept) - len(own) == ("x" in trained)


def test_opcheck(form: str, seed: int) -> None:
    maker = Maker(seed)
    made = made_of(maker, [2, 0, 3, 1], dtype=torch.float32)
    x, W, A, B, bias, ends = (made[n] for n in ("x", "weight", "A", "B", "bias", "offsets"))
    dy, h = maker.tensor(8, N).float(), maker.tensor(8, R).float()
    calls = {
        "grouped_linear": [
            (x, W, bias, ends, A, B, 0.7, 0.2, torch.tensor(seed)),
            (x, W, None, ends, None, None, 1.0, 0.0, None),
        ],
        "grouped_backward": [
            (dy, x, h, W, ends, A, B, 0.7, True, 0.2, torch.tensor(seed)),
            (dy, None, None, W, ends, None, None, 1.0, False, 0.0, None),
            (dy, x, None, None, ends, None, B, 0.7, False, 0.0, None),
        ],
        "grouped_weight_grad": [(dy, x, ends)],
    }
    for name, arguments in calls.items():
        for values in arguments:
            torch.library.opcheck(getattr(torch.ops.delora_kernels, name).default, (*values, "eager"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph(dtype: torch.dtype, seed: int) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    maker, frames = Maker(seed), set()
    compiled = torch.compile(F.grouped_lora_linear, backend=counter, fullgraph=True, dynamic=True)
    for rows in ([4, 0, 3, 1], [0, 9, 2, 2]):  # neither as many rows as K or N
        made = made_of(maker, rows, nobody=3, dtype=dtype)
        ours, theirs = step(compiled, made), step(F.grouped_lora_linear, made)
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
        frames.add(counter.frame_count)
    assert len(frames) == 1  # nothing is compiled again for another number of rows


def test_wider_factors_and_autocast(seed: int) -> None:
    """float32 factors on a bfloat16 base get float32 gradients; autocast casts what nn.Linear's
    casts.
    """
    made = made_of(Maker(seed), [4, 0, 5, 3], dtype=torch.bfloat16)
    made |= {name: made[name].float() for name in ("A", "B")}
    exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in made.items()}
    found, expected = step(F.grouped_lora_linear, made), step(reference.grouped_lora_linear, exact)
    assert {n: v.dtype for n, v in found.items()} == {"y": torch.bfloat16} | {n: made[n].dtype for n in TRAINED}
    for name, value in expected.items():
        # dy and x are bfloat16 numbers: y, dx, dW and dbias are rounded once, and of sums
        # that went before, at most once more; dA and dB see float32 alone
        eps = 2e-6 if name in ("A", "B") else torch.finfo(torch.bfloat16).eps
        assert float((found[name].double() - value).abs().max()) <= 2 * eps * float(value.abs().max()), name
    wide = {n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in made.items()}
    narrow = {n: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in made.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = F.grouped_lora_linear(**wide)
    assert torch.equal(y, F.grouped_lora_linear(**narrow))


def test_frozen_linears_alone(seed: int) -> None:
    made = made_of(Maker(seed), [2, 0, 3, 1])
    x = made["x"].requires_grad_()
    y = run_routed(x, made["weight"], made["bias"], None, made["offsets"])
    without = made | {"A": torch.zeros_like(made["A"])}
    expected = reference.grouped_lora_linear(**without)
    assert_close({"y": y.detach()}, {"y": expected.detach()})
    assert torch.equal(*(torch.autograd.grad(each.sum(), x)[0] for each in (y, expected)))


def test_rows_that_are_taken_from_tokens(seed: int) -> None:
    """The same as of sorted rows, which are copies of the tokens; kept are the tokens alone."""
    maker = Maker(seed)
    made = made_of(maker, [3, 0, 4, 3], nobody=0)
    x, rows = maker.tensor(5, K), torch.tensor([4, 0, 2, 1, 1, 3, 2, 0, 4, 3])
    places = torch.stack([(rows == token).nonzero().flatten() for token in range(5)])
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    def routed(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor, offsets: Tensor, scale: float) -> Tensor:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            return run_routed(x, weight, bias, (A, B, scale), offsets, rows, places)

    def plain(x: Tensor, **others: Any) -> Tensor:
        return reference.grouped_lora_linear(x[rows], **others)

    assert_close(step(routed, made | {"x": x}), step(plain, made | {"x": x}))
    assert not [t for t in kept if t.shape == (10, K)]


def test_second_derivatives_are_refused(seed: int) -> None:
    made = made_of(Maker(seed), [2, 0, 3, 1])
    x = made["x"].requires_grad_()
    made["A"].requires_grad_()
    (dx,) = torch.autograd.grad(F.grouped_lora_linear(**made | {"x": x}).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_lora_linear has no second derivative"):
        dx.sum().backward()


def test_a_requested_backend_takes_it(seed: int) -> None:
    made = made_of(Maker(seed), [2, 0, 3, 1], dtype=torch.float32)
    with use_backend("eager"):
        y = F.grouped_lora_linear(**made)
    assert torch.equal(y, F.grouped_lora_linear(**made))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of three dimensions": ({"x": torch.zeros(2, 5, K)}, ValueError, r"x must be 2-D \[T, K\], got shape"),
    "x of another K": ({"x": torch.zeros(5, K + 1)}, ValueError, r"x must be \[T, K\] with K = 8.*weight.mT"),
    "x of another dtype": ({"x": torch.zeros(5, K)}, TypeError, "x must be torch.float64, weight's dtype"),
    "a matrix for all": ({"weight": torch.zeros(N, K).double()}, ValueError, r"weight must be 3-D \[E, N, K\]"),
    "A of another E": ({"A": torch.zeros(E + 1, R, K).double()}, ValueError, r"A must be \[E, r, K\] = \[4, 3, 8\]"),
    "A of rank 0": ({"A": torch.zeros(E, 0, K).double()}, ValueError, r"A must be \[E, r, K\] with r ≥ 1"),
    "B packed as PEFT's": ({"B": torch.zeros(N, R, E).double()}, ValueError, r"B must be \[E, N, r\] = \[4, 12, 3\]"),
    "one bias for all": ({"bias": torch.zeros(N).double()}, ValueError, r"bias must be \[E, N\]"),
    "float offsets": ({"offsets": torch.zeros(E)}, TypeError, "offsets must be an int32 or int64 tensor"),
    "offsets with a 0 before": ({"offsets": torch.zeros(E + 1).long()}, ValueError, r"offsets must be \[E\] = \[4\]"),
    "offsets that fall": ({"offsets": torch.tensor([3, 2, 6, 6])}, ValueError, "offsets must not fall"),
    "offsets past the end": ({"offsets": torch.tensor([3, 3, 6, 99])}, ValueError, "end at most at x's 8 rows"),
    "no finite scale": ({"scale": float("nan")}, ValueError, "scale must be finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case: str, seed: int) -> None:
    changed, kind, text = WRONG[case]
    made = made_of(Maker(seed), [2, 0, 3, 1]) | changed
    with pytest.raises(kind, match=text):
        F.grouped_lora_linear(**made)


def test_ops_have_no_autograd_of_their_own(seed: int) -> None:
    made = made_of(Maker(seed), [2, 0, 3, 1])
    with pytest.raises(RuntimeError, match="has no autograd formula"):
        ops.grouped_linear(
            made["x"].requires_grad_(), made["weight"], None, made["offsets"], None, None, 1.0, 0.0, None, "eager"
        )
