"""The cuda backend on CPU tensors: its kernels compiled by csrc/host_shim, which `make
test-cuda-host` does first.
"""

import ctypes
import os

import pytest

LIBRARY = os.environ.get("DELORA_KERNELS_CUDA_LIBRARY")

if LIBRARY is None:
    pytest.skip("needs the kernels compiled for the host (make test-cuda-host)", allow_module_level=True)

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


def shuffle_threads(seed: int, library: ctypes.CDLL | None = None) -> None:
    """Seed the order in which threads run."""
    from delora_kernels.backends.cuda import launch

    (library or launch.library()).dk_shim_seed(ctypes.c_uint64(seed))
