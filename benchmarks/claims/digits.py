"""The task on digits: a small vision transformer that has learned scikit-learn's digits, moved to
the same digits turned by a quarter and inverted.

Each seed draws its own split: 700 images to pretrain on as they are; 400 turned ones to adapt to,
197 to choose on (validation), 500 to report on (test). No image is in two parts. Only the linears
of the blocks are adapted; full fine-tuning trains all that the model has. The data are read from
the file in the installed package, which is not imported: doing so would need SciPy.
"""

import functools
import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.claims.task import Problem, Split, Task
from benchmarks.claims.vit import VisionTransformer, learn

PRETRAIN, TRAIN, VALIDATION = 700, 400, 197
PRETRAIN_STEPS, PRETRAIN_LR, BATCH = 600, 2e-3, 32


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1797 images `[1797, 8, 8]`, values from 0 to 1, and their digits.

    Raises:
        Problem: scikit-learn is not installed.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise Problem("the digits are missing: pip install --no-deps scikit-learn")
    file = Path(package.submodule_search_locations[0], "datasets/data/digits.csv.gz")
    with gzip.open(file) as text:
        table = torch.from_numpy(np.loadtxt(text, delimiter=",", dtype=np.float32))
    return table[:, :64].view(-1, 8, 8) / 16, table[:, 64].long()


def drawn() -> tuple[Tensor, Tensor]:
    """Return 300 noisy images of ten random patterns, for the smoke run: no package is needed."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 10
    patterns = torch.rand(10, 8, 8, generator=generator)
    return patterns[y] + 0.1 * torch.randn(300, 8, 8, generator=generator), y


def shifted(x: Tensor) -> Tensor:
    """Turn by a quarter, invert."""
    return 1 - x.rot90(1, (1, 2))


def split(seed: int, x: Tensor, y: Tensor, sizes: tuple[int, int, int]) -> dict[str, Split]:
    """Deal the images to "pretrain" (as they are), "train", "validation" and "test" (shifted).

    Args:
        seed: draws the order.
        x, y: the images and their classes.
        sizes: of the first three parts; the rest is for the test.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(torch.tensor(sizes).cumsum(0))
    names = ("pretrain", "train", "validation", "test")
    return {
        name: Split(x[part] if name == "pretrain" else shifted(x[part]), y[part])
        for name, part in zip(names, parts, strict=True)
    }


@functools.lru_cache(maxsize=16)
def digits(seed: int) -> Task:
    """Return the task of one seed, its model pretrained."""
    parts = split(seed, *images(), (PRETRAIN, TRAIN, VALIDATION))
    return _task(seed, parts, PRETRAIN_STEPS, VisionTransformer)


@functools.lru_cache(maxsize=16)
def smoke(seed: int) -> Task:
    """Return a task of the same form that takes no time."""
    return _task(
        seed, split(seed, *drawn(), (100, 80, 60)), 10, functools.partial(VisionTransformer, width=16, blocks=1)
    )


def _task(seed: int, parts: dict[str, Split], steps: int, make: Callable[[], nn.Module]) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        learn(model, parts["pretrain"], steps, PRETRAIN_LR, BATCH)
    return Task(model.requires_grad_(False).eval(), parts, BATCH)
