"""What is done to a layer after accelerate() and no fused call can see: PEFT's own forward runs,
and says why once.
"""

import copy
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_models import model, step
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

import delora_kernels as dk
from delora_kernels.autograd import function


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 5, 12, dtype=torch.float64)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every fused call by the name of its function."""
    made: list[str] = []
    run = function.run
    monkeypatch.setattr(
        function, "run", lambda kind, call, *rest: made.append(call.options.method) or run(kind, call, *rest)
    )
    return made


@pytest.fixture(autouse=True)
def _forget_what_was_logged() -> None:
    for name, module in sys.modules.items():
        if name.startswith("delora_kernels.integrations.peft") and hasattr(module, "_logged"):
            module._logged.clear()
    return


def same_as_peft(
    method: str, change: Callable[[Any], Any], x: Tensor, seed: int, caplog: pytest.LogCaptureFixture
) -> list[str]:
    """What is logged by two steps of a model that is changed after accelerate(), which give PEFT's
    numbers.
    """
    plain, made = (model(method, seed, dtype=torch.float64) for _ in range(2))
    dk.accelerate(made, strict=True)
    for both in (plain, made):
        torch.manual_seed(seed)
        change(both)
    theirs = step(plain, x, seed)
    sizes = {name: float(value.abs().max()) for name, value in theirs.items()}
    # λ's gradient is one number, and may cancel: its terms are of the size of the others' gradients
    sizes |= {name: max(sizes.values()) for name, value in theirs.items() if value.numel() == 1}
    with caplog.at_level(logging.WARNING, logger="delora_kernels.integrations.peft"):
        for _ in range(2):
            ours = step(made, x, seed)
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=0, atol=64 * 2.3e-16 * sizes[name])
    return [
        record.getMessage().removeprefix("an accelerated layer runs PEFT's own forward: ") for record in caplog.records
    ]


def first(made: Any) -> Any:
    return made.base_model.model.first


OWNERS: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "lora base": ("lora", lambda made: first(made).base_layer),
    "lora_A": ("lora", lambda made: first(made).lora_A["default"]),
    "lora_B": ("lora", lambda made: first(made).lora_B["default"]),
    "lora dropout": ("lora", lambda made: first(made).lora_dropout["default"]),
    "dora base": ("dora", lambda made: first(made).base_layer),
    "dora lora_B": ("dora", lambda made: first(made).lora_B["default"]),
    "magnitude": ("dora", lambda made: first(made).lora_magnitude_vector["default"]),
    "delora base": ("delora", lambda made: first(made).base_layer),
    "delora dropout": ("delora", lambda made: first(made).delora_dropout["default"]),
}

HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda owner: owner.register_forward_hook(lambda module, args, output: 1.5 * output),
    "forward_pre": lambda owner: owner.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:])),
    "backward": lambda owner: owner.register_full_backward_hook(lambda module, dx, dy: (1.5 * dx[0], *dx[1:])),
    "backward_pre": lambda owner: owner.register_full_backward_pre_hook(lambda module, dy: (1.5 * dy[0], *dy[1:])),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("owner", OWNERS)
def test_hooks(owner: str, hook: str, x: Tensor, seed: int, calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A hook on any module that PEFT's forward calls does what it does without accelerate()."""
    method, find = OWNERS[owner]
    logged = same_as_peft(method, lambda made: HOOKS[hook](find(made)), x, seed, caplog)
    assert len(logged) == 1
    assert "hooks" in logged[0] or "dropout" in logged[0]
    beside = owner in ("lora base", "delora base")  # where the rank term runs fused, and the base itself
    assert len(calls) == (6 if beside else 4)  # two steps of the two layers without a hook


