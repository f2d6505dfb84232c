"""Compiling the kernels, by build-cuda and while the package is built: a script plays nvcc, a good
and a broken one.

The real compiler's turn is `make test-cuda-build`.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fake_nvcc import FAILS, KNOWN, calls, gpus, toolkit
from package_source import ROOT, build, copy_source

from delora_kernels import __version__
from delora_kernels.__main__ import main
from delora_kernels.backends.cuda import build as cuda_build
from delora_kernels.backends.cuda import library as cuda_library
from delora_kernels.backends.cuda.build import LIBRARY, BuildError, choose_targets, find_nvcc, visible_gpus

pytest.importorskip("build")

FILES = sorted(file.name for file in (ROOT / "csrc").glob("*.cu"))
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation")
IN_WHEEL = f"delora_kernels/{LIBRARY}"


def wheel_of(source: Path) -> tuple[str, dict[str, str]]:
    """Return the one wheel's tag, and its files that matter here with their text."""
    (wheel,) = (source.parent / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        kept = [name for name in archive.namelist() if name == IN_WHEEL or name.endswith("/WHEEL")]
        texts = {name.rpartition("/")[2]: archive.read(name).decode() for name in kept}
    return wheel.name.removeprefix(f"delora_kernels-{__version__}-").removesuffix(".whl"), texts


def build_cuda(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `build-cuda` of the package installed in `folder`."""
    kept = ("HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {"PATH": "/usr/bin:/bin"}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "delora_kernels", "build-cuda", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)


def test_the_wheel_has_the_library_where_it_is_asked_for(tmp_path: Path) -> None:
    """It then serves every Python 3; a pure one made later in the same folder has no left-over
    library.
    """
    source = copy_source(tmp_path, ("delora_kernels", "csrc"))
    home = str(toolkit(tmp_path / "cuda"))
    done = build(source, "--wheel", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX", DELORA_KERNELS_CUDA="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tag, texts = wheel_of(source)
    assert tag.startswith("py3-none-")
    assert tag != "py3-none-any"
    assert texts[LIBRARY].startswith("-shared --cudart=static")
    assert "Root-Is-Purelib: false" in texts["WHEEL"]
    assert f"Tag: {tag}" in texts["WHEEL"]
    assert "for sm_80 sm_90 compute_90" in done.stdout + done.stderr
    compiled = [call for call in calls(tmp_path / "cuda") if " -c " in call]
    assert sorted(Path(call.split(" -c ")[1].split()[0]).name for call in compiled) == FILES

    for made in (tmp_path / "dist").iterdir():
        made.unlink()
    stale = source / "build/lib/delora_kernels"
    stale.mkdir(parents=True, exist_ok=True)
    (stale / LIBRARY).write_text("old")
    done = build(source, "--wheel", CUDA_HOME=home)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert wheel_of(source) == (
        "py3-none-any",
        {"WHEEL": texts["WHEEL"].replace("false", "true").replace(tag, "py3-none-any")},
    )
    assert calls(tmp_path / "cuda")[-1].startswith("-shared"), "nobody asked, so the compiler was not called again"


def test_an_install_never_compiles_by_itself_and_build_cuda_does_later(tmp_path: Path) -> None:
    """With nvcc and a GPU there, pip installs the pure package; it then has all that build-cuda
    needs.
    """
    source, home = copy_source(tmp_path, ("delora_kernels", "csrc")), toolkit(tmp_path / "cuda")
    installed = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-compile", *OFFLINE]
    command += ["--target", str(installed), str(source)]
    path = f"{home / 'bin'}:{gpus(tmp_path / 'smi', '8.0', '9.0', '8.0')}:/usr/bin:/bin"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DELORA_KERNELS_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=inherited | {"PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (home / "log").exists()
    assert not list(installed.rglob(f"*{Path(LIBRARY).suffix}"))

    done = build_cuda(installed, PATH=path)
    assert "for sm_80 sm_90, " in done.stdout, done.stdout + done.stderr
    assert f"delora-kernels: {installed / IN_WHEEL} (0.0 MB, " in done.stdout
    compiled = [call.split(" -c ")[1].split()[0] for call in calls(home) if " -c " in call]
    assert sorted(compiled) == [str(installed / "delora_kernels/csrc" / name) for name in FILES]
    # What the script wrote is no library: the package finds it, tries it, and says so.
    assert done.returncode == 1
    assert f"found {installed / IN_WHEEL}, which does not load" in done.stderr


def test_what_build_cuda_compiles_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = toolkit(tmp_path / "cuda")
    for name, value in {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    for name in ("CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_library, "new_path", lambda: tmp_path / "library")
    assert main(["build-cuda"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "python -m delora_kernels build-cuda: no GPU is visible to compile for (there is no nvidia-smi): name the "
        "architectures, as in --arch '8.0 9.0+PTX' or TORCH_CUDA_ARCH_LIST='8.0 9.0+PTX'; all: every one"
    ]
    assert not (tmp_path / "library").exists()
    main(["build-cuda", "--arch", "7.5", "9.0+PTX"])
    assert "for sm_75 sm_90 compute_90, " in capsys.readouterr().out
    assert (tmp_path / "library").exists()


def test_a_demanded_library_that_can_not_be_compiled_stops_the_install(tmp_path: Path) -> None:
    source = copy_source(tmp_path, ("delora_kernels", "csrc"))
    home = toolkit(tmp_path / "cuda", FAILS["an_error_in_a_kernel"])
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-compile", *OFFLINE]
    command += ["--target", str(target), str(source)]
    environment = os.environ | {"CUDA_HOME": str(home), "DELORA_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
    assert [line for line in said if "nvcc failed on" in line], said[-40:]
    assert done.returncode != 0
    assert "more" in said, said[-40:]
    assert not target.exists()


@pytest.mark.parametrize("what", FAILS)
def test_what_is_broken_is_said_in_one_line(what: str, tmp_path: Path) -> None:
    """And what was there before stays."""
    home, target = toolkit(tmp_path / "cuda", FAILS[what]), tmp_path / "library"
    target.write_text("old")
    expected = {
        "nothing_to_run": "nvcc can't be run: Exec format error",
        "no_host_compiler": "status 1: nvcc fatal   : Failed to preprocess host compiler properties.",
        "an_error_in_a_kernel": "status 2: route.cu(9): error: no such thing",
        "writes_nothing": "ended well but wrote no library",
    }
    with pytest.raises(BuildError) as caught:
        cuda_build.build(target, {"CUDA_HOME": str(home)}, print, "8.0")
    assert expected[what] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert target.read_text() == "old"
    assert list(tmp_path.glob("library*")) == [target]


def test_a_variable_that_says_neither_yes_nor_no(tmp_path: Path) -> None:
    source = copy_source(tmp_path, ("delora_kernels", "csrc"))
    done = build(source, "--wheel", DELORA_KERNELS_CUDA="yes")
    assert done.returncode != 0
    assert "DELORA_KERNELS_CUDA must be 0, 1 or not set, got 'yes'" in done.stdout + done.stderr


def test_which_gpus_are_visible(tmp_path: Path) -> None:
    assert visible_gpus({"PATH": str(gpus(tmp_path / "two", "8.6", "12.0", "8.6"))}) == ["8.6", "12.0"]
    for folder, said, why in (
        (gpus(tmp_path / "none"), "", "nvidia-smi says: nothing"),
        (gpus(tmp_path / "old", "[N/A]"), "", r"nvidia-smi says: \[N/A\]"),
        (gpus(tmp_path / "broken", fails="no driver"), "", "failed with status 9: no driver"),
        (tmp_path, "", "there is no nvidia-smi"),
    ):
        with pytest.raises(BuildError, match=rf"no GPU is visible to compile for \(.*{why}\): name the arch.*{said}"):
            visible_gpus({"PATH": str(folder)})


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
    cuda_build.build(tmp_path / "library", {"CUDA_HOME": str(home), "MAX_JOBS": "40"}, said.append, "all")
    compiled = [call for call in calls(home) if " -c " in call]
    assert all(f"--threads={40 // len(FILES)}" in call for call in compiled)
    assert said[0].endswith(f"for sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120, {len(FILES)} at a time")
    assert len(said) == 1 + len(FILES) + 1


@pytest.mark.parametrize(
    ("known", "asked", "expected"),
    [
        (KNOWN, "all", "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120"),
        (("50", "75", "80", "86"), " ALL", "sm_75 sm_80 sm_86 compute_86"),
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
        (("52", "60"), "all", "nvcc knows 52 60, none of those to compile for (75 80 86 89 90 100 120)"),
        (KNOWN, "7.0", "none of those to compile for (7.0)"),
        (KNOWN, "sm_80", "architectures must be like '8.0 9.0+PTX' or 'all', got 'sm_80'"),
        ((), "all", "nvcc knows no architecture"),
    ],
)
def test_no_architecture_is_left(known: tuple[str, ...], asked: str, reason: str) -> None:
    with pytest.raises(BuildError) as caught:
        choose_targets(known, asked)
    assert reason in str(caught.value)
