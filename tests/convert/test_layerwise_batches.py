"""Text on its way through the layers of a model that is pruned: each sequence in one batch, and
their mean loss; and which copy of its weights is pruned."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_spdf.convert import layerwise_pruning
from megatron_spdf.convert.layerwise_pruning import LayerwisePruning, _batches, _Stream


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


def test_the_most_precise_copy_of_a_weight_is_pruned(monkeypatch):
    """Of a checkpoint in bf16 the optimizer's values, which tell apart what is equal in bf16."""
    precise = torch.tensor([[1.0, 1.0 + 1e-4], [1.0 + 2e-4, 1.0 - 1e-4]])
    assert precise.bfloat16().unique().numel() == 1

    class Decoder:
        def __init__(self, recipe, read):
            self.parameter = read

    monkeypatch.setattr(layerwise_pruning, "LayerByLayer", Decoder)
    monkeypatch.setattr(layerwise_pruning, "boundaries_of", lambda recipe, tokenizer: None)
    monkeypatch.setattr(layerwise_pruning, "join_slices", lambda masks, planned: masks[0])
    source = SimpleNamespace(model=SimpleNamespace(layers=1),
                             weights={"w": SimpleNamespace(name="w", layer=0)},
                             weight=lambda name: precise.bfloat16(),
                             master=lambda name: precise.clone())
    text = SimpleNamespace(calibrate=None, evaluate=None, tokenizer=None)
    pruning = LayerwisePruning(source, None, SimpleNamespace(weights={"w": None}),
                               SimpleNamespace(calibrated=False),
                               lambda name, dense, _: (dense, np.ones((1, 2, 2), dtype=bool)),
                               text, torch.device("cpu"))
    values, _ = pruning.of("w")
    assert torch.equal(values, precise)
