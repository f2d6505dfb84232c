"""Every script of examples/ in its small form: it ends well, soon, and its numbers are right."""

import ast
import contextlib
import gc
import io
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import context

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROOT = str(Path(__file__).parents[2])
EXAMPLES = Path(ROOT) / "examples"
NUMBER = r"(\d+\.\d+(?:e[-+]\d+)?)"

FINDS: dict[str, list[tuple[str, float, float]]] = {
    "peft_trainer": [
        (rf"loss of the first fifth of the steps {NUMBER}", 5.0, 6.0),  # ln 256 = 5.5 at the start
        (rf", of the last {NUMBER}", 3.0, 5.0),
        (r"delora-kernels: fused (\d+) of 14 adapter layers \(14 delora\)", 14, 14),
    ],
    "goat_trainer": [
        (rf"loss of the first fifth of the steps {NUMBER}", 5.0, 6.0),
        (rf", of the last {NUMBER}", 3.0, 5.5),
        (r"\n(\d+) of 112 experts dead in 14 layers", 0, 56),
        (rf"balance {NUMBER} \(1 is even\)", 0.9, 4.0),
        (r"saved and loaded, the same bits: (1|True)", 1, 1),
        (r"merged the mean gate of (\d+) layers", 14, 14),
    ],
    "plain_linear": [
        (rf"before adapting: loss {NUMBER}", 0.2, 5.0),
        (rf"adapter parameters trained: loss {NUMBER}", 0.0, 0.05),
        (rf"merged, largest relative difference: {NUMBER}", 0.0, 1e-5),
        (r"unmerged, the same bits: (1|True)", 1, 1),
    ],
    "merge_and_export": [
        (rf"adapter off, relative difference: {NUMBER}", 0.1, 10.0),
        (rf"exported and loaded, relative difference: {NUMBER}", 0.0, 1e-5),
        (rf"merged, relative difference: {NUMBER}", 0.0, 1e-5),
        (r"exported: a LORA adapter of rank (\d+)", 8, 8),
    ],
    "experts": [
        (r"delora-kernels: fused (\d+) of 6 adapter layers", 6, 6),
        (r"\n(\d+) of 64 experts' factors moved", 40, 64),  # A and B of 2 projections of 8 experts in 2 layers
        (r"\n(\d+) alarms after 5 steps", 0, 0),
        (rf"saved and loaded by PEFT, relative difference: {NUMBER}", 0.0, 1e-5),
        (rf"exported and loaded by PEFT, relative difference: {NUMBER}", 0.0, 1e-5),
        (r"per expert: (\d+) tensors", 100, 100),
        (rf"merged, relative difference: {NUMBER}", 0.0, 1e-5),
    ],
    "weight_changes": [
        (rf"\nfull +{NUMBER}", 1e-4, 1e-1),
        (rf"\nDoRA +\S+ +{NUMBER}", 1e-2, 1.0),
        (rf"\nDeLoRA +\S+ +\S+ +{NUMBER}", 1e-2, 1.0),
        (r"\n(\d+) weights measured at 4 steps, correlation of ΔD and ΔM \+0", 14, 14),
    ],
    "check_in_ci": [(r"(\d+) results on ", 50, 1000), (r"nearest to its limit: .+: (\d+)% of it\nok", 1, 100)],
    "read_the_report": [
        (r"strict=True, but not every adapter layer can be fused: fused (\d) of 4", 2, 2),
        (r"\nfused (\d) of 4 adapter layers \(3 dora\)", 3, 3),
        (rf"the result is the same: largest difference {NUMBER}", 0.0, 1e-5),
        (
            r"\n  not fused, (\d): DoRA on a convolution with groups, .+: base_model.model.mix\n.*\n\n== as text",
            1,
            1,
        ),
        (r"restored (\d) layers", 4, 4),  # the convolution too: its class is swapped, its calls are PEFT's
    ],
}
"""For each script: patterns whose first group must be found once and lie in a range."""

METHODS_AND_OPS = 6
"""How much the example of the check checks; the check of all: test_command_line.py."""

SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def number(text: str) -> float:
    return float(text == "True") if text in ("True", "False") else float(text)


def _run(command: list[str], *, run: Any = subprocess.run, **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run, but `python -m delora_kernels check` is one of some methods and ops, and in
    this process.
    """
    if command[1:4] != ["-m", "delora_kernels", "check"]:
        found: subprocess.CompletedProcess[str] = run(command, **options)
        return found
    from delora_kernels import functional, ops
    from delora_kernels.__main__ import main
    from delora_kernels.diagnostics import check

    assert (command[0], options) == (sys.executable, {"stdout": subprocess.PIPE, "text": True})
    check.METHODS = dict(list(check.METHODS.items())[:METHODS_AND_OPS])
    functional.CALLS = {method.function: functional.CALLS[method.function] for method in check.METHODS.values()}
    ops.NAMES = ops.NAMES[:METHODS_AND_OPS]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(command[3:])
    return subprocess.CompletedProcess(command, status, printed.getvalue())


def _main(script: str, folder: str) -> None:
    """What `python script` does in the folder, without a network; its output goes to a file beside
    the folder.
    """
    gc.freeze()  # what the server has imported
    os.chdir(folder)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ROOT}
    socket.getaddrinfo = lambda *_, **__: sys.exit("it looks for a network")  # type: ignore[assignment]
    out = os.open(f"{folder}.out", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    subprocess.run = _run  # type: ignore[assignment]
    sys.argv = [script]
    torch.set_num_threads(1)
    runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs(name: str, tmp_path: Path) -> None:
    """It prints nothing of a traceback, finds no network, and says the numbers of FINDS."""
    if name == "experts":
        pytest.importorskip("transformers", "5", reason="Transformers 4 keeps experts as modules")
    folder = tmp_path / "folder"
    folder.mkdir()
    process = context().Process(target=_main, args=(str(EXAMPLES / f"{name}.py"), str(folder)))
    process.start()
    process.join(300)
    process.kill()
    process.join()
    printed = Path(f"{folder}.out").read_text(encoding="utf-8")
    assert process.exitcode == 0, printed
    assert list(folder.iterdir()) == []  # nothing is left behind
    for pattern, low, high in FINDS.get(name, []):
        found = re.findall(pattern, printed)
        assert len(found) == 1, (pattern, printed)
        assert low <= number(found[0]) <= high, (pattern, found)


@pytest.mark.parametrize("name", SCRIPTS)
def test_is_short_and_says_what_it_shows(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert f"python examples/{name}.py" in (ast.get_docstring(ast.parse(text)) or "")
    assert f"({name}.py)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_every_find_has_its_script() -> None:
    assert set(FINDS) <= set(SCRIPTS)