class Doubled(nn.Module):
    """A parametrization: twice the tensor it is given."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


PARAMETRIZED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "lora_A": (
        "lora",
        lambda made: parametrize.register_parametrization(first(made).lora_A["default"], "weight", Doubled()),
        "its lora_A is a ParametrizedLinear",
    ),
    "base": (
        "dora",
        lambda made: parametrize.register_parametrization(first(made).base_layer, "weight", Doubled()),
        "ParametrizedLinear, not nn.Linear",
    ),
    "magnitude": (
        "dora",
        lambda made: parametrize.register_parametrization(
            first(made).lora_magnitude_vector["default"], "weight", Doubled()
        ),
        "its magnitude is a ParametrizedDoraLinearLayer",
    ),
    "delora_A": (
        "delora",
        lambda made: parametrize.register_parametrization(first(made).delora_A, "default", Doubled()),
        "its delora_A is kept in a ParametrizedParameterDict",
    ),
    "new weight_norm": (
        "lora",
        lambda made: parametrizations.weight_norm(first(made).lora_B["default"]),
        "its lora_B is a ParametrizedLinear",
    ),
    "old weight_norm": ("lora", lambda made: nn.utils.weight_norm(first(made).lora_A["default"]), "lora_A has hooks"),
    "old weight_norm of the base": (
        "delora",
        lambda made: nn.utils.weight_norm(first(made).base_layer),
        "base layer has hooks",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized(name: str, x: Tensor, seed: int, calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    method, change, reason = PARAMETRIZED[name]
    logged = same_as_peft(method, change, x, seed, caplog)
    assert len(calls) == (6 if name == "old weight_norm of the base" else 4)
    (said,) = logged
    assert reason in said


class EightBit(Tensor):
    """A weight kept as int8 and a scale for each row, dequantised where an operation reads it."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> "EightBit":
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)  # type: ignore[attr-defined]

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.rounded = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        args = [arg.rounded * arg.scale if isinstance(arg, cls) else arg for arg in args]
        return function(*args, **(kwargs or {}))


def quantise(made: Any) -> None:
    base = first(made).base_layer
    base.weight = nn.Parameter(EightBit(base.weight.detach()), requires_grad=False)


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_a_subclass_of_tensor_as_base(
    method: str, x: Tensor, seed: int, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert same_as_peft(method, quantise, x, seed, caplog) == ["the base weight is a EightBit"]
    assert len(calls) == 4


class Marked(Tensor):
    """A subclass whose operations return it again."""


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_a_subclass_of_tensor_as_input(method: str, x: Tensor, seed: int, calls: list[str]) -> None:
    plain, made = (model(method, seed, dtype=torch.float64) for _ in range(2))
    dk.accelerate(made, strict=True)
    y = made(x.as_subclass(Marked))
    assert type(y) is Marked
    assert torch.equal(y, plain(x.as_subclass(Marked)))
    assert not calls


def partition(made: Any) -> None:
    """DeepSpeed's ZeRO-3 as a module sees it: weights are empty but while the module that owns them
    is called.
    """
    roles = ("base_layer", "lora_A.default", "lora_B.default")
    for name, module in made.named_modules():
        if name.endswith(roles):
            wholes = {key: parameter.data for key, parameter in module.named_parameters(recurse=False)}

            def gather(module: nn.Module, *_: Any, wholes: Any = wholes) -> None:
                for key, data in wholes.items():
                    getattr(module, key).data = data

            def release(module: nn.Module, *_: Any) -> None:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.new_empty(0)
                    parameter.ds_status = "NOT_AVAILABLE"  # type: ignore[attr-defined]

            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
            release(module)


@pytest.mark.parametrize("method", ["lora", "delora"])
def test_partitioned_weights(method: str, x: Tensor, seed: int, calls: list[str]) -> None:
    plain, made = (model(method, seed, dtype=torch.float64) for _ in range(2))
    dk.accelerate(made, strict=True)
    partition(made)
    if method == "lora":  # whose factors are gathered too, by hooks of their own
        assert torch.equal(made(x), plain(x))
        assert not calls
    else:
        torch.testing.assert_close(made(x), plain(x))
    assert {layer.reason for layer in dk.accelerate(made).layers} == {"the base layer has hooks"}


OWN_TENSORS = {
    "lora": ("base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"),
    "dora": ("base_layer.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"),
    "delora": ("base_layer.weight", "delora_A.default", "delora_B.default", "delora_lambda.default"),
}


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method, names in OWN_TENSORS.items() for name in names]
)
def test_empty_weights(method: str, name: str, x: Tensor, seed: int, calls: list[str]) -> None:
    """A weight that is sharded away, without a hook that would bring it back: what PEFT raises, and
    the reason.
    """
    plain, made = (model(method, seed, dtype=torch.float64) for _ in range(2))
    dk.accelerate(made, strict=True)
    messages = []
    for both in (plain, made):
        parameter = first(both).get_parameter(name)
        parameter.data = parameter.data.new_empty(0)
        try:
            both(x)
        except (RuntimeError, IndexError) as error:
            messages.append(str(error))
    assert len(set(messages)) <= 1
    assert len(messages) in (0, 2)
    reason = dk.accelerate(made).layers[0].reason or ""
    assert "empty (sharded away" in reason or "rank is not" in reason


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method, names in OWN_TENSORS.items() for name in names]
)
def test_freed_weights(method: str, name: str, x: Tensor, seed: int, calls: list[str]) -> None:
    """Views of memory that was freed, which FSDP1 leaves between passes: never fused."""
    made = model(method, seed, dtype=torch.float64)
    dk.accelerate(made, strict=True)
    path, _, attribute = name.rpartition(".")
    owner = first(made).get_submodule(path)
    view = owner._parameters.pop(attribute).detach().clone()[:]
    setattr(owner, attribute, view)
    view.untyped_storage().resize_(0)
    assert "has no memory now" in (dk.accelerate(made).layers[0].reason or "")
    if name in ("lora_A.default.weight", "delora_A.default"):  # of the rest PEFT reads some and crashes
        with pytest.raises(RuntimeError):
            made(x)
    assert not calls


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_parameters_swapped_for_one_call(method: str, x: Tensor, seed: int, calls: list[str]) -> None:
    """torch.func.functional_call with other tensors, outside of a transform, is fused and sees
    them.
    """
    plain, made = (model(method, seed, dtype=torch.float64) for _ in range(2))
    dk.accelerate(made, strict=True)
    results = []
    for both in (plain, made):
        others = {name: (1.5 * p.detach()).requires_grad_() for name, p in both.named_parameters()}
        y = torch.func.functional_call(both, others, (x,))
        y.square().sum().backward()
        results.append([y, *(other.grad for other in others.values())])
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=64 * 2.3e-16 * float(theirs.abs().max()))
    assert len(calls) == 3


