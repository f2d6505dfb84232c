"""The sdist and the wheel: what they hold, their metadata, and that the wheel works where the
repository is not.
"""

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from package_source import IN_SDIST, ROOT, build, copy_source

import delora_kernels
from delora_kernels.diagnostics import versions

pytest.importorskip("build")

VERSION = delora_kernels.__version__


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel made from it, of a copy of the repository, without a network."""
    folder = tmp_path_factory.mktemp("package")
    done = build(copy_source(folder), DELORA_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SetuptoolsDeprecationWarning" not in done.stdout + done.stderr
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def metadata(built: tuple[Path, Path]) -> Message:
    """The wheel's METADATA."""
    with zipfile.ZipFile(built[1]) as archive:
        text = archive.read(f"delora_kernels-{VERSION}.dist-info/METADATA").decode()
    return email.message_from_string(text)


def _files(*folders: str) -> set[str]:
    """The repository's files under these folders."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    left_out = ("__pycache__", "/.", ".egg-info", ".so")
    return {name for name in names if not any(part in name for part in left_out)}


def test_names(built: tuple[Path, Path]) -> None:
    assert [path.name for path in built] == [
        f"delora_kernels-{VERSION}.tar.gz",
        f"delora_kernels-{VERSION}-py3-none-any.whl",
    ]


def test_wheel_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    info = f"delora_kernels-{VERSION}.dist-info"
    kernels = {f"delora_kernels/{name}" for name in _files("csrc") if Path(name).suffix in (".cu", ".cuh", ".h")}
    kernels = {name for name in kernels if "host_shim" not in name}
    assert "delora_kernels/csrc/delora_kernels.h" in kernels
    assert {name for name in names if not name.startswith(f"{info}/")} == _files("delora_kernels") | kernels
    assert "delora_kernels/py.typed" in names
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names


def test_sdist_holds_what_tests_and_documents_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert _files(*IN_SDIST) <= names
    files = {"LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"}
    assert files | {"setup.py", "constraints.txt", "constraints-oldest.txt"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".so")) or "__pycache__" in name]


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "delora-kernels"
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    assert metadata["Requires-Python"] == f">={versions.TABLE['python'].oldest}"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()  # type: ignore[union-attr]
    assert {"LoRA", "DoRA", "DeLoRA", "PEFT"} <= set(metadata["Keywords"].split(","))
    assert metadata.get_all("Provides-Extra") == [
        "peft",
        "trl",
        "bnb",
        "torchao",
        "hqq",
        "bench",
        "claims",
        "docs",
        "test",
        "dev",
    ]
    classifiers = metadata.get_all("Classifier") or []
    assert "Typing :: Typed" in classifiers
    assert [name for name in classifiers if name.startswith("Operating System")] == [
        "Operating System :: POSIX :: Linux"
    ]
    assert not [name for name in classifiers if name.startswith("License")], "the license expression says it"


def test_requirements_are_the_supported_ranges(metadata: Message) -> None:
    requirements = metadata.get_all("Requires-Dist") or []
    always = [requirement for requirement in requirements if "extra" not in requirement]
    assert sorted(always) == ["numpy", "packaging", f"torch>={versions.TABLE['torch'].oldest}", "tqdm>=4.60"]
    of_peft = sorted(name.partition(";")[0] for name in requirements if name.endswith('extra == "peft"'))
    assert of_peft == [f"{name}>={versions.TABLE[name].oldest}" for name in ("peft", "transformers")]


def test_wheel_works_outside_the_repository(built: tuple[Path, Path], tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--quiet", "--no-compile", "--no-deps", "--no-index", "--target", str(target), str(built[1])]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=300)
    environment = {name: value for name, value in os.environ.items() if name != "DELORA_KERNELS_BACKEND"}
    environment["PYTHONPATH"] = str(target)
    code = (
        "import torch, delora_kernels as dk; from importlib.metadata import version\n"
        "print(dk.__file__, version('delora-kernels'), dk.accelerate.__module__)\n"
        "x, W, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)\n"
        "print(dk.functional.lora_linear(x, W, A, B).tolist())\n"
        "import runpy; from delora_kernels import ops; from delora_kernels.diagnostics import check\n"
        "check.METHODS = {'lora': check.METHODS['lora']}; ops.NAMES = ops.NAMES[:1]\n"
        "dk.functional.CALLS = {'lora_linear': dk.functional.CALLS['lora_linear']}\n"
        "runpy.run_module('delora_kernels', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "check", "--device", "cpu", "--dtype", "float32"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = [f"{target}/delora_kernels/__init__.py {VERSION} ", "[[6.0, 6.0, 6.0, 6.0]", "all within their limits"]
    assert all(text in done.stdout for text in expected), done.stdout
