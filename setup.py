"""Packaging of delora_kernels: a pure Python wheel; settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "delora_kernels/version.py").read_text(encoding="utf-8"))[1]

PEFT = ["peft>=0.18", "transformers>=4.56"]
TRL = [*PEFT, "trl>=0.22"]
BENCH = [*PEFT, "gguf>=0.10", "matplotlib", "pytest-benchmark", "rich"]
TEST = ["build", "hypothesis", "pytest", "pytest-benchmark", "pytest-xdist", "safetensors", "setuptools>=77", *TRL]
TEST += ["triton>=3.3; platform_system == 'Linux'"]  # the CPU builds of torch come without
DEV = [*BENCH, *TEST, "mypy", "ruff"]

setup(
    name="delora-kernels",
    version=VERSION,
    description="Fused low-rank adapters for PyTorch: LoRA, DoRA and DeLoRA",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords=["LoRA", "DoRA", "DeLoRA", "PEFT", "adapters", "fine-tuning", "PyTorch", "kernels"],
    packages=find_packages(include=["delora_kernels", "delora_kernels.*"]),
    package_data={"delora_kernels": ["py.typed"]},
    python_requires=">=3.10",  # this and the lower bounds of torch, PEFT and Transformers: integrations/supported.py
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
