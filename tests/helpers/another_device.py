"""A device that is not the CPU, for machines that have no other: its tensors are numbers on the CPU
in disguise.

`install` registers it as "other" for this process (PrivateUse1); inside `Other()` every op on its
tensors is checked as CUDA checks it (a CPU tensor beside them, but for 0-d ones and indices, is an
error) and run on what they hide. `check` does there, in a process of its own, what checks and
proofs do on a GPU: each function forward and backward, each op, and PEFT's GOAT, ETHER and
accelerated layers, made and trained there; or, for a backend with kernels, each op.
"""

import dataclasses
import importlib
import os
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from forked import context
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = "other:0"
HERE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this torch has what it takes."""

MAY_MIX = ("aten._to_copy.default", "aten.copy_.default", "aten.index.Tensor")
SQUEEZED = ("project_route", "expand_route_backward")
"""Ops whose formulas turn a tensor's shape in place (a vector times a matrix), which a disguise
can't follow.
"""


class Disguised(Tensor):
    """A tensor of the device; `raw` has its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "Disguised":
        made: Any = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The op on what its tensors hide."""
    tensors = [value for value in _leaves((*args, *kwargs.values())) if isinstance(value, Tensor)]
    there = any(isinstance(tensor, Disguised) for tensor in tensors)
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Disguised) and tensor.dim()]
    if there and strangers and str(op) not in MAY_MIX:
        raise RuntimeError(f"{op}: a tensor {list(strangers[0].shape)} is on the CPU, others are not")
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device).type == "other"
        kwargs = kwargs | {"device": torch.device("cpu") if there else device}
    result = op(*_revealed(args), **{name: _revealed(value) for name, value in kwargs.items()})
    if str(op).endswith("_.default") and isinstance(result, Tensor):
        return args[0]
    return _each(lambda value: Disguised(value) if isinstance(value, Tensor) else value, result) if there else result


def _leaves(values: Any) -> Iterator[Any]:
    """What an op's arguments hold, in lists too: all that a dispatcher knows, in a tenth of a
    pytree's time.
    """
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)([_each(change, one) for one in value])
    return change(value)


def _revealed(values: Any) -> Any:
    return _each(lambda value: value.raw if isinstance(value, Disguised) else value, values)


class Other(TorchDispatchMode):
    """Where the device exists: new tensors may be made on it."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that works on the CPU, at the CPU's speed: no new tensor is made on the device,
    though its tensors are still known.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def judge_outside() -> None:
    """Draw the numbers, run the reference and compare outside: half of the time of a proof."""
    from delora_kernels.testing import problem
    from delora_kernels.testing.draw import Draw
    from delora_kernels.testing.methods.method import Method

    for owner, name in ((Draw, "normal"), (Draw, "factors"), (Method, "oracle"), (problem, "relative_error")):
        setattr(owner, name, outside(getattr(owner, name)))


def install() -> None:
    """Register the device, and lead what does not come through the dispatcher to what does."""

    class Guard(backend_registration._DummyDeviceGuard):  # type: ignore[misc]
        def get_device(self) -> torch.device:
            return torch.device(DEVICE)

        def exchange_device(self, device: Any) -> torch.device:
            return torch.device(DEVICE)

        def get_stream(self, device: Any) -> Any:
            return torch._C.Stream(stream_id=0, device_index=0, device_type=20)

        def exchange_stream(self, stream: Any) -> Any:
            return stream

        def device_count(self) -> int:
            return 1

        get_default_stream, unchecked_set_device = get_stream, lambda self, *_: None

    backend_registration._setup_privateuseone_for_python_backend("other", device_guard=Guard())
    module: Any = torch.other  # type: ignore[attr-defined]
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    make, as_list, T = torch.tensor, Tensor.tolist, Tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = make(data, **options)
        return made if device is None else made.to(device)

    torch.tensor = tensor  # type: ignore[assignment]
    T.new_tensor = lambda self, data, dtype=None: tensor(data, dtype=dtype or self.dtype, device=self.device)  # type: ignore[assignment,misc]
    T.tolist = lambda self: as_list(_revealed(self))  # type: ignore[assignment,method-assign]


