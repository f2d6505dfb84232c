"""Packaging of delora_kernels; settings of the tools are in pyproject.toml.

The wheel is pure Python, or where nvcc is, Python and one library of compiled kernels that serves every Python and
every torch of the platform (csrc/nvcc_build.py, which has the environment variables). An editable install leaves the
library alone unless DELORA_KERNELS_CUDA=1 asks for it: `make cuda` compiles it in place.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import nvcc_build  # noqa: E402

VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "delora_kernels/version.py").read_text(encoding="utf-8"))[1]

PEFT = ["peft>=0.18", "transformers>=4.56"]
TRL = [*PEFT, "trl>=0.22"]
BENCH = [*PEFT, "gguf>=0.10", "matplotlib", "pytest-benchmark", "rich"]
TEST = ["build", "hypothesis", "pytest", "pytest-benchmark", "pytest-xdist", "safetensors", "setuptools>=77", *TRL]
TEST += ["triton>=3.3; platform_system == 'Linux'"]  # the CPU builds of torch come without
DEV = [*BENCH, *TEST, "mypy", "ruff"]


class BuildCuda(Command):
    """Compile the CUDA kernels into the package that is built, where nvcc can (a step of `build`)."""

    description = "compile the CUDA kernels"
    user_options = []  # noqa: RUF012
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        if not self.editable_mode or os.environ.get("DELORA_KERNELS_CUDA") == "1":
            nvcc_build.build_if_wanted(self._target(), os.environ, self._say)

    def _target(self) -> Path:
        return (ROOT if self.editable_mode else Path(self.build_lib or "")) / "delora_kernels" / nvcc_build.LIBRARY

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in has them

    def get_outputs(self) -> list[str]:
        return [str(self._target())] if self._target().exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """`build`, and the kernels."""

    sub_commands = [*build.sub_commands, ("build_cuda", None)]  # noqa: RUF012


class Wheel(bdist_wheel):
    """A wheel for every Python 3: of one platform where it has the library, else of all."""

    def get_tag(self) -> tuple[str, str, str]:
        if not Path(self.bdist_dir, "delora_kernels", nvcc_build.LIBRARY).exists():
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
    packages=find_packages(include=["delora_kernels", "delora_kernels.*"]),
    package_data={"delora_kernels": ["py.typed"]},
    python_requires=">=3.10",  # this and the lower bounds of torch, PEFT and Transformers: diagnostics/versions.py
    install_requires=["numpy", "packaging", "torch>=2.7", "tqdm>=4.60"],
    extras_require={"peft": PEFT, "trl": TRL, "bench": BENCH, "test": TEST, "dev": DEV},
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
