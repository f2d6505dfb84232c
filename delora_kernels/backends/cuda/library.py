"""The shared library of the compiled kernels (csrc/), loaded on first use; what is wrong when it
can't be.

`python -m delora_kernels build-cuda` makes it: in the package, or where that can't be written to,
in the user's cache; DELORA_KERNELS_CUDA_LIBRARY names another. A failure is a `LibraryError` that
says what was found, what was expected and what to do, and never happens at import.
"""

import ctypes
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from delora_kernels.backends.cuda.build import LIBRARY, PACKAGE
from delora_kernels.version import __version__

ABI_VERSION = 4
"""DK_ABI_VERSION of csrc/delora_kernels.h."""

ENVIRONMENT_VARIABLE = "DELORA_KERNELS_CUDA_LIBRARY"

_BUILD = "python -m delora_kernels build-cuda"
_REBUILD = f"where nvcc is, {_BUILD}"
_ASKED = ("dk_build_info", "dk_on_host", "dk_error_string")


class LibraryError(RuntimeError):
    """The library can't be used here; the text has what was found, what was expected and the
    remedy.
    """

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"found {found}; expected {expected}; to do: {remedy}")


def path() -> Path:
    """Return where the library is, the newest if there are several, or where it would be made."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    return max(
        (file for file in _places() if file.is_file()), key=lambda file: file.stat().st_mtime, default=new_path()
    )


def new_path() -> Path:
    """Return where the library is to be made: the first of its places that can be written to."""
    return next((file for file in _places() if os.access(file.parent, os.W_OK)), _places()[-1])


def _places() -> tuple[Path, Path]:
    """Return the package's folder, and a folder of this version in the user's cache."""
    cache_folder = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME") or Path.home() / ".cache"
    return PACKAGE / LIBRARY, Path(cache_folder, "delora_kernels", __version__, LIBRARY)


@cache
def load(functions: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Return the library, once it is known to have our ABI version.

    Args:
        functions: Further names that it must have.

    Raises:
        LibraryError: there is none, or it can't be used.
    """
    file = path()
    if not file.is_file():
        if os.environ.get(ENVIRONMENT_VARIABLE):
            raise LibraryError(
                f"no file {file}", f"the library that {ENVIRONMENT_VARIABLE} names", "correct or unset it"
            )
        raise LibraryError("no compiled kernels", str(file), _REBUILD)
    try:
        library = ctypes.CDLL(str(file.resolve()))
    except OSError as error:
        raise LibraryError(f"{file}, which does not load ({error})", "a library for this platform", _REBUILD) from None
    version = library.dk_abi_version() if hasattr(library, "dk_abi_version") else None
    if version != ABI_VERSION:
        found = f"{file} of ABI version {version}" if version is not None else f"{file}, which has no dk_abi_version"
        raise LibraryError(found, f"ABI version {ABI_VERSION}, that of this delora_kernels", _REBUILD)
    missing = [name for name in (*_ASKED, *functions) if not hasattr(library, name)]
    if missing:
        raise LibraryError(f"{file} without {', '.join(missing)}", "a library of this very version", _REBUILD)
    library.dk_build_info.restype = ctypes.c_char_p
    return library


def build_info() -> str:
    """Return what the library was compiled by and for: "CUDA 13.0 for sm_75 sm_80 compute_80", or
    "host shim".
    """
    return str(load().dk_build_info().decode())


def why_not_here(functions: Iterable[str] = ()) -> str | None:
    """Why the library can't be used on this machine at all, or None; `functions` as in `load`."""
    gpu = torch.cuda.is_available() and torch.version.hip is None
    if not gpu and not path().is_file() and not os.environ.get(ENVIRONMENT_VARIABLE):
        return "there is no GPU, and there are no compiled kernels"
    try:
        library = load(tuple(functions))
    except LibraryError as error:
        return str(error)
    if library.dk_on_host():
        return None
    return why_not_driver(build_info(), driver()) if gpu else f"there is no GPU (the library loads: {build_info()})"


def driver() -> int | None:
    """Return the newest CUDA version that the driver serves, 12040 for 12.4; None where there is no
    telling.
    """
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)  # there is no public way
    return (ask() if ask is not None and torch.cuda.is_available() else 0) or None


def why_not_driver(info: str, version: int | None) -> str | None:
    """Why a driver for CUDA `version` does not serve a library of `info`, or None: it serves its
    whole major.

    Args:
        info: Of `build_info`.
        version: Of `driver`.
    """
    compiled = re.match(r"CUDA (\d+)", info)
    if version is None or compiled is None or version // 1000 >= int(compiled[1]):
        return None
    found = f"a driver for CUDA {version // 1000}.{version % 1000 // 10} and kernels compiled by {info}"
    remedy = f"update the driver, or with nvcc of CUDA {version // 1000} {_BUILD}"
    return str(LibraryError(found, f"a driver for CUDA {compiled[1]}.0 or newer", remedy))


def why_not_capability(info: str, capability: tuple[int, int]) -> str | None:
    """Why a library of `info` has no code for a GPU of this compute capability, or None.

    Machine code serves its own major version from its minor version on; PTX serves all that is
    newer.
    """
    major, minor = capability
    for kind, number in re.findall(r"\b(sm|compute)_(\d+)\b", info):
        of = divmod(int(number), 10)
        if of <= capability if kind == "compute" else of[0] == major and of[1] <= minor:
            return None
    found = f"a GPU of compute capability {major}.{minor} and kernels compiled by {info}"
    remedy = f"{_REBUILD} --arch {major}.{minor}"
    return str(LibraryError(found, f"kernels for sm_{major}{minor}", remedy))
