"""A toolkit whose nvcc is a script: it notes its arguments and writes files that hold no code, or fails."""

import sys
from pathlib import Path

KNOWN = ("75", "80", "86", "87", "89", "90", "100", "120")

_SCRIPT = """#!{python}
import sys
from pathlib import Path
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*arguments, file=log)
if "--list-gpu-arch" in arguments:
    print({known!r})
else:
    {does}
    Path(arguments[arguments.index("-o") + 1]).write_text(" ".join(arguments))
"""

FAILS = {
    "nothing_to_run": "",
    "no_host_compiler": "sys.exit('nvcc fatal   : Failed to preprocess host compiler properties.')",
    "an_error_in_a_kernel": "print('route.cu(7): warning: odd'); sys.exit('route.cu(9): error: no such thing\\\\nmore')",
    "writes_nothing": "sys.exit(0)",
}
"""What is wrong with a toolkit → what its nvcc does when it should compile; the first is empty: no program at all."""


def toolkit(folder: Path, does: str = "pass", known: tuple[str, ...] = KNOWN) -> Path:
    """Make a toolkit in `folder`, for CUDA_HOME; `calls` of it are what its nvcc was asked."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    architectures = "\n".join(f"compute_{number}" for number in known)
    script = _SCRIPT.format(python=sys.executable, log=str(folder / "log"), known=architectures, does=does)
    nvcc.write_text(script if does else "\x7fELF of another machine", encoding="utf-8")
    nvcc.chmod(0o755)
    return folder


def calls(folder: Path) -> list[str]:
    """Every call of the toolkit's nvcc, its arguments in one line."""
    return (folder / "log").read_text(encoding="utf-8").splitlines()
