"""`python -m delora_kernels` and its check: what they print and their exit status."""

import json
import os
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import delora_kernels
from delora_kernels import backends, dispatch, functional, ops
from delora_kernels.__main__ import main
from delora_kernels.backends import eager
from delora_kernels.diagnostics import check, stored_forms, versions
from delora_kernels.diagnostics.environment import as_text, environment
from delora_kernels.testing import METHODS


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != dispatch.ENVIRONMENT_VARIABLE}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, timeout=300)


FORMS = set(stored_forms.FORMS)


IN_FORKS = """
import json, os, runpy, sys, tempfile, torch

def forked(arguments, out):
    with tempfile.TemporaryFile() as errors:
        if (pid := os.fork()) == 0:
            os.dup2(out, 1)
            os.dup2(errors.fileno(), 2)
            sys.argv[1:] = arguments
            exec(arguments[1]) if "-c" in arguments else runpy.run_module("delora_kernels", run_name="__main__")
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        errors.seek(0)
        return status, errors.read().decode()

said, (read, unread) = [], json.loads(sys.argv[1])
for arguments in read:
    with tempfile.TemporaryFile() as out:
        ended = forked(arguments, out.fileno())
        out.seek(0)
        said.append([*ended, out.read().decode()])
from delora_kernels import ops
from delora_kernels.diagnostics import check
check.METHODS = {"lora": check.METHODS["lora"]}
ops.NAMES = ops.NAMES[:1]
for arguments in unread:
    reader, out = os.pipe()
    os.close(reader)
    said.append([*forked(arguments, out), ""])
    os.close(out)
print(json.dumps(said))
"""
"""Each command in a process of its own, forked from one that has torch, which takes a new Python
seconds: the status it ends with, and what it writes to standard error and standard output, which of
`unread` nobody reads.
"""

IMPORTED = """
import delora_kernels.diagnostics.environment as e; print(torch.cuda.is_initialized())
before = set(sys.modules); e.as_text(e.environment()); new = set(sys.modules) - before
print([name for name in new if name in ('peft', 'transformers', 'triton', 'numpy')])
"""

Ended = tuple[int, str, str]


@pytest.fixture(scope="module")
def ended() -> dict[str, Ended]:
    """How processes end."""
    variables = {name: value for name, value in os.environ.items() if name != dispatch.ENVIRONMENT_VARIABLE}
    read: Any = [["-c", IMPORTED], []]
    unread = [["check", "--device", "cpu", "--dtype", "float32", option] for option in ("--verbose", "--json")]
    command = [sys.executable, "-c", IN_FORKS, json.dumps([read, unread])]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr
    names = ("imports", "environment", "--verbose", "--json")
    return {name: tuple(one) for name, one in zip(names, json.loads(done.stdout), strict=True)}


def test_environment_from_the_shell(ended: dict[str, Ended]) -> None:
    status, errors, printed = ended["environment"]
    assert status == 0, errors
    facts = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert facts["delora_kernels"] == delora_kernels.__version__
    assert facts["python"] == versions.describe("python", ".".join(map(str, sys.version_info[:3])))
    assert facts["torch"] == versions.describe("torch", torch.__version__)
    backends_shown = [line.split(maxsplit=2)[1:] for line in printed.splitlines() if line.startswith("backend ")]
    assert [name for name, _ in backends_shown] == list(backends.NAMES)
    assert ["eager", "can run"] in backends_shown
    assert all(verdict == "can run" or len(verdict) > 10 for _, verdict in backends_shown)


def test_environment_imports_nothing(ended: dict[str, Ended]) -> None:
    assert ended["imports"][2].split() == ["False", "[]"]