@pytest.mark.parametrize("method", ["lora", "delora"])
def test_global_hooks(method: str, x: Tensor, seed: int, calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A hook on all modules sees and changes what PEFT's forward calls."""
    handles: list[Any] = []

    def change(_: Any) -> None:
        if not handles:
            hook = lambda module, args, output: 1.5 * output if type(module) is nn.Linear else None  # noqa: E731
            handles.append(nn.modules.module.register_module_forward_hook(hook))

    try:
        logged = same_as_peft(method, change, x, seed, caplog)
    finally:
        handles[0].remove()
    assert logged == ["hooks are registered for all modules"]
    assert not calls


def test_counting_flops_is_no_reason(x: Tensor, seed: int, calls: list[str]) -> None:
    made = model("lora", seed, dtype=torch.float64)
    dk.accelerate(made, strict=True)
    with FlopCounterMode(display=False):
        made(x)
    assert len(calls) == 3


def test_deepcopy_of_a_declined_layer(x: Tensor, seed: int, calls: list[str]) -> None:
    """The copy of a hooked layer decides for itself: removing its hook fuses it again."""
    made = model("lora", seed, dtype=torch.float64)
    dk.accelerate(made, strict=True)
    handle = first(made).base_layer.register_forward_hook(lambda *_: None)
    copied = copy.deepcopy(made)
    handle.remove()
    expected = made(x)
    assert len(calls) == 3
    torch.testing.assert_close(copied(x), expected)
    assert len(calls) == 6  # of the hooked one the rank term alone
    assert [layer.state for layer in dk.accelerate(copied).layers] == ["rank term fused", "fused", "fused"]


@pytest.mark.parametrize(
    ("method", "name"),
    [("lora", "lora_A"), ("lora", "lora_B"), ("dora", "lora_dropout"), ("delora", "delora_dropout")],
)
def test_wrapped_dictionaries(method: str, name: str, x: Tensor, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Where PEFT keeps the parts of an adapter may itself be wrapped (by checkpointing policies, by
    FSDP).
    """

    def wrap(made: Any) -> None:
        setattr(first(made), name, checkpoint_wrapper.checkpoint_wrapper(getattr(first(made), name)))

    assert same_as_peft(method, wrap, x, seed, caplog) == [f"its {name} is kept in a CheckpointWrapper"]


FLAT: dict[str, tuple[str, Callable[[Any], tuple[Any, str]]]] = {
    "lora_B": ("lora", lambda layer: (layer.lora_B["default"], "weight")),
    "lora_A": ("dora", lambda layer: (layer.lora_A["default"], "weight")),
    "delora_A": ("delora", lambda layer: (layer.delora_A, "default")),
    "delora_B": ("delora", lambda layer: (layer.delora_B, "default")),
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_weights(name: str, seed: int) -> None:
    """A part of a flattened weight, which a shard leaves on this process, is no factor."""
    method, owner_of = FLAT[name]
    made = model(method, seed)
    owner, attribute = owner_of(first(made))
    setattr(owner, attribute, nn.Parameter(getattr(owner, attribute).detach().reshape(-1)[:7]))
    (declined,) = dk.accelerate(made).declined
    assert declined.reason == f"its {name} is 1-dimensional (sharded away)"
