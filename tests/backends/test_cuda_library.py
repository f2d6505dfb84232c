"""The library of compiled kernels: what is said when it can't be used, and that nothing says it at
import.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from delora_kernels import __version__, backends, dispatch, explain, functional, use_backend
from delora_kernels.backends.cuda import launch, support
from delora_kernels.backends.cuda import library as cuda_library
from delora_kernels.diagnostics.environment import environment

HEADER = (Path(__file__).parents[2] / "csrc/delora_kernels.h").read_text(encoding="utf-8")
DECLARED = re.findall(r"^DK_API [\w ]+?\*?(dk_\w+)\(", HEADER, re.MULTILINE)
INFO = "CUDA 13.0 for sm_75 sm_80 sm_90 compute_90"

compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of the library, and nothing found out here is kept."""
    monkeypatch.setattr(backends, "_unavailable", {})
    monkeypatch.setattr(support, "_against", {})
    monkeypatch.delenv(cuda_library.ENVIRONMENT_VARIABLE, raising=False)
    for cached in (cuda_library.load, launch.library, launch.on_host):
        cached.cache_clear()
    yield
    for cached in (cuda_library.load, launch.library, launch.on_host):
        cached.cache_clear()


def compiled(
    folder: Path, *, abi: int = cuda_library.ABI_VERSION, on_host: int = 1, without: str = "", more: str = ""
) -> str:
    """A library of functions that do nothing, but for what it says of itself."""
    bodies = {
        "dk_abi_version": f"int dk_abi_version(void) {{ return {abi}; }}",
        "dk_on_host": f"int dk_on_host(void) {{ return {on_host}; }}",
        "dk_build_info": f'const char *dk_build_info(void) {{ return "{INFO}"; }}',
    }
    lines = [bodies.get(name, f"int {name}(void) {{ return 0; }}") for name in DECLARED if name != without]
    source, library = folder / "stub.c", folder / "stub.so"
    source.write_text("\n".join([*lines, more]), encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", str(source), "-o", str(library)], check=True)
    return str(library)


def test_all_that_is_asked_for_is_declared_and_all_that_is_declared_is_asked_for() -> None:
    assert {*launch.FUNCTIONS, *cuda_library._ASKED, "dk_abi_version"} == set(DECLARED)


def test_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_library, "PACKAGE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_library.why_not_here() == "there is no GPU, and there are no compiled kernels"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    expected = tmp_path / cuda_library.LIBRARY
    assert cuda_library.why_not_here() == (
        f"found no compiled kernels; expected {expected}; to do: where nvcc is, python -m delora_kernels build-cuda"
    )
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "there is no GPU" in str(cuda_library.why_not_here())


def test_where_it_is_made_and_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the package where that can be written to, else in the user's cache; the newer one of two
    is taken.
    """
    package, cached = tmp_path / "package", tmp_path / "cache/delora_kernels" / __version__ / cuda_library.LIBRARY
    package.mkdir()
    monkeypatch.setattr(cuda_library, "PACKAGE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cuda_library.new_path() == cuda_library.path() == package / cuda_library.LIBRARY
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != package)  # root may write everywhere
    assert cuda_library.new_path() == cuda_library.path() == cached
    cached.parent.mkdir(parents=True)
    for when, file in ((2, cached), (1, package / cuda_library.LIBRARY), (3, package / cuda_library.LIBRARY)):
        file.touch()
        os.utime(file, (when, when))
        assert cuda_library.path() == (file if when == 3 else cached)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cuda_library.new_path() == tmp_path / "home/.cache/delora_kernels" / __version__ / cuda_library.LIBRARY


def broken(what: str, folder: Path) -> tuple[str, str]:
    """A library with this fault: its path, and what is said of it."""
    if what == "no file":
        return str(folder / "gone.so"), f"found no file {folder / 'gone.so'}; expected the library that DELORA_"
    if what == "no library":
        (folder / "text.so").write_text("not a library")
        return str(folder / "text.so"), f"found {folder / 'text.so'}, which does not load ("
    if what == "an unresolved symbol":
        more = "extern int cudaNoSuchThing(void); int (*dk_more)(void) = cudaNoSuchThing;"
        return compiled(folder, more=more), "undefined symbol: cudaNoSuchThing"
    if what == "another ABI":
        return compiled(folder, abi=99), f"of ABI version 99; expected ABI version {cuda_library.ABI_VERSION}, that of"
    if what == "no ABI":
        return compiled(folder, without="dk_abi_version"), "which has no dk_abi_version; expected ABI version"
    return compiled(folder, without="dk_route"), "without dk_route; expected a library of this very version"


@compiler
@pytest.mark.parametrize(
    "what", ["no file", "no library", "an unresolved symbol", "another ABI", "no ABI", "no launcher"]
)
def test_a_library_that_can_not_be_used(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason stands in the environment report, in explain and in use_backend's error; calls run
    without it.
    """
    path, reason = broken(what, tmp_path)
    monkeypatch.setenv(cuda_library.ENVIRONMENT_VARIABLE, path)
    found = environment()
    assert reason in found["backends"]["cuda"]
    assert "; to do: " in found["backends"]["cuda"]
    assert found["variables"][cuda_library.ENVIRONMENT_VARIABLE] == path
    x, W, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
    explained = explain("lora_linear", x, W, A, B)
    assert explained.backend == "eager"
    assert reason in explained.reasons["cuda"]
    with pytest.raises(RuntimeError, match=re.escape(reason)), use_backend("cuda"):
        pass
    with pytest.raises(cuda_library.LibraryError, match=re.escape(reason)):
        launch.library()


@compiler
def test_from_the_shell_a_broken_library_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_library.ENVIRONMENT_VARIABLE, compiled(tmp_path, abi=99))
    done = subprocess.run([sys.executable, "-m", "delora_kernels"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("backend cuda")]
    assert "no: found" in line
    assert "of ABI version 99" in line


@compiler
def test_a_good_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the host takes CPU tensors; one for GPUs needs a GPU, a driver for its CUDA and code
    for the card.
    """
    monkeypatch.setenv(cuda_library.ENVIRONMENT_VARIABLE, compiled(tmp_path))
    assert backends.unavailable("cuda") is None
    assert launch.on_host()
    assert support._why_not_on(torch.device("cpu")) is None
    assert support._why_not_on(torch.device("cuda", 0)) == "its tensors are on cuda"


@compiler
def test_a_library_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_library.ENVIRONMENT_VARIABLE, compiled(tmp_path, on_host=0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_library.why_not_here() == f"there is no GPU (the library loads: {INFO})"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for version, says in (
        (13000, None),
        (13010, None),
        (12080, "found a driver for CUDA 12.8 and kernels compiled by"),
    ):
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda version=version: version, raising=False)
        reason = cuda_library.why_not_here()
        assert reason is None if says is None else str(reason).startswith(says)
    assert support._why_not_on(torch.device("cpu")) == "its tensors are on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    reason = support._why_not_on(torch.device("cuda", 0))
    assert str(reason).startswith(f"found a GPU of compute capability 7.0 and kernels compiled by {INFO}; expected")
    assert str(reason).endswith("python -m delora_kernels build-cuda --arch 7.0")


@pytest.mark.parametrize(
    ("info", "serves", "not_"),
    [
        ("CUDA 13.0 for sm_80 sm_90", ["8.0", "8.6", "8.9", "9.0"], ["7.5", "10.0", "12.0"]),
        ("CUDA 13.0 for sm_86", ["8.6", "8.9"], ["8.0", "9.0"]),
        ("CUDA 13.0 for sm_80 compute_80", ["8.0", "9.0", "10.0", "12.1"], ["7.5"]),
        ("CUDA 13.0 for sm_100 sm_120 compute_120", ["10.0", "10.3", "12.0", "12.1"], ["9.0", "11.0"]),
    ],
)
def test_what_machine_code_and_ptx_serve(info: str, serves: list[str], not_: list[str]) -> None:
    def ask(version: str) -> str | None:
        major, minor = version.split(".")
        return cuda_library.why_not_capability(info, (int(major), int(minor)))

    assert [version for version in serves if ask(version) is not None] == []
    assert [version for version in not_ if ask(version) is None] == []


@compiler
@pytest.mark.parametrize("asked", ["at first in the compiled call", "before it"])
def test_a_compiled_call_may_be_the_first(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile can trace neither an import nor a look at files: both happen, and the graph has
    no break.
    """
    monkeypatch.setenv(cuda_library.ENVIRONMENT_VARIABLE, compiled(tmp_path))
    monkeypatch.setattr(dispatch, "_requested", "cuda")
    if asked == "before it":
        assert backends.unavailable("cuda") is None
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, example_inputs: object) -> object:
        graphs.append(module.print_readable(print_output=False))
        return module.forward

    torch._dynamo.reset()
    x, W, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
    torch.compile(functional.lora_linear, fullgraph=True, backend=keep)(x, W, A, B)
    torch._dynamo.reset()
    (graph,) = graphs
    assert "'cuda')" in graph
