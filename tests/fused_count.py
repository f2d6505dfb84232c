"""How many passes of fused layers a block of a test makes: the proof that a layer in the report really runs fused."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from delora_kernels import adapted_linear
from delora_kernels.call import Call


@contextmanager
def counted() -> Iterator[list[int]]:
    """A list that grows by one for each pass of a fused layer."""
    passes: list[int] = []
    run = adapted_linear.run

    def counting(call: Call) -> Tensor:
        passes.append(1)
        return run(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapted_linear, "run", counting)
        yield passes
