"""A selector that lies outside the package, activity.py, works wherever ours do."""

from __future__ import annotations

import pytest
import torch
from one_shot_cases import Given, begun

from megatron_spdf.checkpoint.inspect import verify
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint

PLUGINS = "activity"
pytestmark = pytest.mark.slow


def test_it_selects_the_weights_of_a_run(ranks, make_recipe, corpus, tmp_path):
    recipe = make_recipe(str(tmp_path / "run"), sparsity=0.5)
    losses = ranks(1).run(begun, recipe, "activity",
                          {"calibrate": corpus, "samples": 4, "length": 16})
    assert losses["pruned"] != losses["dense"]
    reader, given = CheckpointReader(find_checkpoint(tmp_path / "run"), checksums=True), Given(
        recipe)
    assert "masks are as planned" in verify(reader)
    assert reader.masks["how"] == ("the most active inputs in each slice of given weights, with 4 "
                                   "sequences of 16 tokens of text")
    for name, weight in reader.plan.weights.items():
        values = reader.parameter(name)
        assert torch.equal(values, given.weight(name) * (values != 0))
        if weight.axis == 0:  # whole columns of a slice stay, since they have one score
            assert set((values != 0).float().mean(0).tolist()) <= {0.0, 1.0}
