"""All low-rank modules at once (one alone: test_dora.py, test_delora.py): starts, numbers against
the reference in float64, dtypes, construction, errors.
"""

import inspect
import math
from typing import Any

import pytest
import torch
from nn_modules import EPS, KINDS, every_dtype, every_kind, make, oracle
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels import ops
from delora_kernels.nn import DeLoRALinear, DoRALinear, LoRALinear
from delora_kernels.nn.base import BaseOptions
from delora_kernels.testing import relative_error


@every_dtype
@every_kind
def test_start_is_the_frozen_linear(kind: str, dtype: torch.dtype) -> None:
    module, linear = make(kind, dtype, trained=False)
    x = torch.randn(2, 3, 14, dtype=dtype)
    exact = kind in ("lora", "rslora", "delora")
    assert relative_error(module(x), linear(x)) <= (0 if exact else 20 * EPS[dtype])
    assert module.A.abs().max() <= 1 / math.sqrt(14)
    assert module.A.std() > 0.5 / math.sqrt(3 * 14)
    assert module.B.abs().max() <= 1 / math.sqrt(3)
    assert (module.B.abs().max() > 0) == ("frozen_A" in module.state_dict())
    module.merge()
    assert relative_error(module.weight, linear.weight) <= (0 if exact else 20 * EPS[dtype])


@pytest.mark.parametrize("trained", [True, False])
@every_kind
def test_output_and_gradients_are_the_references(kind: str, trained: bool) -> None:
    module, _ = make(kind, trained=trained)
    x = torch.randn(4, 5, 14, dtype=torch.float64, requires_grad=True)
    grad_out = torch.randn(4, 5, 10, dtype=torch.float64)
    function, leaves, _ = oracle(module)
    expected = torch.autograd.grad(y := function(x), [x, *leaves.values()], grad_out)
    (got := module(x)).backward(grad_out)
    assert relative_error(got, y) <= 1e-13
    grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert grads.keys() == leaves.keys() == {"A", "B"} | KINDS[kind][2]
    for name, want in zip(["x", *leaves], expected, strict=True):
        error = (x.grad if name == "x" else grads[name]) - want
        assert error.abs().max() <= 1e-12 * want.abs().max().clamp(min=1), name  # λ's gradient may cancel
    assert module.weight.grad is None
    assert module.bias is None or module.bias.grad is None


@every_kind
def test_from_linear_shares_and_never_writes(kind: str) -> None:
    module, linear = make(kind, torch.float32, trained=False)
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    for name, parameter in linear.named_parameters():
        shared = module.get_parameter(name)
        assert shared.data_ptr() == parameter.data_ptr()
        assert parameter.requires_grad
        assert not shared.requires_grad
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        module(torch.randn(6, 14)).square().sum().backward()
        optimizer.step()
    module.merge()
    module.to(torch.bfloat16).unmerge()
    module.to(torch.float64).reset_parameters()
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())
    assert module(torch.randn(6, 14).double()).dtype == torch.float64
    assert KINDS[kind][0].from_linear(linear.eval(), 3).training is False


@pytest.mark.parametrize("kind", ["lora", "dora", "dora-branch", "delora", "delora-live"])
def test_dropout_in_training_only(kind: str) -> None:
    module, _ = make(kind, dropout_p=0.25)
    x = torch.randn(4, 5, 14, dtype=torch.float64)
    state = torch.get_rng_state()
    y = module(x)
    torch.set_rng_state(state)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64)  # as the functions draw it
    mask = ops.dropout_mask(20, 14, 0.25, seed, "eager").double() / 0.75
    assert mask.min() == 0
    assert relative_error(y, oracle(module, mask).linear(x)) <= 1e-13
    without = oracle(module).linear(x)
    assert relative_error(y, without) > 1e-3
    assert relative_error(module.eval()(x), without) <= 1e-13
    module.train().merge()
    assert relative_error(module(x), without) <= 1e-13


