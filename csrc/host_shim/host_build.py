"""Compile the kernels of csrc/ for the CPU, with the host shim in the place of CUDA; prints the library's path.

    python csrc/host_shim/host_build.py [--sanitize]

Object files are kept under build/host_shim by a hash of what they are made of: only what changed is compiled again.
"""

import argparse
import hashlib
import os
import platform
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
    """The path of the library, compiled where it is not there yet.

    Args:
        sanitize: With AddressSanitizer and UndefinedBehaviorSanitizer; the process must preload libasan.
        replaced: File name of a .cu file → the text that is compiled in its place.

    Raises:
        RuntimeError: there is no compiler, or it fails; the text has its messages.
    """
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"compiling csrc/ for the host needs a C++ compiler: no {COMPILER} here (CXX names another)")
    BUILD.mkdir(parents=True, exist_ok=True)
    flags = FLAGS + (SANITIZE if sanitize else [])
    texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(SOURCES.glob("*.cu"))} | (replaced or {})
    scheduler = SOURCES / "host_shim/scheduler.cpp"
    texts[scheduler.name] = scheduler.read_text(encoding="utf-8")
    headers = [*SOURCES.glob("*.*h"), *SOURCES.glob("host_shim/*.h"), *SOURCES.glob("host_shim/include/*")]
    common = "\0".join([COMPILER, *flags, *(file.read_text(encoding="utf-8") for file in sorted(headers))])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda item: _compile(*item, common, flags), texts.items()))
    library = BUILD / f"libdelora_kernels-{_hash(*(path.name for path in objects))}.so"
    if not library.exists():
        _run([COMPILER, "-shared", *flags, *map(str, objects)], library)
    return library


def _compile(name: str, text: str, common: str, flags: list[str]) -> Path:
    target = BUILD / f"{Path(name).stem}-{_hash(common, name, text)}.o"
    if not target.exists():
        includes = ["-I", str(SOURCES / "host_shim/include"), "-I", str(SOURCES), "-I", str(SOURCES / "host_shim")]
        _run([COMPILER, *flags, *includes, "-x", "c++", "-c", "-"], target, text)
    return target


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
