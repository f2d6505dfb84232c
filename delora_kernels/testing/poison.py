"""Memory that shows when it was never written."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic


@contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """Fill every tensor that is allocated without values with NaN inside the block (integers: their
    largest value).

    An output element that a kernel forgets to write then reads as NaN, not as whatever the memory
    held. It is the fill of PyTorch's deterministic mode: process-wide, on every device and thread,
    backward passes included. Operations without a deterministic form run as usual.
    """
    memory: Any = deterministic
    filled, mode = memory.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.set_deterministic_debug_mode(max(mode, 1))  # use_deterministic_algorithms imports the whole compiler
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = filled
            torch.set_deterministic_debug_mode(mode)
