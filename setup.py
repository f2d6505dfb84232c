"""Packaging of delora_kernels: a pure Python wheel; settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "delora_kernels/version.py").read_text(encoding="utf-8"))[1]

PEFT = ["peft>=0.18", "transformers>=4.56"]
BENCH = [*PEFT, "gguf>=0.10", "matplotlib", "pytest-benchmark", "rich", "tqdm"]
TEST = ["hypothesis", "mypy", "pytest", "pytest-benchmark", "pytest-xdist", "ruff", "safetensors"]

setup(
    name="delora-kernels",
    version=VERSION,
    description="Fused low-rank adapters for PyTorch: LoRA, DoRA and DeLoRA",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["delora_kernels", "delora_kernels.*"]),
    package_data={"delora_kernels": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["numpy", "torch>=2.7"],
    extras_require={"peft": PEFT, "bench": BENCH, "test": TEST},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
