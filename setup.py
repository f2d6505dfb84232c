"""Packaging of delora_kernels; settings of the tools are in pyproject.toml.

The wheel is pure Python, and holds the sources of the CUDA kernels for `python -m delora_kernels
build-cuda`. With DELORA_KERNELS_CUDA=1 they are compiled here, into a wheel that serves every
Python and every torch of the platform, or into the package in place for an editable install
(backends/cuda/build.py has the other variables).
"""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location("cuda_build", ROOT / "delora_kernels/backends/cuda/build.py")
cuda_build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cuda_build)  # by its path, for the package imports torch

VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "delora_kernels/version.py").read_text(encoding="utf-8"))[1]

PEFT = ["peft>=0.18", "transformers>=4.56"]
TRL = [*PEFT, "trl>=0.22"]
BNB = [*PEFT, "bitsandbytes>=0.50"]
TORCHAO = [*PEFT, "torchao>=0.18"]
HQQ = [*PEFT, "hqq>=0.2.8"]
BENCH = [*PEFT, "gguf>=0.10", "matplotlib", "pytest-benchmark", "rich"]
CLAIMS = [*BENCH, "scikit-learn>=1.0"]  # for its file of digits alone: python -m benchmarks.claims
TEST = ["build", "hypothesis", "pytest", "pytest-benchmark", "pytest-xdist", "safetensors", "setuptools>=77", *TRL]
TEST += ["triton>=3.3; platform_system == 'Linux'"]  # the CPU builds of torch come without
TEST += ["onnxscript; python_version >= '3.11'"]  # torch.onnx.export asks for it; its tests skip without
DOCS = (ROOT / "requirements-docs.txt").read_text(encoding="utf-8").split()
DEV = [*BENCH, *TEST, "mypy", "ruff"]  # without the three libraries: PEFT 0.18 fails beside torchao 0.18


class BuildCuda(Command):
    """Put the CUDA kernels' sources into the package, and where that is asked for, the compiled
    library.
    """

    description = "add the CUDA kernels: their sources, and with DELORA_KERNELS_CUDA=1 the library"
    user_options = []  # noqa: RUF012
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))
        wanted = os.environ.get("DELORA_KERNELS_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise ValueError(f"DELORA_KERNELS_CUDA must be 0, 1 or not set, got {wanted!r}")
        self.compiles = wanted == "1"

    def run(self) -> None:
        package = self._package()
        if not self.editable_mode:
            shutil.rmtree(package / "csrc", ignore_errors=True)
            (package / cuda_build.LIBRARY).unlink(missing_ok=True)  # an earlier build's, in the same folder
            (package / "csrc").mkdir(parents=True)
            for file in self._sources():
                shutil.copy(file, package / "csrc" / file.name)
        if self.compiles:
            self._compile(package / cuda_build.LIBRARY)

    def _compile(self, target: Path) -> None:
        try:
            cuda_build.build(target, os.environ, self._say)
        except cuda_build.BuildError as error:
            self._say(error.details)
            raise

    def _package(self) -> Path:
        return (ROOT if self.editable_mode else Path(self.build_lib or "")) / "delora_kernels"

    def _sources(self) -> list[Path]:
        return sorted(file for file in (ROOT / "csrc").iterdir() if file.suffix in (".cu", ".cuh", ".h"))

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in has them

    def get_outputs(self) -> list[str]:
        if self.editable_mode:
            return []
        made = [self._package() / "csrc" / file.name for file in self._sources()]
        return [str(file) for file in [*made, *[self._package() / cuda_build.LIBRARY] * self.compiles]]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """`build`, and the kernels."""

    sub_commands = [*build.sub_commands, ("build_cuda", None)]  # noqa: RUF012


class Wheel(bdist_wheel):
    """A wheel for every Python 3: of one platform where it has the library, else of all."""

    def get_tag(self) -> tuple[str, str, str]:
        if not Path(self.bdist_dir, "delora_kernels", cuda_build.LIBRARY).exists():
            return super().get_tag()
        self.root_is_pure = False  # not before: until here it says where files are installed
        return "py3", "none", super().get_tag()[2]


setup(
    name="delora-kernels",
    version=VERSION,
    description="Fused low-rank adapters for PyTorch: LoRA, DoRA and DeLoRA",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords=["LoRA", "DoRA", "DeLoRA", "PEFT", "adapters", "fine-tuning", "PyTorch", "kernels"],
    cmdclass={"build": Build, "build_cuda": BuildCuda, "bdist_wheel": Wheel},
    package_dir={"": "."},  # so an editable install is a line in a .pth file, which type checkers follow
    packages=find_packages(include=["delora_kernels", "delora_kernels.*"]),
    package_data={"delora_kernels": ["py.typed"]},
    python_requires=">=3.10",  # this and the lower bounds of torch, PEFT and Transformers: diagnostics/versions.py
    install_requires=["numpy", "packaging", "torch>=2.7", "tqdm>=4.60"],
    extras_require={
        "peft": PEFT,
        "trl": TRL,
        "bnb": BNB,
        "torchao": TORCHAO,
        "hqq": HQQ,
        "bench": BENCH,
        "claims": CLAIMS,
        "docs": DOCS,
        "test": TEST,
        "dev": DEV,
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
