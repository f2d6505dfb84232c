"""Compile the kernels of this folder into one shared library with nvcc: no PyTorch and no Python inside.

    python csrc/nvcc_build.py [FILE]        default: into the package, where cuda/library.py looks

setup.py does the same for a wheel. What it reads from the environment:

DELORA_KERNELS_CUDA    0: no library; 1: no library is an error; else a library where nvcc makes one
CUDA_HOME, CUDA_PATH   the toolkit; else the nvcc on PATH, else /usr/local/cuda
TORCH_CUDA_ARCH_LIST   architectures as PyTorch writes them, "8.0 9.0+PTX"; else those of ARCHITECTURES that nvcc knows
MAX_JOBS               files compiled at a time; else the number of cores
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY = "delora_kernels_cuda.dll" if os.name == "nt" else "libdelora_kernels_cuda.so"

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
"""Compiled for where nothing else is asked; the newest that nvcc knows as PTX too, for cards still to come."""

_NAMED = {"turing": "7.5", "ampere": "8.0 8.6", "ada": "8.9", "hopper": "9.0", "blackwell": "10.0 10.3 12.0 12.1"}
FLAGS = ["-O3", "-std=c++17", "-Xfatbin=-compress-all"]  # a third of the size; the driver unpacks what it loads
FLAGS += [] if os.name == "nt" else ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
LINK = ["-shared", "--cudart=static"]  # a torch in the process brings a runtime of its own: the two must not meet
LINK += [] if os.name == "nt" else ["-Xlinker=--exclude-libs=ALL", "-Xlinker=-zdefs"]


class BuildError(RuntimeError):
    """Why there is no library, in one line; `details`: all that the compiler said."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


def build_if_wanted(target: Path, environment: Mapping[str, str], say: Callable[[str], None]) -> bool:
    """Compile `target` as DELORA_KERNELS_CUDA has it; whether it is there now.

    Args:
        target: The library's path. An old file there is removed.
        environment: os.environ.
        say: Prints a line.

    Raises:
        BuildError: it is not there, and the environment says that this is an error.
        ValueError: the environment says neither 0 nor 1.
    """
    wanted = environment.get("DELORA_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"DELORA_KERNELS_CUDA must be 0, 1 or not set, got {wanted!r}")
    target.unlink(missing_ok=True)
    if wanted == "0":
        say("delora-kernels: without compiled CUDA kernels, as DELORA_KERNELS_CUDA=0 asks")
        return False
    try:
        build(target, environment, say)
    except BuildError as error:
        if wanted == "1":
            say(error.details)
            raise
        say(f"delora-kernels: without compiled CUDA kernels: {error} (DELORA_KERNELS_CUDA=1 makes this an error)")
    return target.exists()


def build(target: Path, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Compile `target`.

    Raises:
        BuildError: it can't be compiled.
    """
    nvcc = find_nvcc(environment)
    known = re.findall(r"compute_(\d+)", _run([nvcc, "--list-gpu-arch"]))
    targets = choose_targets(known, environment.get("TORCH_CUDA_ARCH_LIST", ""))
    generate, names = [_flag(name) for name in targets], " ".join(targets)
    files = sorted(SOURCES.glob("*.cu"), key=lambda file: -file.stat().st_size)  # the longest first: shorter in all
    jobs = _jobs(environment)
    threads = max(1, jobs // len(files))
    say(f"delora-kernels: compiling {len(files)} files of CUDA kernels for {names}, {min(jobs, len(files))} at a time")
    common = [nvcc, *FLAGS, *generate, f"--threads={threads}", f'-DDK_ARCHITECTURES="{names}"']
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(jobs, len(files))) as pool:
        objects = [str(Path(folder, f"{file.stem}.o")) for file in files]
        commands = [[*common, "-c", str(file), "-o", made] for file, made in zip(files, objects, strict=True)]
        for done, file in enumerate(pool.map(_compile, commands, files), start=1):
            say(f"  {done}/{len(files)} {file.name}")
        whole = Path(folder, LIBRARY)
        _run([nvcc, *LINK, *generate, *objects, "-o", str(whole)])
        if not whole.is_file():
            raise BuildError(f"{nvcc} ended well but wrote no library")
        shutil.copy(whole, target)


def find_nvcc(environment: Mapping[str, str]) -> str:
    """The path of nvcc.

    Raises:
        BuildError: there is none.
    """
    name = "nvcc.exe" if os.name == "nt" else "nvcc"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            path = Path(environment[variable], "bin", name)
            if not path.is_file():
                raise BuildError(f"{variable} is {environment[variable]}, but there is no {path}")
            return str(path)
    found = shutil.which("nvcc", path=environment.get("PATH", "")) or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise BuildError("nvcc is not on PATH nor in /usr/local/cuda (CUDA_HOME names a toolkit elsewhere)")
    return found


def choose_targets(known: Sequence[str], asked: str = "") -> list[str]:
    """What to compile for: `sm_80` is machine code, `compute_80` PTX.

    Args:
        known: The architectures that nvcc knows: "75", "80", ...
        asked: TORCH_CUDA_ARCH_LIST; "+PTX" adds PTX. Architectures that nvcc or the kernels do not know are left out.

    Raises:
        BuildError: nothing is left, or `asked` can't be read.
    """
    if not asked.strip():
        numbers = [number for number in ARCHITECTURES if number in known]
        names = [f"sm_{number}" for number in numbers] + [f"compute_{number}" for number in numbers[-1:]]
    else:
        names = []
        for word in asked.replace(";", " ").split():
            name, plus, _ = word.partition("+")
            for version in _NAMED.get(name.lower(), name).split():
                number, suffix = _number(version, asked)
                if number in known and int(number) >= int(ARCHITECTURES[0]):
                    names += [f"sm_{number}{suffix}"] + ([f"compute_{number}{suffix}"] if plus else [])
    if not names:
        wanted = asked.strip() or " ".join(ARCHITECTURES)
        raise BuildError(f"nvcc knows {' '.join(known) or 'no architecture'}, none of those to compile for ({wanted})")
    return list(dict.fromkeys(names))


def _flag(name: str) -> str:
    """nvcc's option for one of `choose_targets`."""
    return f"--generate-code=arch=compute_{name.partition('_')[2]},code={name}"


def _number(version: str, asked: str) -> tuple[str, str]:
    """ "9.0a" → ("90", "a")."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)", version)
    if match is None:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST must be like '8.0 9.0+PTX', got {asked!r}")
    return match[1] + match[2], match[3]


def _jobs(environment: Mapping[str, str]) -> int:
    asked = environment.get("MAX_JOBS", "")
    return max(1, int(asked)) if asked.isdecimal() else os.cpu_count() or 1


def _compile(command: list[str], file: Path) -> Path:
    _run(command, f" on {file.name}")
    return file


def _run(command: list[str], where: str = "") -> str:
    """The command's output; its first complaint is the reason of an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} can't be run: {error.strerror or error}") from None
    if done.returncode:
        said = (done.stderr + done.stdout).strip()
        lines = said.splitlines() or ["no message"]
        first = next((line for line in lines if "error" in line or "fatal" in line), lines[0]).strip()
        details = f"{' '.join(command)}\n{said}"
        raise BuildError(f"{command[0]} failed{where} with status {done.returncode}: {first}", details)
    return done.stdout


def _main(arguments: Sequence[str]) -> int:
    target = Path(arguments[0]) if arguments else SOURCES.parent / "delora_kernels" / LIBRARY
    try:
        build(target, os.environ, print)
    except BuildError as error:
        print(f"{error}\n{error.details}".strip(), file=sys.stderr)
        return 1
    print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
