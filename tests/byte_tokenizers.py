"""Tokenizers of bytes, without merges, as Hugging Face keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def write_byte_tokenizer(directory: Path, special: Sequence[str], begin: str, end: str,
                         puts_begin: bool = False) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        special: tokens that come first, by id.
        begin, end: of them, declared as those of a text.
        puts_begin: whether a text gets the first of the two.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    if puts_begin:
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, special.index(begin))])
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}))
