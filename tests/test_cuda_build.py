"""Compiling the kernels when the package is built: with nvcc, without it and with a broken one, which a script plays.

The real compiler's turn is `make test-cuda-build`.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from delora_kernels import __version__, cuda_library
from tests.fake_nvcc import FAILS, KNOWN, calls, toolkit
from tests.test_package import ROOT, built, source  # noqa: F401

sys.path.insert(0, str(ROOT / "csrc"))

import nvcc_build
from nvcc_build import BuildError, build_if_wanted, choose_targets, find_nvcc
