"""Compiling the kernels while the package is built: with nvcc, without it and with a broken one, played by a script.

The real compiler's turn is `make test-cuda-build`.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nvcc_build
import pytest
from fake_nvcc import FAILS, KNOWN, calls, toolkit
from nvcc_build import BuildError, build_if_wanted, choose_targets, find_nvcc
from package_source import ROOT, build, copy_source

from delora_kernels import __version__
from delora_kernels.backends.cuda import library as cuda_library

pytest.importorskip("build")

FILES = sorted(file.name for file in (ROOT / "csrc").glob("*.cu"))
LIBRARY = f"delora_kernels/{cuda_library.NAME}"


def wheel_of(source: Path) -> tuple[str, dict[str, str]]:
    """The one wheel's tag, and its files that matter here with their text."""
    (wheel,) = (source.parent / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        kept = [name for name in archive.namelist() if name == LIBRARY or name.endswith("/WHEEL")]
        texts = {name.rpartition("/")[2]: archive.read(name).decode() for name in kept}
    return wheel.name.removeprefix(f"delora_kernels-{__version__}-").removesuffix(".whl"), texts


def test_the_library_is_where_the_package_looks() -> None:
    assert nvcc_build.LIBRARY == cuda_library.NAME


def test_wheel_with_nvcc_from_an_sdist_and_then_without(tmp_path: Path) -> None:
    """The binary wheel serves every Python 3; a pure one made later in the same folder has no left-over library."""
    source = copy_source(tmp_path)
    done = build(source, CUDA_HOME=str(toolkit(tmp_path / "cuda")), TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tag, texts = wheel_of(source)
    assert tag.startswith("py3-none-")
    assert tag != "py3-none-any"
    assert texts[cuda_library.NAME].startswith("-shared --cudart=static")
    assert "Root-Is-Purelib: false" in texts["WHEEL"]
    assert f"Tag: {tag}" in texts["WHEEL"]
    assert "for sm_80 sm_90 compute_90" in done.stdout + done.stderr
    compiled = [call for call in calls(tmp_path / "cuda") if " -c " in call]
    assert sorted(Path(call.split(" -c ")[1].split()[0]).name for call in compiled) == FILES

    for made in (tmp_path / "dist").iterdir():
        made.unlink()
    stale = source / "build/lib/delora_kernels"
    stale.mkdir(parents=True)
    (stale / cuda_library.NAME).write_text("old")
    done = build(source, "--wheel", CUDA_HOME=str(tmp_path / "nowhere"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tag, texts = wheel_of(source)
    assert (tag, list(texts)) == ("py3-none-any", ["WHEEL"])
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("delora-kernels:")]
    nvcc = tmp_path / "nowhere/bin/nvcc"
    assert line == (
        f"delora-kernels: without compiled CUDA kernels: CUDA_HOME is {tmp_path / 'nowhere'}, but there is no {nvcc} "
        "(DELORA_KERNELS_CUDA=1 makes this an error)"
    )


def test_install_with_a_broken_nvcc(tmp_path: Path) -> None:
    """The pure package is installed; where the kernels were demanded, nothing is, and the compiler's words are said."""
    source = copy_source(tmp_path, ("delora_kernels", "csrc"))
    home = toolkit(tmp_path / "cuda", FAILS["an_error_in_a_kernel"])
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-deps", "--no-index", "--no-build-isolation"]
    command += ["--target", str(target), str(source)]
    environment = os.environ | {"CUDA_HOME": str(home)}
    for demanded in ("1", ""):
        environment["DELORA_KERNELS_CUDA"] = demanded
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
        assert [line for line in said if "nvcc failed on" in line], said[-40:]
        assert (done.returncode != 0) == (demanded == "1"), said[-40:]
        assert ("more" in said) == (demanded == "1"), said[-40:]
        assert (target / "delora_kernels/__init__.py").exists() == (demanded != "1")
    assert not (target / LIBRARY).exists()


@pytest.mark.parametrize("what", FAILS)
def test_what_is_broken_is_said_in_one_line(what: str, tmp_path: Path) -> None:
    home, said = toolkit(tmp_path / "cuda", FAILS[what]), []
    target = tmp_path / "library"
    target.write_text("old")
    assert not build_if_wanted(target, {"CUDA_HOME": str(home)}, said.append)
    assert not target.exists()
    *_, reason = said
    assert reason.startswith("delora-kernels: without compiled CUDA kernels: ")
    assert len(reason.splitlines()) == 1
    expected = {
        "nothing_to_run": "nvcc can't be run: Exec format error",
        "no_host_compiler": "status 1: nvcc fatal   : Failed to preprocess host compiler properties.",
        "an_error_in_a_kernel": "status 2: route.cu(9): error: no such thing",
        "writes_nothing": "ended well but wrote no library",
    }
    assert expected[what] in reason
    with pytest.raises(BuildError, match=expected[what].replace("(", r"\(").replace(")", r"\)")):
        build_if_wanted(target, {"CUDA_HOME": str(home), "DELORA_KERNELS_CUDA": "1"}, said.append)


def test_forced_off_asks_no_compiler(tmp_path: Path) -> None:
    home, said = toolkit(tmp_path / "cuda"), []
    environment = {"CUDA_HOME": str(home), "DELORA_KERNELS_CUDA": "0"}
    assert not build_if_wanted(tmp_path / "library", environment, said.append)
    assert said == ["delora-kernels: without compiled CUDA kernels, as DELORA_KERNELS_CUDA=0 asks"]
    assert not (home / "log").exists()
    with pytest.raises(ValueError, match="DELORA_KERNELS_CUDA must be 0, 1 or not set, got 'yes'"):
        build_if_wanted(tmp_path / "library", environment | {"DELORA_KERNELS_CUDA": "yes"}, said.append)


def test_where_nvcc_is_looked_for(tmp_path: Path) -> None:
    first, second = toolkit(tmp_path / "first"), toolkit(tmp_path / "second")
    on_path = {"PATH": str(second / "bin")}
    assert find_nvcc({"CUDA_HOME": str(first)} | on_path) == str(first / "bin/nvcc")
    assert find_nvcc({"CUDA_PATH": str(first)} | on_path) == str(first / "bin/nvcc")
    assert find_nvcc(on_path) == str(second / "bin/nvcc")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        with pytest.raises(BuildError, match="nvcc is not on PATH nor in /usr/local/cuda"):
            find_nvcc({})


def test_files_are_compiled_in_parallel(tmp_path: Path) -> None:
    """As many at a time as MAX_JOBS says; what is left over goes to nvcc's own threads."""
    home, said = toolkit(tmp_path / "cuda", "sleep 0.1"), []
    assert build_if_wanted(tmp_path / "library", {"CUDA_HOME": str(home), "MAX_JOBS": "40"}, said.append)
    compiled = [call for call in calls(home) if " -c " in call]
    assert all(f"--threads={40 // len(FILES)}" in call for call in compiled)
    assert said[0].endswith(f"for sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120, {len(FILES)} at a time")
    assert len(said) == 1 + len(FILES)


@pytest.mark.parametrize(
    ("known", "asked", "expected"),
    [
        (KNOWN, "", "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120"),
        (("50", "75", "80", "86"), " ", "sm_75 sm_80 sm_86 compute_86"),
        (KNOWN, "8.0;9.0", "sm_80 sm_90"),
        (KNOWN, "7.0 7.5 8.0+PTX", "sm_75 sm_80 compute_80"),
        (KNOWN, "8.7 9.0a", "sm_87 sm_90a"),
        (KNOWN, "Hopper+PTX", "sm_90 compute_90"),
        (KNOWN, "Blackwell Blackwell", "sm_100 sm_120"),
    ],
)
def test_architectures(known: tuple[str, ...], asked: str, expected: str) -> None:
    assert " ".join(choose_targets(known, asked)) == expected


@pytest.mark.parametrize(
    ("known", "asked", "reason"),
    [
        (("52", "60"), "", "nvcc knows 52 60, none of those to compile for (75 80 86 89 90 100 120)"),
        (KNOWN, "7.0", "none of those to compile for (7.0)"),
        (KNOWN, "sm_80", "TORCH_CUDA_ARCH_LIST must be like '8.0 9.0+PTX', got 'sm_80'"),
        ((), "", "nvcc knows no architecture"),
    ],
)
def test_no_architecture_is_left(known: tuple[str, ...], asked: str, reason: str) -> None:
    with pytest.raises(BuildError) as caught:
        choose_targets(known, asked)
    assert reason in str(caught.value)
