"""Rows that pad the vocabulary take part in no softmax, whichever tensor-parallel ranks have
them."""

from __future__ import annotations

import pytest
import torch

from megatron_spdf.model import decoder

RANKS, ROWS = 4, 384


@pytest.mark.parametrize("vocab_size", [100, 192, 257, 288, 383, 384])
def test_the_logits_of_padding_are_hidden_on_ranks_that_have_nothing_else_too(monkeypatch,
                                                                              vocab_size):
    whole, parts = torch.randn(3, 2, ROWS, generator=torch.Generator().manual_seed(0)), []
    for rank, part in enumerate(whole.chunk(RANKS, -1)):
        monkeypatch.setattr(decoder.ps, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        parts.append(part.clone())
        decoder._hide_padding(vocab_size, None, None, (parts[-1], None))
    expected = whole.clone()
    expected[..., vocab_size:] = -torch.inf
    assert torch.equal(torch.cat(parts, -1), expected)
