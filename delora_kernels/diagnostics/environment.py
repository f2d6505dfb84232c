"""What is installed, which devices there are, and which backends run here or why not: the head of
every bug report.
"""

import os
import platform
from typing import Any

import torch

from delora_kernels import backends, dispatch
from delora_kernels.backends.cuda import library as cuda_library
from delora_kernels.diagnostics import versions
from delora_kernels.version import __version__

_SUPPORTED = ("python", "torch", "triton", "peft", "transformers")
_VARIABLES = (dispatch.ENVIRONMENT_VARIABLE, cuda_library.ENVIRONMENT_VARIABLE, "TRITON_INTERPRET")


def environment() -> dict[str, Any]:
    """Describe where this runs; nothing is imported for it, and a CUDA device is only asked for its
    properties.

    Returns:
        `delora_kernels`, `python`, `platform`; the version or None of `torch`, `triton`, `peft`,
        `transformers`, `numpy`; `support`, where each version lies in the supported range; `cuda`
        {`runtime`, `driver`} or None; `devices`, each {`device`, `name`} and on a GPU `capability`
        and `memory_gib`; `backends` name → None if it can run, else why not; `variables`, those of
        the environment that change what runs.
    """
    found = {name: versions.installed(name) for name in _SUPPORTED} | {"torch": torch.__version__}
    return {
        "delora_kernels": __version__,
        **found,
        "numpy": versions.version_of("numpy"),
        "support": {name: versions.status(name, version) for name, version in found.items()},
        "platform": platform.platform(),
        "cuda": _cuda(),
        "devices": _devices(),
        "backends": unavailable_backends(),
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
    }


def unavailable_backends() -> dict[str, str | None]:
    """Return each backend's name → None if it can run here, else why not."""
    return {name: backends.unavailable(name) for name in backends.NAMES}


def as_text(report: dict[str, Any]) -> str:
    """Return the report of `environment` for people: one fact a line."""
    cuda = report["cuda"]
    lines = [("delora_kernels", report["delora_kernels"])]
    lines += [(name, versions.describe(name, report[name])) for name in _SUPPORTED]
    lines += [("numpy", report["numpy"] or "not installed"), ("platform", report["platform"])]
    lines += [("CUDA", f"runtime {cuda['runtime']}, driver for {cuda['driver'] or 'unknown'}" if cuda else "none")]
    for device in report["devices"]:
        details = [device["name"]]
        if "capability" in device:
            details += [f"compute capability {device['capability']}", f"{device['memory_gib']} GiB"]
        lines.append((f"device {device['device']}", ", ".join(details)))
    lines += [(f"backend {name}", f"no: {why}" if why else "can run") for name, why in report["backends"].items()]
    lines += [(name, _setting(name, value)) for name, value in report["variables"].items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _setting(name: str, value: str | None) -> str:
    """Return a variable of the environment; a backend that does not exist is named as such."""
    if name == dispatch.ENVIRONMENT_VARIABLE and value and value not in backends.NAMES:
        return f"{value}: no such backend, every call will raise; must be one of {', '.join(backends.NAMES)}"
    return value or "not set"


def _cuda() -> dict[str, str | None] | None:
    """CUDA's runtime that torch was built with, and the newest CUDA version that the driver
    serves.
    """
    if torch.version.cuda is None:
        return None
    driver = cuda_library.driver()
    return {"runtime": torch.version.cuda, "driver": f"{driver // 1000}.{driver % 1000 // 10}" if driver else None}


def _devices() -> list[dict[str, Any]]:
    cpu = {"device": "cpu", "name": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability, memory = f"{properties.major}.{properties.minor}", round(properties.total_memory / 2**30, 1)
        gpus.append(
            {"device": f"cuda:{index}", "name": properties.name, "capability": capability, "memory_gib": memory}
        )
    return [cpu, *gpus]


def processor() -> str:
    """Return the processor's name as Linux gives it, else as Python does."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
