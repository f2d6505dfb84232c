"""Building the package from a copy of the repository, as a stranger would, without a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IN_SDIST = ("delora_kernels", "tests", "benchmarks", "docs", "csrc", "examples")
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.egg-info", ".*")


def copy_source(folder: Path, names: tuple[str, ...] = IN_SDIST) -> Path:
    """Copy the repository's files and these folders of it to `folder`/source."""
    source = folder / "source"
    source.mkdir()
    for name in names:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, ignore=NOT_SOURCE)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, source / file.name)
    return source


def build(source: Path, *arguments: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m build` to `source`/../dist, with these environment variables.

    Args:
        source: Of `copy_source`.
        *arguments: `--wheel`: no sdist; else the wheel is made from the sdist.
        timeout: Seconds.
        **variables: DELORA_KERNELS_CUDA, CUDA_HOME ...; what else says how kernels are compiled is
            not set.
    """
    command = [sys.executable, "-m", "build", "--no-isolation", *arguments]
    command += ["--outdir", str(source.parent / "dist"), str(source)]
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_NVCC}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=inherited | variables)


_OF_NVCC = ("DELORA_KERNELS_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
