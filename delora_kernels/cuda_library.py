"""The shared library of the compiled kernels, loaded on first use."""

import ctypes
import os


def load() -> ctypes.CDLL:
    """The library."""
    return ctypes.CDLL(os.environ["DELORA_KERNELS_CUDA_LIBRARY"])
