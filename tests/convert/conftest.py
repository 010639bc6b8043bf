from pathlib import Path

import pytest
from small_models import make_tokenizer, write_gpt2

from megatron_spdf.data.tokenizers.tokenizer import Tokenizer


@pytest.fixture
def gpt2(tmp_path) -> Path:
    return write_gpt2(tmp_path / "gpt2")


@pytest.fixture
def tokenizer() -> Tokenizer:
    """259 tokens."""
    return make_tokenizer()
