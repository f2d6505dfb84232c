"""How many passes of fused layers a block of a test makes: the proof that a layer in the report
really runs fused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from delora_kernels.autograd import function


@contextmanager
def counted() -> Iterator[list[int]]:
    """A list that grows by one for each pass of a fused layer."""
    passes: list[int] = []
    run = function.run

    def counting(*arguments: Any) -> tuple[Tensor, ...]:
        passes.append(1)
        return run(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "run", counting)
        yield passes
