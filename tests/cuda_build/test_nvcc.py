"""The wheel with the CUDA kernels, compiled by the real nvcc (make test-cuda-build; minutes).

TORCH_CUDA_ARCH_LIST makes it shorter. The size of the library is printed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from package_source import build, copy_source

from delora_kernels.backends.cuda.build import LIBRARY

if os.environ.get("DELORA_KERNELS_CUDA") != "1":
    pytest.skip("compiles all kernels (make test-cuda-build)", allow_module_level=True)

KEPT = ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed that was built from the sdist."""
    folder = tmp_path_factory.mktemp("cuda")
    variables = {name: os.environ[name] for name in KEPT if name in os.environ}
    done = build(copy_source(folder), timeout=3600, DELORA_KERNELS_CUDA="1", **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "warning" not in [line for line in done.stderr.splitlines() if ".cu" in line]
    (wheel,) = (folder / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(folder / "installed"), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=600)
    library = folder / "installed/delora_kernels" / LIBRARY
    print(f"{library.name}: {library.stat().st_size / 1e6:.1f} MB, the wheel {wheel.stat().st_size / 1e6:.1f} MB")
    return folder / "installed"


def run(installed: Path, *arguments: str) -> str:
    """What a Python says that knows this package alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DELORA_KERNELS_")}
    command = [sys.executable, *arguments]
    environment |= {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=600, cwd=installed, env=environment
    ).stdout


def test_it_loads_and_a_launch_without_a_gpu_is_an_error_that_says_so(installed: Path) -> None:
    (line,) = [line for line in run(installed, "-m", "delora_kernels").splitlines() if line.startswith("backend cuda")]
    assert "there is no GPU (the library loads: CUDA " in line
    assert " for sm_" in line
    code = (
        "import torch; from delora_kernels.backends.cuda.kernels import scale_matrix\n"
        "try: scale_matrix(torch.ones(2, 3), torch.ones(3), False)\n"
        "except RuntimeError as error: print(error)"
    )
    said = run(installed, "-c", code)
    assert said.startswith("delora_kernels: the CUDA kernel scaled(float32[2, 3] strides [3, 1], float32[3]"), said
    assert "CUDA driver version" in said or "no CUDA-capable device" in said, said


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_it_shows_its_own_functions_alone(installed: Path) -> None:
    """The CUDA runtime inside must not meet the one that torch brings."""
    library = installed / "delora_kernels" / LIBRARY
    listed = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert names
    assert [name for name in names if not name.startswith("dk_")] == []
