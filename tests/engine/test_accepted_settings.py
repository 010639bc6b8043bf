"""What DeepSpeed itself refuses of a user's file is a sentence with the name of the file, before
there is a model."""

from __future__ import annotations

import json

import pytest

from megatron_spdf.engine.deepspeed import _accepted_settings
from megatron_spdf.engine.deepspeed_settings import deepspeed_settings


@pytest.fixture
def with_json(recipe, tmp_path):
    def make(content: dict):
        (tmp_path / "ds.json").write_text(json.dumps(content))
        return recipe(engine="deepspeed", deepspeed=str(tmp_path / "ds.json"),
                      parallel={"data": 1}, train={"global_batch": 4, "micro_batch": 2})
    return make


@pytest.mark.parametrize("content, said", [
    ({"sparse_attention": {"mode": "fixed"}}, "Sparse Attention has been removed"),
    ({"elasticity": {"enabled": True}}, "Elastic training has been removed"),
    ({"curriculum_learning": {"enabled": True}}, "'curriculum_learning' has been removed"),
    ({"zero_optimization": {"mics_shard_size": 2}}, "MiCS"),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size Input should be"),
    ({"zero_optimization": {"stage3_prefetch_bucket_size": [1]}}, "stage3_prefetch_bucket_size"),
])
def test_what_deepspeed_refuses_is_named_with_its_file(with_json, content, said):
    with pytest.raises(ValueError, match="ds.json has what DeepSpeed does not take: ") as refused:
        _accepted_settings(with_json(content))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_what_it_takes_is_handed_on_as_it_was_read(with_json):
    made = with_json({"steps_per_print": 7, "zero_optimization": {"overlap_comm": False}})
    assert _accepted_settings(made) == deepspeed_settings(made)


def test_a_fault_of_our_own_settings_is_none_of_the_user(recipe, monkeypatch):
    from deepspeed.runtime import config

    def fail(*_):
        raise TypeError("ours")
    monkeypatch.setattr(config, "DeepSpeedConfig", fail)
    with pytest.raises(TypeError, match="ours"):
        _accepted_settings(recipe(engine="deepspeed"))