@pytest.mark.parametrize(
    ("base_dtype", "adapter_dtype", "factors", "vectors"),
    [
        (torch.float16, None, torch.float32, torch.float32),
        (torch.bfloat16, None, torch.float32, torch.float32),
        (torch.float32, None, torch.float32, torch.float32),
        (torch.float64, None, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float32, torch.float64),
    ],
)
@every_kind
def test_dtypes(kind: str, base_dtype: Any, adapter_dtype: Any, factors: Any, vectors: Any) -> None:
    module, linear = make(kind, base_dtype, trained=False, adapter_dtype=adapter_dtype)
    x = torch.randn(6, 14, dtype=base_dtype)
    assert (
        relative_error(module(x), linear(x)) <= 20 * EPS[factors if "live" in kind or "paper" in kind else base_dtype]
    )
    dtypes = {name: value.dtype for name, value in module.state_dict().items()}
    expected = dict.fromkeys(dtypes, vectors) | dict.fromkeys(("A", "B", "frozen_A", "frozen_B"), factors)
    assert dtypes == {name: (expected | {"weight": base_dtype, "bias": base_dtype})[name] for name in dtypes}
    module(x).sum().backward()
    assert all(p.grad.dtype == p.dtype for p in module.parameters() if p.requires_grad)
    assert relative_error(module.to(torch.float64)(x.double()), linear.double()(x.double())) <= 20 * EPS[factors]


@every_kind
def test_plain_constructor_and_reset(kind: str) -> None:
    cls, options, _, _ = KINDS[kind]
    options = options | {"r": 3, "bias": kind != "dora-output", "dtype": torch.float64}
    state = torch.get_rng_state()
    module = cls(14, 10, **options)
    torch.set_rng_state(state)
    linear = nn.Linear(14, 10, options["bias"], dtype=torch.float64)
    assert torch.equal(module.weight, linear.weight)
    assert not module.weight.requires_grad
    # a checkpoint of the base, loaded later: the adapter then starts anew from it
    on_meta = cls(14, 10, device="meta", **options)
    assert all(p.is_meta for p in (*on_meta.parameters(), *on_meta.buffers()))
    assert repr(on_meta) == repr(module)
    assert on_meta.state_dict().keys() == module.state_dict().keys()
    on_meta.to_empty(device="cpu").load_state_dict({k: 3 * v for k, v in linear.state_dict().items()}, strict=False)
    on_meta.reset_parameters()
    x = torch.randn(6, 14, dtype=torch.float64)
    assert relative_error(on_meta(x), 3 * linear(x)) <= 20 * EPS[torch.float64]
    # from_linear of a meta linear, filled by assignment
    trained, _ = make(kind)
    around = cls.from_linear(
        nn.Linear(14, 10, options["bias"], device="meta", dtype=torch.float64), 3, **KINDS[kind][1]
    )
    with pytest.raises(ValueError, match="meta"):
        around.merge()
    around.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(around(x), trained(x))


def test_reset_takes_the_norms_from_the_weight() -> None:
    for kind in ("delora", "delora-paper", "dora"):
        module, linear = make(kind, torch.bfloat16)
        linear.weight.data.mul_(3)  # the same tensor
        module.reset_parameters()
        W = linear.weight.double()
        if kind == "dora":
            assert relative_error(module.magnitude, W.norm(dim=1)) <= 1e-6
        else:
            assert relative_error(module.weight_norm, W.norm(dim=0) if kind == "delora" else W.norm()) <= 1e-6
            assert module.lam.shape == (1,)
            assert module.lam.item() == module.initial_lam


def test_repr() -> None:
    linear = nn.Linear(14, 10, bias=False)
    module = DeLoRALinear.from_linear(linear, 3, start="frozen_live", dropout_p=0.1)
    module.merge()
    text = "in_features=14, out_features=10, r=3, bias=False, dropout_p=0.1, merged=True"
    text += ", initial_lam=15.0, start='frozen_live', weight_norm='column'"
    assert repr(module) == f"DeLoRALinear({text})"
    text = "in_features=14, out_features=10, r=3, bias=False, dropout_p=0.0, alpha=8.0, rslora=True"
    assert repr(LoRALinear.from_linear(linear, 3, rslora=True)) == f"LoRALinear({text})"
    text = text.replace("rslora=True", "rslora=False, dropout='branch', saved='private'")
    assert repr(DoRALinear.from_linear(linear, 3, dropout="branch")) == f"DoRALinear({text})"


