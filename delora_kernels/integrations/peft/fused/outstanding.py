"""Which forward passes can still be run again, by checkpointing.

A forward pass with gradients leaves a mark on its node of the autograd graph: it is over when the
node is gone, or when its backward pass has been and did not keep the graph. A forward pass without
gradients leaves nothing; in training it may be that of reentrant checkpointing, and is over when
it has been run again, in a backward pass.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import _C, Tensor, nn

_MARK = "delora_kernels.outstanding"


class _Mark:
    """Lives as long as the node it was left on."""


class Outstanding:
    """Forward passes of some layers, until they are over."""

    def __init__(self) -> None:
        self._marks: weakref.WeakSet[_Mark] = weakref.WeakSet()
        self._without_grad: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def is_over(self) -> bool:
        """Whether none of them can be run again."""
        return not self._marks and not self._without_grad

    def add(self, layer: nn.Module, y: Tensor) -> None:
        """Count a call of `layer` that gave y in, or in a backward pass, out."""
        if in_backward():
            if y.requires_grad:
                self._count(layer, -1)
        elif not torch.is_grad_enabled():
            if layer.training:  # else nobody checkpoints it
                self._count(layer, 1)
        elif y.grad_fn is not None:
            mark = _Mark()
            self._marks.add(mark)
            metadata: Any = y.grad_fn.metadata
            metadata[_MARK] = mark
            y.grad_fn.register_hook(self._on_backward(weakref.ref(mark)))

    def forget(self, layers: Iterable[nn.Module]) -> None:
        """Leave out what was counted of layers whose calls are not counted any more."""
        for layer in layers:
            self._without_grad.pop(layer, None)

    def _count(self, layer: nn.Module, more: int) -> None:
        count = self._without_grad.get(layer, 0) + more
        if count > 0:
            self._without_grad[layer] = count
        else:
            self._without_grad.pop(layer, None)

    def _on_backward(self, mark: Any) -> Any:
        def done(*_: Any) -> None:
            found = mark()
            if found is not None and not _C._autograd._get_current_graph_task_keep_graph():
                self._marks.discard(found)
                self._without_grad.clear()

        return done


def in_backward() -> bool:
    """Whether this thread is in a backward pass: what runs forward here is run again."""
    return _C._current_graph_task_id() != -1
