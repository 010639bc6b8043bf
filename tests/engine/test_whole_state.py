"""What a save takes of masks that move while it is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch import nn

from megatron_spdf.engine import whole_state
from megatron_spdf.engine.whole_state import WholeState


def test_masks_are_saved_as_they_were_when_the_save_began(monkeypatch):
    model = nn.Module()
    model.register_buffer("mask_bits", torch.arange(6, dtype=torch.uint8).view(2, 3))
    model.sharded_state_dict = lambda metadata: {
        "mask_bits": ShardedTensor.from_rank_offsets("w.mask_bits", model.mask_bits,
                                                     replica_id=(0, 0, 0))}
    monkeypatch.setattr(whole_state, "model_metadata", lambda: {})
    monkeypatch.setattr(whole_state.ps, "get_data_parallel_group",
                        lambda: SimpleNamespace(rank=lambda: 0, size=lambda: 1))
    state = WholeState(model, SimpleNamespace(saved=(), states=()))
    (saved,) = state.to_save()["model"]["masks"].values()
    model.mask_bits.zero_()
    assert saved.key == "w.mask_bits" and saved.data.tolist() == [[0, 1, 2], [3, 4, 5]]
    (wanted,) = state.to_load()["masks"].values()
    assert wanted.data.data_ptr() == model.mask_bits.data_ptr()  # is read into in place


@pytest.mark.parametrize("rank", [0, 1])
def test_replicas_share_what_they_save(monkeypatch, rank):
    """Each of two data-parallel ranks takes one of two masks of a size."""
    model = nn.Module()
    for name in "ab":
        model.register_buffer(name, torch.ones(2, 3, dtype=torch.uint8))
    model.sharded_state_dict = lambda metadata: {
        name: ShardedTensor.from_rank_offsets(f"{name}.mask_bits", bits, replica_id=(0, 0, rank))
        for name, bits in model.named_buffers()}
    monkeypatch.setattr(whole_state, "model_metadata", lambda: {})
    monkeypatch.setattr(whole_state.ps, "get_data_parallel_group",
                        lambda: SimpleNamespace(rank=lambda: rank, size=lambda: 2))
    state = WholeState(model, SimpleNamespace(saved=(), states=()))
    saved = state.to_save()["model"]["masks"].values()
    assert [bits.key for bits in saved if is_main_replica(bits.replica_id)] == [
        f"{'ab'[rank]}.mask_bits"]
