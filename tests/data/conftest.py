from pathlib import Path

import pytest
from text_shards import records


@pytest.fixture(scope="session")
def tiny_bpe(tmp_path_factory) -> Path:
    """Directory of a byte-level BPE of 300 tokens."""
    from megatron_spdf.data.tokenizers.tokenizer import train_tokenizer

    directory = tmp_path_factory.mktemp("tiny") / "bpe"
    train_tokenizer("bpe", [r["text"] for r in records(50)], 300, directory)
    return directory
