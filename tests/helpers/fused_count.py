"""How many passes of fused layers a block of a test makes: the proof that a layer in the report
really runs fused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from delora_kernels.autograd import function
from delora_kernels.functional import straight
from delora_kernels.integrations.peft.fused import in_torch, plan


@contextmanager
def counted() -> Iterator[list[int]]:
    """A list that grows by one for each pass of a fused layer, alone or with its siblings."""
    passes: list[int] = []
    run, shared = function.run, straight.shared_direct

    def counting(*arguments: Any) -> tuple[Tensor, ...]:
        passes.append(1)
        return run(*arguments)

    def counting_all(calls: Any) -> tuple[Tensor, ...]:
        passes.extend([1] * len(calls))
        return shared(calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "run", counting)
        patch.setattr(straight, "shared_direct", counting_all)
        patch.setattr(in_torch, "run_fused", lambda of, x: passes.append(1) or of(x))
        one_by_one = plan.run_one_by_one
        patch.setattr(plan, "run_one_by_one", lambda *arguments: passes.append(1) or one_by_one(*arguments))
        yield passes
