"""A toolkit whose nvcc is a script: it notes its arguments and writes them in the place of code, or
fails.
"""

from pathlib import Path

KNOWN = ("75", "80", "86", "87", "89", "90", "100", "120")

_SCRIPT = """#!/bin/sh
all="$*"
echo "$all" >> '{log}'
if [ "$all" = --list-gpu-arch ]; then printf '{known}'; exit; fi
{does}
while [ "$1" != -o ]; do shift; done
echo "$all" > "$2"
"""

FAILS = {
    "nothing_to_run": "",
    "no_host_compiler": "echo 'nvcc fatal   : Failed to preprocess host compiler properties.' >&2; exit 1",
    "an_error_in_a_kernel": "echo 'route.cu(7): odd'; echo 'route.cu(9): error: no such thing'; echo more; exit 2",
    "writes_nothing": "exit 0",
}
"""What is wrong with a toolkit → what its nvcc does when it should compile; the first is empty: no
program at all.
"""


def toolkit(folder: Path, does: str = ":", known: tuple[str, ...] = KNOWN) -> Path:
    """Make a toolkit in `folder`, for CUDA_HOME."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    architectures = "".join(f"compute_{number}\\n" for number in known)
    script = _SCRIPT.format(log=folder / "log", known=architectures, does=does)
    nvcc.write_text(script if does else "\x7fELF of another machine", encoding="utf-8")
    nvcc.chmod(0o755)
    return folder


def calls(folder: Path) -> list[str]:
    """What the toolkit's nvcc was called with, one line each."""
    return (folder / "log").read_text(encoding="utf-8").splitlines()


def gpus(folder: Path, *capabilities: str, fails: str = "") -> Path:
    """Make an nvidia-smi that shows GPUs of these compute capabilities, or fails with a word; its
    folder, for PATH.
    """
    folder.mkdir(parents=True)
    program = folder / "nvidia-smi"
    shown = "".join(f"{capability}\\n" for capability in capabilities)
    program.write_text("#!/bin/sh\n" + (f"echo {fails}; exit 9" if fails else f"printf '{shown}'"), encoding="utf-8")
    program.chmod(0o755)
    return folder
