"""Pages of the documentation: their blocks of code, and small models in the place of those that
they load.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>not run|needs): (?P<reason>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
_NAMES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
SMALL = {"vocab_size": 1000, "num_hidden_layers": 2, "num_key_value_heads": 2, **_NAMES}


class Block(NamedTuple):
    """One fenced block: its language, its text, its line, and why it isn't run or what it needs."""

    language: str
    text: str
    line: int
    not_run: str | None
    needs: str | None


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    whole = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for block in _BLOCK.finditer(whole):
        notes = {block["note"]: block["reason"]}
        line = whole.count("\n", 0, block.start("text")) + 1
        found.append(Block(block["language"], block["text"], line, notes.get("not run"), notes.get("needs")))
    assert whole.count("\n```") == 2 * len(found), f"{page}: a fence that is not read"
    return found


def run(page: str, block: Block, names: dict[str, Any]) -> None:
    """Run a block of Python in the namespace of the page; errors name the page's line."""
    code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec")
    exec(code, names)


def small_models(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Make what pages load with from_pretrained: Llamas, vision transformers and a tokenizer, small
    and at random, from configs.
    """
    import torch
    import transformers

    def llama(name: str, dtype: torch.dtype = torch.float32) -> Any:
        assert "/" in name
        config = transformers.LlamaConfig(**SMALL | sizes, tie_word_embeddings=True)  # as SmolLM2's are
        return transformers.LlamaForCausalLM(config).to(dtype)

    def vit(name: str, num_labels: int) -> Any:
        config = transformers.ViTConfig(
            **_NAMES, num_hidden_layers=2, image_size=32, patch_size=16, num_labels=num_labels
        )
        return transformers.ViTForImageClassification(config)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", llama)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer())
    monkeypatch.setattr(transformers.ViTForImageClassification, "from_pretrained", vit)


def tokenizer() -> Any:
    """Return a tokenizer of a few words."""
    import tokenizers
    import transformers

    words = {"<end>": 0, "a": 1, "prompt": 2, "what": 3, "should": 4, "follow": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<end>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