def test_environment_as_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "no such backend")
    report = json.loads(json.dumps(environment()))
    assert report["variables"][dispatch.ENVIRONMENT_VARIABLE] == "no such backend"
    assert set(report["support"]) == set(versions.TABLE)
    assert all(report["support"][name] == versions.status(name, report[name]) for name in versions.TABLE)
    assert report["devices"][0]["device"] == "cpu"
    assert report["backends"]["eager"] is None
    report |= {
        "peft": None,
        "transformers": "4.55.4",
        "cuda": {"runtime": "13.0", "driver": None},
        "devices": [{"device": "cuda:0", "name": "GPU", "capability": "9.0", "memory_gib": 139.8}],
        "backends": {"triton": "triton is not installed", "eager": None},
    }
    text = as_text(report).splitlines()
    for fact in (
        "peft not installed",
        "transformers 4.55.4 (older than the supported 4.56)",
        "CUDA runtime 13.0, driver for unknown",
        "device cuda:0 GPU, compute capability 9.0, 139.8 GiB",
        "backend triton no: triton is not installed",
        "backend eager can run",
        "DELORA_KERNELS_BACKEND no such backend: no such backend, every call will raise; must be one of "
        "triton, cuda, eager",
    ):
        assert fact in [" ".join(line.split()) for line in text]
    starts = {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in text}
    assert len(starts) == 1, "the facts are aligned"


def test_cuda_driver_version(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="GPU", major=9, minor=0, total_memory=140 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)
    report = environment()
    assert report["cuda"] == {"runtime": "12.8", "driver": "13.1"}
    gpu = {"name": "GPU", "capability": "9.0", "memory_gib": 140.0}
    assert report["devices"][1:] == [{"device": f"cuda:{index}"} | gpu for index in (0, 1)]


def test_check_from_the_shell() -> None:
    before = os.times()
    done = python("-m", "delora_kernels", "check", "--device", "cpu")
    after = os.times()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    first, header, *rows, summary = done.stdout.splitlines()
    stored, rows = ([row for row in rows if row.startswith("base ") == is_base] for is_base in (True, False))
    assert {row[5:24].strip() for row in stored} == FORMS
    assert all(row.endswith("  ok") or "  skipped: " in row for row in stored)
    assert first == "device cpu, seed 0"
    assert header.split() == ["method", "what", "dtype", "backend", "error", "limit", "part", "ok"]
    assert all(0 <= int(part) <= 100 for row in rows for part in re.findall(r" (\d+)%  ok$", row))
    assert all(row.endswith("  ok") and len(row) <= 120 for row in rows)
    shown = {row.split("  ")[0] for row in rows}
    assert shown == {f"op {name}" for name in ops.NAMES} | set(METHODS)
    for name in METHODS:
        dtypes = {row.split()[2] for row in rows if row.startswith(f"{name} ")}
        mixed = {"bfloat16+float32", "float16+float32"}
        assert dtypes == {"float64", "float32", "bfloat16", "float16"} | mixed
        assert sum(row.split()[:2] == [name, "gradcheck"] for row in rows) == 1
    assert summary.endswith("all within their limits")
    assert int(summary.split()[0]) > 500
    if hasattr(os, "wait4"):  # elsewhere the time of ended processes isn't told
        busy = after.children_user + after.children_system - before.children_user - before.children_system
        assert 0 < busy < 60, "seconds of the processor: on a busy machine it lasts longer"


