"""Compile the CUDA kernels (csrc/) into one shared library with nvcc: no PyTorch and no Python
inside.

    python -m delora_kernels build-cuda            for the GPUs of this machine
    DELORA_KERNELS_CUDA=1 pip install .            the same while the package is built, into the
                                                   wheel

setup.py loads this file where torch need not be, so it imports nothing of the package. What it
reads from the environment:

TORCH_CUDA_ARCH_LIST   architectures as PyTorch writes them, "8.0 9.0+PTX", or "all"; else those
                       that nvidia-smi shows
CUDA_HOME, CUDA_PATH   the toolkit; else the nvcc on PATH, else /usr/local/cuda
MAX_JOBS               files compiled at a time; else the number of cores
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
LIBRARY = "delora_kernels_cuda.dll" if os.name == "nt" else "libdelora_kernels_cuda.so"

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
"""Compiled for where "all" is asked; the newest that nvcc knows as PTX too, for cards still to
come.
"""

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


def sources() -> Path:
    """Return the folder of the kernels' sources: in an installed package, or beside the package in
    a clone.

    Raises:
        BuildError: there is neither.
    """
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "delora_kernels.h").is_file():
            return folder
    raise BuildError(f"the kernels' sources are neither in {PACKAGE / 'csrc'} nor beside the package: install it again")


def build(target: Path, environment: Mapping[str, str], say: Callable[[str], None], asked: str = "") -> None:
    """Compile `target`, and say what is done and how long it takes.

    Args:
        target: The library's path; an old file there is replaced when the new one is whole.
        environment: os.environ.
        say: Prints a line.
        asked: Architectures in the place of TORCH_CUDA_ARCH_LIST.

    Raises:
        BuildError: it can't be compiled.
    """
    began = time.perf_counter()
    nvcc = find_nvcc(environment)
    known = re.findall(r"compute_(\d+)", _run([nvcc, "--list-gpu-arch"]))
    asked = asked.strip() or environment.get("TORCH_CUDA_ARCH_LIST", "").strip() or " ".join(visible_gpus(environment))
    targets = choose_targets(known, asked)
    generate, names = [_flag(name) for name in targets], " ".join(targets)
    files = sorted(sources().glob("*.cu"), key=lambda file: -file.stat().st_size)  # the longest first: shorter in all
    jobs = _jobs(environment)
    threads = max(1, jobs // len(files))
    say(f"delora-kernels: compiling {len(files)} files of CUDA kernels for {names}, {min(jobs, len(files))} at a time")
    common = [nvcc, *FLAGS, *generate, f"--threads={threads}", f'-DDK_ARCHITECTURES="{names}"']
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(jobs, len(files))) as pool:
        objects = [str(Path(folder, f"{file.stem}.o")) for file in files]
        commands = [[*common, "-c", str(file), "-o", made] for file, made in zip(files, objects, strict=True)]
        compiling = [
            pool.submit(_run, command, f" on {file.name}") for command, file in zip(commands, files, strict=True)
        ]
        try:
            for done, future in enumerate(as_completed(compiling), start=1):
                future.result()
                name = files[compiling.index(future)].name
                say(f"  {done}/{len(files)} {name} ({time.perf_counter() - began:.0f} s)")
        finally:
            pool.shutdown(cancel_futures=True)
        whole = Path(folder, LIBRARY)
        _run([nvcc, *LINK, *generate, *objects, "-o", str(whole)])
        if not whole.is_file():
            raise BuildError(f"{nvcc} ended well but wrote no library")
        beside = target.with_name(f"{LIBRARY}.{os.getpid()}")  # a process may have the old file open
        shutil.copy(whole, beside)
        beside.replace(target)
    size, seconds = target.stat().st_size / 1e6, time.perf_counter() - began
    say(f"delora-kernels: {target} ({size:.1f} MB, {seconds:.0f} s)")


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the compute capabilities of this machine's GPUs, as nvidia-smi has them: "8.0", ...

    Raises:
        BuildError: there is none, or nothing that says so; the text has what to pass.
    """
    program = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    said = ""
    if program is not None:
        try:
            said = _run([program, "--query-gpu=compute_cap", "--format=csv,noheader"])
        except BuildError as error:
            said = str(error)
    found = list(dict.fromkeys(re.findall(r"^\s*(\d+\.\d)\s*$", said, re.MULTILINE)))
    if not found:
        why = "there is no nvidia-smi" if program is None else f"nvidia-smi says: {said.strip() or 'nothing'}"
        raise BuildError(
            f"no GPU is visible to compile for ({why}): name the architectures, as in --arch '8.0 9.0+PTX' "
            "or TORCH_CUDA_ARCH_LIST='8.0 9.0+PTX'; all: every one"
        )
    return found


def find_nvcc(environment: Mapping[str, str]) -> str:
    """Return the path of nvcc.

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


def choose_targets(known: Sequence[str], asked: str) -> list[str]:
    """Return what to compile for: `sm_80` is machine code, `compute_80` PTX.

    Args:
        known: The architectures that nvcc knows: "75", "80", ...
        asked: As in TORCH_CUDA_ARCH_LIST; "+PTX" adds PTX, "all" is all of ARCHITECTURES. Those
            that nvcc or the kernels do not know are left out.

    Raises:
        BuildError: nothing is left, or `asked` can't be read.
    """
    if asked.strip().lower() == "all":
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
        wanted = " ".join(ARCHITECTURES) if asked.strip().lower() == "all" else asked.strip()
        raise BuildError(f"nvcc knows {' '.join(known) or 'no architecture'}, none of those to compile for ({wanted})")
    return list(dict.fromkeys(names))


def _flag(name: str) -> str:
    """nvcc's option for one of `choose_targets`."""
    return f"--generate-code=arch=compute_{name.partition('_')[2]},code={name}"


def _number(version: str, asked: str) -> tuple[str, str]:
    """ "9.0a" → ("90", "a")."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)", version)
    if match is None:
        raise BuildError(f"architectures must be like '8.0 9.0+PTX' or 'all', got {asked!r}")
    return match[1] + match[2], match[3]


def _jobs(environment: Mapping[str, str]) -> int:
    asked = environment.get("MAX_JOBS", "")
    return max(1, int(asked)) if asked.isdecimal() else os.cpu_count() or 1


def _run(command: list[str], where: str = "") -> str:
    """Run a command and return its output; its first complaint is the reason of an error."""
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
