"""Text on its way through the layers of a model that is pruned: each sequence in one batch, and
their mean loss."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_spdf.convert import layerwise_pruning
from megatron_spdf.convert.layerwise_pruning import _batches, _Stream


@pytest.mark.parametrize(("tokens", "sizes"), [(24, [3, 3, 1]), (8, [1] * 7), (7, [1] * 7),
                                               (56, [7]), (2048, [7])])
def test_every_sequence_is_in_one_batch(monkeypatch, tokens, sizes):
    monkeypatch.setattr(layerwise_pruning, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(layerwise_pruning, "IndexedTokens", lambda prefix, rows: SimpleNamespace(
        read=lambda start, count: (start, count)))
    boundaries = SimpleNamespace(sample=lambda read: {"start": torch.tensor(read[0]),
                                                      "count": torch.tensor(read[1])})
    starts = np.array([0, 40, 8, 16, 80, 24, 96])
    sequences = SimpleNamespace(prefix="p", length=8, starts=starts)
    found = _batches(sequences, boundaries, SimpleNamespace(vocab_size=9))
    assert [len(batch["start"]) for batch in found] == sizes
    assert torch.cat([batch["start"] for batch in found]).tolist() == starts.tolist()
    assert set(torch.cat([batch["count"] for batch in found]).tolist()) == {9}
    assert _batches(None, boundaries, SimpleNamespace(vocab_size=9)) == []


def test_the_loss_is_the_mean_over_the_tokens_that_count():
    """Of batches of different sizes, after layers that add one."""
    class Decoder:
        def embed(self, micro):
            return micro["x"], None

        def forward(self, hidden, extras):
            return hidden + 1.0

        def loss(self, hidden, micro):
            return (hidden * micro["loss_mask"]).sum()

    batches = [{"x": torch.tensor([1.0, 2.0, 3.0]), "loss_mask": torch.tensor([1.0, 1.0, 0.0])},
               {"x": torch.tensor([10.0]), "loss_mask": torch.tensor([1.0])}]
    stream = _Stream(Decoder(), batches, torch.device("cpu"))
    assert stream.loss() == pytest.approx(13.0 / 3)
    stream.advance()
    assert stream.loss() == pytest.approx(16.0 / 3)
    assert [hidden.tolist() for hidden in stream.outputs()] == [[3.0, 4.0, 5.0], [12.0]]