def test_check_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Of a few ops and methods: the check from the shell has them all."""
    capsys.readouterr()  # the seed
    monkeypatch.setattr(check, "SIZES", check.SIZES[:1])
    some_ops, methods = ("project", "weight_grad", "dropout_mask"), ("lora", "dora", "ether")
    calls = {f"{name}_linear": functional.CALLS[f"{name}_linear"] for name in methods}
    monkeypatch.setattr(check, "METHODS", {name: METHODS[name] for name in methods})
    monkeypatch.setattr(functional, "CALLS", calls)
    monkeypatch.setattr(ops, "NAMES", some_ops)
    assert main(["check", "--json", "--dtype", "float32", "--dtype", "bfloat16", "--seed", str(seed)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"] == json.loads(json.dumps(environment()))
    assert (report["ok"], report["seed"]) == (True, seed)
    assert {row["method"] for row in report["rows"]} == {f"op {name}" for name in some_ops} | set(methods)
    assert {row["dtype"] for row in report["rows"]} == {"float32", "bfloat16", "bfloat16+float32", "bool"}
    assert {row["what"] for row in report["rows"] if row["method"] == "dora"} == {
        *("y", "dx", "dweight", "dbias", "dA", "dB", "dmagnitude"),
    }
    for row in report["rows"]:
        assert set(row) == {"method", "what", "dtype", "backend", "error", "limit", "eager", "status", "note"}
        assert 0 <= row["error"] <= row["limit"] or row["what"] == "repeat"
        assert (row["status"], row["backend"], row["note"]) == ("ok", "eager", "")


@pytest.mark.parametrize("arguments", [["--verbose"], ["--json"]])
def test_reader_that_goes_away(arguments: list[str], ended: dict[str, Ended]) -> None:
    """`python -m delora_kernels check | head -1`: no traceback, and the status that a shell gives
    for SIGPIPE.
    """
    status, errors, _ = ended[arguments[0]]
    assert errors == ""
    assert status == 141


def test_check_verbose_shows_every_result(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "METHODS", {"lora": METHODS["lora"]})
    monkeypatch.setattr(functional, "CALLS", {"lora_linear": functional.CALLS["lora_linear"]})
    monkeypatch.setattr(ops, "NAMES", ())
    assert main(["check", "--dtype", "float32", "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:-1]] == [
        ["lora", what] for what in ("y", "dx", "dweight", "dA", "dB", "dbias")
    ]
    assert main(["check", "--dtype", "float32"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_progress_bar_is_for_terminals_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "METHODS", {"lora": METHODS["lora"]})
    monkeypatch.setattr(functional, "CALLS", {"lora_linear": functional.CALLS["lora_linear"]})
    monkeypatch.setattr(ops, "NAMES", ("dropout_mask",))
    assert main(["check", "--dtype", "float32"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["check", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"lora float32: +50%\|[^\r]*\| 1/2 ", err)
    assert err.endswith("\r")
    assert err.split("\r")[-2].strip(" ") == "", "wiped at the end"
    assert "%|" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:<index>, got 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--backend", "cuda"], "the backend 'cuda' can't run: no card"),
    ],
)
def test_unavailable(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda name: "no card" if name == "cuda" else None)
    assert main(["check", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"python -m delora_kernels check: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--backend", "cublas"], ["--dtype", "int8"], ["--seed", "-1"], ["--fast"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["check", *arguments])
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_bad_environment_variable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_requested", "cublas")
    assert main(["check"]) == 2
    assert "DELORA_KERNELS_BACKEND must be one of" in capsys.readouterr().err


def fake_backend(monkeypatch: pytest.MonkeyPatch, supports: Any) -> None:
    """Make `cuda` a backend that runs the eager functions but takes only what `supports` does not
    refuse.
    """
    module = ModuleType("fake")
    module.__dict__.update(vars(eager) | {"supports": supports})
    monkeypatch.setitem(backends._MODULES, "cuda", "fake")
    monkeypatch.setitem(backends.loaded, "cuda", module)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)


def test_what_a_requested_backend_does_not_take_is_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_backend(monkeypatch, lambda call: "no float16" if call.x.dtype == torch.float16 else None)
    monkeypatch.setattr(check, "SIZES", check.SIZES[:1])
    assert main(["check", "--backend", "cuda", "--dtype", "float32", "--dtype", "float16", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["backend"] for row in rows} == {"cuda"}
    assert {row["status"] for row in rows if row["dtype"].startswith("float16")} == {"skipped"}
    assert {row["note"] for row in rows if row["dtype"].startswith("float16")} == {"no float16"}
    assert {row["status"] for row in rows if not row["dtype"].startswith("float16")} == {"ok"}
    assert main(["check", "--backend", "cuda", "--dtype", "float16"]) == 2
    assert "nothing to check: no float16" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"delora-kernels {delora_kernels.__version__}\n"
