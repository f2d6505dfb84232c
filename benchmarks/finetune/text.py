"""The text: documents, a held-out split that shares no paragraph with the training part, blocks of
tokens.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune.config import Problem

HELD_OUT = 0.1


def documents(files: Sequence[Path] = ()) -> list[str]:
    """Return the texts of `files`, or without any the standard library's pydoc topics (some 465 000
    characters).
    """
    if files:
        return [_read(path) for path in files]
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _read(path: Path) -> str:
    """Return the text of one file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise Problem(f"cannot read text file {path}: {error.strerror}") from None


def split(texts: Sequence[str], held_out: float = HELD_OUT) -> tuple[list[str], list[str]]:
    """Hold out the last part of each text, cut between paragraphs.

    A paragraph that several texts repeat is kept once, so that nothing held out was trained on.

    Args:
        texts: the documents.
        held_out: the share of each document's characters to hold out.

    Returns:
        The training texts and the held-out texts, without empty ones.
    """
    seen: set[str] = set()
    train, test = [], []
    for text in texts:
        fresh = []
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        cut = (1.0 - held_out) * sum(map(len, fresh))
        done, kept = 0, 0
        for paragraph in fresh:
            kept += done < cut
            done += len(paragraph)
        train.append("\n\n".join(fresh[:kept]))
        test.append("\n\n".join(fresh[kept:]))
    return [text for text in train if text], [text for text in test if text]


def blocks(texts: Sequence[str], tokenizer: Any, seq_len: int) -> torch.Tensor:
    """Token ids of the texts, joined by the end-of-text token and cut into rows of `seq_len`.

    Args:
        texts: the documents.
        tokenizer: a Transformers tokenizer.
        seq_len: tokens per row; a shorter rest is dropped.

    Returns:
        `[rows, seq_len]` int64.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + end
    rows = len(ids) // seq_len
    return torch.tensor(ids[: rows * seq_len], dtype=torch.int64).view(rows, seq_len)


def batches(rows: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches `[batch_size, seq_len]`: every row once per epoch, in an order drawn from
    `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        yield rows[order[:batch_size]]
        order = order[batch_size:]


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` rows, evenly spread over all of them."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]
