"""Compile the kernels of csrc/ for the CPU, with the host shim in the place of CUDA; prints the
library's path.

    python csrc/host_shim/host_build.py [--sanitize]

Object files are kept under build/host_shim by a hash of what they are made of: only what changed is
compiled again.
"""

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1]
BUILD = SOURCES.parent / "build/host_shim"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-mavx2", "-mfma", "-mf16c"] if platform.machine() == "x86_64" else []
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def build(sanitize: bool = False, replaced: dict[str, str] | None = None) -> Path:
    """Return the path of the library, compiled where it is not there yet.

    Args:
        sanitize: With AddressSanitizer and UndefinedBehaviorSanitizer; the process must preload
            libasan.
        replaced: File name of a file of csrc/ → the text that is compiled in its place.

    Raises:
        RuntimeError: there is no compiler, or it fails; the text has its messages.
    """
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"compiling csrc/ for the host needs a C++ compiler: no {COMPILER} here (CXX names another)")
    BUILD.mkdir(parents=True, exist_ok=True)
    flags = FLAGS + (SANITIZE if sanitize else [])
    sources, headers = _texts("*.cu"), _texts("*.*h")
    folder = SOURCES
    for name, text in (replaced or {}).items():
        (sources if name in sources else headers)[name] = text
    if headers.keys() & (replaced or {}).keys():  # all of them, because a header finds another beside itself
        folder = BUILD / f"headers-{_hash(*headers.values())}"
        folder.mkdir(exist_ok=True)
        for name, text in headers.items():
            (folder / name).write_text(text, encoding="utf-8")
    headers |= _texts("host_shim/*.h") | _texts("host_shim/include/*")
    sources |= _texts("host_shim/scheduler.cpp")
    includes = [f"-I{path}" for path in (SOURCES / "host_shim/include", folder, SOURCES / "host_shim")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda item: _compile(*item, headers, flags, includes), sources.items()))
    library = BUILD / f"libdelora_kernels-{_hash(*(path.name for path in objects))}.so"
    if not library.exists():
        _run([COMPILER, "-shared", *flags, *map(str, objects)], library)
    return library


def _texts(pattern: str) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(SOURCES.glob(pattern))}


def _compile(name: str, text: str, headers: dict[str, str], flags: list[str], includes: list[str]) -> Path:
    target = BUILD / f"{Path(name).stem}-{_hash(COMPILER, *flags, name, text, *_included(text, headers))}.o"
    if not target.exists():
        _run([COMPILER, *flags, *includes, "-x", "c++", "-c", "-"], target, text)
    return target


def _included(text: str, headers: dict[str, str]) -> list[str]:
    """Return the texts of the headers that a text includes, those that they include as well."""
    found: dict[str, str] = {}
    waiting = [text]
    while waiting:
        names = (Path(name).name for name in re.findall(r'^#include ["<](.+)[">]', waiting.pop(), re.MULTILINE))
        new = {name: headers[name] for name in names if name in headers and name not in found}
        found |= new
        waiting += new.values()
    return [found[name] for name in sorted(found)]


def _run(command: list[str], target: Path, text: str = "") -> None:
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    done = subprocess.run([*command, "-o", str(partial)], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.replace(target)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    try:
        print(build(parser.parse_args().sanitize))
    except RuntimeError as error:
        sys.exit(str(error))
