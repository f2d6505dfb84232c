"""What compare() runs: one model on one batch, forward and backward, with everything put back."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from delora_kernels import checks


class Problem:
    """A model and a batch.

    Args:
        model, batch, loss: As compare() takes them.

    Attributes:
        model: The module that runs.
        device: Where its first parameter is.
        tokens: Token ids in the batch, or None.

    Raises:
        TypeError, ValueError: as compare() says.
    """

    def __init__(self, model: Any, batch: Any, loss: Callable[[Any], Tensor] | None) -> None:
        if not isinstance(model, nn.Module):
            raise checks.fail(TypeError, "compare", "model", "a PEFT model", type(model).__name__, "pass the module")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if not layers:
            got, remedy = f"a {type(model).__name__} without any", "wrap it with peft.get_peft_model first"
            raise checks.fail(ValueError, "compare", "model", "one with PEFT adapter layers", got, remedy)
        off = sum(bool(layer.merged_adapters) or bool(layer.disable_adapters) for layer in layers)
        if off:
            got, remedy = f"{off} of {len(layers)} layers merged or disabled", "unmerge or enable them first"
            raise checks.fail(ValueError, "compare", "model", "one whose adapters run", got, remedy)
        if not isinstance(batch, Tensor | Mapping):
            expected = "a mapping of keyword arguments, or a tensor"
            got, remedy = type(batch).__name__, "pass what the model is called with"
            raise checks.fail(TypeError, "compare", "batch", expected, got, remedy)
        if loss is not None and not callable(loss):
            raise checks.fail(
                TypeError, "compare", "loss", "a function of the output, or None", type(loss).__name__, "pass one"
            )
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            raise checks.fail(
                RuntimeError, "compare", "gradients", "on", "no_grad or inference_mode", "call it outside of these"
            )
        self.model, self.batch, self._loss = model, batch, loss
        self.device = next(model.parameters()).device
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        self.tokens = ids.numel() if isinstance(ids, Tensor) else None
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            remedy = "load the adapter with is_trainable=True, or choose it by set_adapter"
            raise checks.fail(ValueError, "compare", "model", "one that trains", "no parameter that does", remedy)
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self._parameters.values()):
            got, remedy = "hooks on accumulated gradients", "take away what steps the optimizer in backward passes"
            raise checks.fail(ValueError, "compare", "model", "one that only computes gradients", got, remedy)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Leave gradients, buffers and random states as they are now."""
        gradients: dict[Tensor, Tensor | None] = {p: p.grad for p in self.model.parameters()}
        given = [value for value in self._tensors() if value.requires_grad]
        gradients |= {value: value.grad for value in given}
        held = [(module, dict(module._buffers)) for module in self.model.modules()]
        # a copy on the CPU, one by one: the model may fill its device
        buffers = {buffer: buffer.detach().cpu().clone() for buffer in self.model.buffers()}
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        state = random.getstate()
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            random.setstate(state)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for module, before in held:  # a forward pass may have put another tensor in a buffer's place
                module._buffers.clear()
                module._buffers.update(before)
            with torch.no_grad():
                for buffer, value in buffers.items():
                    if not _same_bits(buffer.detach().cpu(), value):
                        buffer.copy_(value)

    def reset(self) -> None:
        """Take gradients away, and begin at the same random state."""
        for parameter in self.model.parameters():
            parameter.grad = None
        random.seed(0)
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)

    def run(self) -> None:
        """Run one pass."""
        self.reset()
        self.forward_backward()

    def forward_backward(self) -> Any:
        """Run forward and backward → loss, output."""
        with self._inputs_that_need_a_gradient():
            output = self.model(**self.batch) if isinstance(self.batch, Mapping) else self.model(self.batch)
        loss = self._scalar(output)
        if not loss.requires_grad:
            got, remedy = "a constant", "let the loss depend on the model's output"
            raise checks.fail(ValueError, "compare", "the loss", "one with a gradient", got, remedy)
        loss.backward()
        return loss.detach(), output

    def _tensors(self) -> list[Tensor]:
        """Return the tensors of the batch."""
        values = self.batch.values() if isinstance(self.batch, Mapping) else [self.batch]
        return [value for value in values if isinstance(value, Tensor)]

    def results(self) -> dict[str, Tensor]:
        """Run one pass → the loss, the output if it is a tensor or has logits, every
        gradient.
        """
        self.reset()
        loss, output = self.forward_backward()
        found = {"loss": loss}
        logits = output if isinstance(output, Tensor) else _part(output, "logits", None)
        if isinstance(logits, Tensor) and logits.dim() > 0:
            found["output"] = logits.detach().cpu()
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad.detach().cpu()
        return found

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Switch every dropout module off."""
        training = {m: m.training for m in self.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)}
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module, value in training.items():
                module.training = value

    def in_words(self) -> str:
        """Describe the model and the batch."""
        layers: Any = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        bare = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in self.model.parameters())
        ranks = Counter(rank for layer in layers for rank in getattr(layer, "r", {}).values())
        words = [type(bare).__name__, f"{len(layers)} adapter layers"]
        words += [f"r={', '.join(map(str, sorted(ranks)))}"] if ranks else []
        ids = self.batch.get("input_ids") if isinstance(self.batch, Mapping) else self.batch
        words += [f"batch {list(ids.shape)}"] if isinstance(ids, Tensor) else []
        words.append(" and ".join(name for name, _ in dtypes.most_common()))
        if torch.is_autocast_enabled(self.device.type):
            words.append(f"autocast {str(torch.get_autocast_dtype(self.device.type)).removeprefix('torch.')}")
        return ", ".join(words)

    def _scalar(self, output: Any) -> Tensor:
        value = self._loss(output) if self._loss is not None else _part(output, "loss", output)
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.reshape(())
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        remedy = "put labels into the batch, or pass loss=lambda output: a scalar"
        raise checks.fail(ValueError, "compare", "the model's output", "a scalar, or hold a loss", got, remedy)

    @contextmanager
    def _inputs_that_need_a_gradient(self) -> Iterator[None]:
        """Where the model has no adapters to train, let the gradient go back to the first of their
        layers, as it does with them.
        """
        layers = _adapter_layers(self.model)
        frozen = all(getattr(layer, "_disable_adapters", True) for layer in layers)
        with ExitStack() as stack:
            for layer in layers if frozen else ():
                stack.callback(layer.register_forward_hook(_needs_gradient).remove)
            yield


def _part(output: Any, name: str, default: Any) -> Any:
    """Return what a model's output holds under a name, as a key or an attribute."""
    return output.get(name, default) if isinstance(output, Mapping) else getattr(output, name, default)


def _adapter_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _needs_gradient(module: nn.Module, inputs: Any, output: Any) -> Any:
    if not isinstance(output, Tensor) or output.requires_grad or not output.is_floating_point():
        return output
    return output.detach().requires_grad_()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(one, other)