def put(module: nn.Module) -> nn.Module:
    """A module's own tensors on the device."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Disguised(parameter.detach()), parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = Disguised(buffer)
    return module


def bring_kernels(name: str) -> None:
    """Run the ops of a backend on disguised tensors, as far as its launches, and these on what they
    hide.
    """
    from delora_kernels import backends, ops

    package: Any = backends.load(name)
    launching = importlib.import_module(f"{package.__name__}.launch")
    there, real = run, launching.launch

    def launch(*args: Any, **kwargs: Any) -> None:
        strangers = [v for v in _leaves(args) if isinstance(v, Tensor) and not isinstance(v, Disguised)]
        if strangers:
            raise RuntimeError(f"a launch of {args[0]}: a tensor {list(strangers[0].shape)} is on the CPU")
        real(*_revealed(args), **kwargs)

    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if getattr(module, "launch", None) is real:
            module.launch = launch  # type: ignore[attr-defined]

    def run_op(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if op.namespace != ops.NAMESPACE or not any(isinstance(value, Disguised) for value in args):
            return there(op, args, kwargs)
        with Other():
            name = op._schema.name.split("::")[1]
            results = getattr(package, name)(*ops.packed(name, args[:-1]))
        for result in results if isinstance(results, tuple | list) else (results,):
            if not isinstance(result, Disguised):
                raise RuntimeError(f"{op}: a result {list(result.shape)} is on the CPU")
        return results

    globals()["run"] = run_op


def functions() -> None:
    from delora_kernels.diagnostics import proof
    from delora_kernels.functional import CALLS

    for function in CALLS:
        for both in (False, True):
            drops = both and not function.startswith("ether")
            case = proof.Case("eager", function, drops, both, torch.bfloat16, torch.float32, False, 16, DEVICE)
            assert (reason := proof.prove(case)) is None, (case, reason)


def ops(seed: int, backend: str) -> None:
    from delora_kernels.testing import OPS, failures, measure_dropout_mask, op_problems

    dtypes: Any = {"dtype": torch.bfloat16, "rank_dtype": torch.float32}
    for name in OPS:
        for problem in op_problems(name, 40, 24, 32, 5, backend=backend, device=DEVICE, seed=seed, **dtypes):
            if name in SQUEEZED:
                problem.run(problem.inputs)
            else:
                judged = dataclasses.replace(problem, oracle=outside(problem.oracle))
                assert failures(judged, poison=False) == []
    assert all(m.ok for m in measure_dropout_mask(61, 103, backend=backend, device=DEVICE, seed=seed))


def layers(seed: int) -> None:
    """Models of GOAT and ETHER, moved there and made there: y and every gradient are those of the
    CPU.
    """
    import ether_models
    import goat_models
    import peft
    import peft_models

    import delora_kernels as dk
    from delora_kernels.integrations.peft.methods import adapted_base

    def small() -> nn.Module:
        return goat_models.small(seed, torch.float32)

    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed))
    made = {f"goat {kind}": goat_models.model(small(), **options) for kind, options in goat_models.KINDS.items()}
    kinds = [kind for kind in ether_models.KINDS if "official" not in kind]  # it reads W, and looks at its class
    made |= {kind: ether_models.model(small(), kind) for kind in kinds}
    made |= {method: peft_models.model(method, seed) for method in ("lora", "dora", "delora")}
    for name, model in made.items():
        expected = _step(model.eval(), x)
        model.zero_grad(set_to_none=True)
        for key, result in _step(put(model), Disguised(x)).items():
            assert isinstance(result, Disguised), (name, key)
            size = 1e-4 * float(expected[key].abs().max())
            assert torch.allclose(result.raw, expected[key], rtol=1e-3, atol=size), (name, key)
        if name.startswith("goat"):
            assert "first" in str(dk.expert_report(model))
    adapted_base.is_float = lambda weight: True  # a tensor of another device is no quantised one
    configs: list[Any] = [goat_models.config(**options, dropout=0.2) for options in goat_models.KINDS.values()]
    for config in configs + [ether_models.config(kind) for kind in kinds]:
        model = peft.get_peft_model(put(small()), config)
        assert {value.device for value in (*model.parameters(), *model.buffers())} == {torch.device(DEVICE)}
        _step(model.train(), Disguised(x))


def _step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    y.square().sum().backward()
    gradients = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | gradients


def check(seed: int, backend: str = "eager") -> None:
    """Check all of it in a process of its own: a registered device is one that Transformers would
    find. That of the eager backend has PEFT, which takes seconds to import; kernels need neither
    PEFT nor, under sanitizers, a fork.
    """
    if backend == "eager":
        with context().Pool(1) as pool:
            pool.apply_async(everything, (seed, backend)).get(timeout=500)
        return
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, str(seed), backend]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=500)
    assert done.returncode == 0, done.stderr


def everything(seed: int, backend: str) -> None:
    """Make this process one that has the device, and check a backend there."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    install()
    judge_outside()
    if backend == "eager":
        with Other():
            functions()
            layers(seed)
    else:
        bring_kernels(backend)
    with Other():
        ops(seed, backend)


if __name__ == "__main__":
    everything(int(sys.argv[1]), sys.argv[2])
