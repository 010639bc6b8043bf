"""A third of a small corpus in the Pile's format, against a plain loop in one thread."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from backports import zstd
from text_shards import GPT2, HAS_PILE, NO_PILE, PILE

from megatron_spdf.data.indexed.inspect import verify
from megatron_spdf.data.preprocess.preprocess import preprocess
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PILE, reason=NO_PILE)
def test_every_token_is_that_of_a_plain_loop(tmp_path):
    """The reference reads OpenAI's two files by tiktoken's own function and knows nothing of
    ours."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = data_gym_to_mergeable_bpe_ranks(str(GPT2 / "vocab.bpe"), str(GPT2 / "encoder.json"))
    reference = tiktoken.Encoding("reference", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                  special_tokens={})
    shards = sorted(PILE.glob("*.jsonl.zst"))[::3]
    manifest = preprocess(shards, tmp_path / "all", load_tokenizer(GPT2), workers=2)
    ours, start, documents = np.fromfile(tmp_path / "all.bin", np.uint16), 0, 0
    for shard, source in zip(shards, manifest.sources, strict=True):
        lines = io.TextIOWrapper(zstd.open(shard), encoding="utf-8", newline="\n")
        expected = [[*reference.encode_ordinary(json.loads(line)["text"]), 50256] for line in lines]
        there = np.concatenate(expected).astype(np.uint16)
        assert (source.documents, source.tokens) == (len(expected), len(there))
        assert np.array_equal(ours[start : start + len(there)], there), shard
        start, documents = start + len(there), documents + len(expected)
    assert (manifest.documents, manifest.tokens, manifest.skipped) == (documents, start,
                                                                       0) and start == len(ours)
    assert verify(tmp_path / "all") == []