@pytest.mark.parametrize(
    ("cls", "options", "kind", "words"),
    [
        (LoRALinear, {"r": 0}, ValueError, "LoRALinear: r must be ≥ 1, got 0"),
        (DoRALinear, {"r": 4.0}, TypeError, "DoRALinear: r must be an int, got float"),
        (LoRALinear, {"alpha": math.nan}, ValueError, "LoRALinear: alpha must be finite"),
        (DeLoRALinear, {"lam": "15"}, TypeError, "DeLoRALinear: lam must be a number"),
        (DeLoRALinear, {"dropout_p": 1.0}, ValueError, "DeLoRALinear: dropout_p"),
        (DeLoRALinear, {"start": "frozen"}, ValueError, "DeLoRALinear: start must be one of .*zero.*frozen_live"),
        (DeLoRALinear, {"weight_norm": "row"}, ValueError, "DeLoRALinear: weight_norm must be one of .*column"),
        (DoRALinear, {"dropout": "both"}, ValueError, "DoRALinear: dropout must be one of .*branch"),
        (DoRALinear, {"saved": "y"}, ValueError, "DoRALinear: saved must be one of .*private"),
        (DoRALinear, {"saved": "output"}, ValueError, "DoRALinear: saved must be 'private' here, .*bias"),
        (LoRALinear, {"adapter_dtype": torch.int8}, TypeError, "LoRALinear: adapter_dtype must be one of .*int8"),
    ],
)
def test_errors_name_the_argument(cls: Any, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    for make_one in (lambda: cls.from_linear(nn.Linear(6, 5), **options), lambda: cls(6, 5, **options)):
        with pytest.raises(kind, match=words):
            make_one()


def test_only_plain_linears_are_adapted() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked = nn.Linear(6, 5)
    hooked.register_forward_hook(lambda module, args, y: 2 * y)
    for linear, words in ((Doubled(6, 5), "Doubled"), (hooked, "hooks"), (torch.randn(5, 6), "Tensor")):
        with pytest.raises(TypeError, match=rf"LoRALinear\.from_linear: linear must be a plain nn\.Linear.*{words}"):
            LoRALinear.from_linear(linear)
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)
    x = torch.randn(4, 6)
    module = DeLoRALinear.from_linear(conv)
    assert relative_error(module(x), conv(x)) <= 1e-6
    assert module.weight.data_ptr() == conv.weight.data_ptr()
    module.merge()
    assert relative_error(module(x), conv(x)) <= 1e-6


@pytest.mark.parametrize("name", [name for name in dk.nn.__all__ if name.endswith("Linear")])
def test_signatures_show_every_option(name: str) -> None:
    """Those of the base too, which the modules do not spell out; all of them are taken."""
    kind = getattr(dk.nn, name)
    shown = inspect.signature(kind).parameters
    defaults = {each: shown[each].default for each in BaseOptions.__annotations__}
    assert defaults == dict.fromkeys(defaults) | {"bias": True, "dropout_p": 0.0}
    assert not [each for each in shown.values() if each.kind is each.VAR_KEYWORD]
    if name in ("MergeableLinear", "AdapterLinear"):
        return
    assert "experts" not in shown or name.startswith("Grouped") or issubclass(kind, dk.nn.MoELoRALinear)
    options = {each: shown[each].default for each in shown if shown[each].default is not inspect.Parameter.empty}
    if issubclass(kind, dk.nn.MoELoRALinear):  # GOAT's start has no more triples than W
        options |= {"experts": 2, "r": 1}
    module = kind(8, 6, **options)
    assert module.bias is not None
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        kind(8, 6, ranks=3)
