"""Padding: which tokens of a forward pass are padding, told to the GOAT layers of a model by hooks
on it.

The hooks read the keyword argument `attention_mask` where it is [batch, sequence] of bool or
integers, and the model one of Transformers with a single sequence of tokens: beside an encoder, or
beside images, a layer's input may have the mask's shape without being what the mask is about. A
layer takes the mask if it has the shape of its input's tokens.

Checkpointing runs layers again in backward, when the model has forgotten its mask: the first
gradient that reaches an output brings it back until backward ends. (Of several passes in one
backward, autograd finishes the later one first.)
"""

from typing import Any

import torch
from torch import Tensor, nn


class Padding:
    """What the hooks on one model tell its layers; `mask` [batch, sequence] is the pass's that
    runs, or runs again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._one_sequence = _has_one_sequence(getattr(model, "config", None))
        self._passes: list[Tensor | None] = []
        self._again: Tensor | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def mask(self) -> Tensor | None:
        """The tokens that count, bool; None: all, or not known."""
        return self._passes[-1] if self._passes else self._again

    def forget(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("attention_mask") if self._one_sequence else None
        if isinstance(given, Tensor) and given.dim() == 2 and not given.is_floating_point():
            self._passes.append(given.ne(0))
        else:
            self._passes.append(None)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mask = self._passes.pop()
        if mask is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return  # a compiled graph recomputes by itself

        def run_again(_: Tensor) -> None:
            self._again = mask
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(run_again)

    def _end(self) -> None:
        self._again = None


def _has_one_sequence(config: Any) -> bool:
    """Whether all that a model of this configuration computes is about one sequence of tokens."""
    text = getattr(config, "get_text_config", lambda: None)()
    return text is not None and text is config and not getattr(config, "is_encoder_decoder", False)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
