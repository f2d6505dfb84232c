"""What a measurement ran on: the facts that every benchmark record carries."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from delora_kernels.diagnostics import versions
from delora_kernels.diagnostics.environment import processor


def machine_info(device: str | torch.device | None = None) -> dict[str, str | int | None]:
    """Describe the machine, the versions and the commit of this measurement.

    Args:
        device: where the measurement runs; None: the first CUDA device if there is one, else the
            CPU.

    Returns:
        `device`, `cpu`, `cores`, `threads`, `omp_wait_policy`, `driver`, `clocks`, `cuda`,
        `python`, `torch`, `triton`, `peft`, `transformers`, `numpy` and `commit`; None for what is
        not there.
    """
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = where.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(where) if on_gpu else where.type,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        if on_gpu
        else None,
        "clocks": _first_line(["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader"])
        if on_gpu
        else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": versions.installed("triton"),
        "peft": versions.installed("peft"),
        "transformers": versions.installed("transformers"),
        "numpy": versions.version_of("numpy"),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit of this source tree, with `-dirty` if a file differs from it; None outside
    git.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commit = _first_line([*git, "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return None
    return f"{commit}-dirty" if _first_line([*git, "status", "--porcelain"]) else commit


def _first_line(command: list[str]) -> str | None:
    """Return the first line that `command` prints; None if it fails, is missing or prints
    nothing.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if lines else None
