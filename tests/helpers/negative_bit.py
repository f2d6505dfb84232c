"""Tensors with torch's negative bit, as `z.conj().imag` has it: in memory are the numbers with the
other sign, which whoever reads memory must know.
"""

import torch
from torch import Tensor

from delora_kernels import use_backend
from delora_kernels.testing import METHODS

NAMES = list({method.function: name for name, method in reversed(METHODS.items())}.values())
"""A method for each function."""
PLANNED = 4
"""Calls after which one is planned, where a backend's calls are."""


def negated(tensor: Tensor) -> Tensor:
    """The same numbers, with the bit."""
    made = torch._neg_view(-tensor)
    assert made.is_neg()
    return made


def check_negative_bit(name: str, backend: str, seed: int) -> None:
    """A method gives the same numbers for tensors with the bit: for dy alone, for each other one
    alone, planned or not.
    """
    method = METHODS[name]
    drawn = method.draw(7, 24, 20, 4, dtype=torch.float32, seed=seed)
    names = [key for key, value in drawn.items() if isinstance(value, Tensor) and value.is_floating_point()]
    with use_backend(backend):
        expected = [method.fused(drawn) for _ in range(PLANNED)][-1]
        for changed in names:
            found = method.fused(drawn | {changed: negated(drawn[changed])})
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()), msg=key)
