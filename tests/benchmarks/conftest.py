"""A tiny model on disk, for the benchmarks that train one."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks and a byte-level BPE tokenizer of 300 tokens, saved as a user
    would save them.
    """
    import tokenizers
    import torch
    import transformers

    from benchmarks.finetune import text

    folder = tmp_path_factory.mktemp("tiny")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.documents()[:10], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=300, num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
