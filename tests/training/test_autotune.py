"""Which micro-batches are tried, when trials end, and which is chosen."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_spdf.engine.factory import make_engine
from megatron_spdf.planning.memory import render_layout
from megatron_spdf.recipe.load import save_recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.runs.measured import read_run
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.training import autotune
from megatron_spdf.training.autotune import Timing, candidates, fastest, try_all

GIB = 2**30


def auto(recipe, **sections):
    return recipe(**{**sections,
                     "train": {"global_batch": 48, "micro_batch": "auto",
                               **sections.get("train", {})}})


@pytest.mark.parametrize(("parallel", "expected"), [
    ({}, [1, 2, 4, 8, 16]), ({"data": 3}, [1, 2, 4, 8, 16]), ({"data": 2}, [1, 2, 4, 8]),
    # interleaved, the number of micro-batches must be even
    ({"pipeline": 2, "interleave": 2}, [1, 2, 4, 8])])
def test_powers_of_two_that_break_no_rule(recipe, parallel, expected):
    assert candidates(auto(recipe, parallel=parallel), 64) == expected
    assert candidates(auto(recipe, parallel=parallel), 4) == [1, 2, 4]


def timing(size: int, seconds: float, peak: float = 0.0, next_peak: float = 0.0) -> Timing:
    return Timing(size, seconds, peak, next_peak)


def test_the_fastest_is_chosen_and_of_equals_the_smallest():
    assert fastest([timing(1, 2.0), timing(2, 1.0), timing(4, 1.0), timing(8, 3.0)]) == 2
    assert fastest([timing(1, 2.0), timing(2, math.inf)]) == 1


def test_not_even_one_sequence_fits():
    with pytest.raises(ValueError,
                       match=r"train.micro_batch=auto.*micro-batch 1 does not "
                             r"fit.*train.recompute=full"):
        fastest([timing(1, math.inf, math.inf, math.inf)])


def test_trials_end_before_memory_does(recipe, monkeypatch):
    """State of 30 GiB and 8 GiB a sequence: twice four sequences would be over 80 GiB."""
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(autotune, "_try", lambda stage, _: (lambda m: timing(
        m, 1 / m, (30 + 8 * m) * GIB, (30 + 16 * m) * GIB))(stage.recipe.train.micro_batch))
    (stage,) = stages_of(auto(recipe))
    found = list(try_all(stage, torch.device("cuda")))
    assert [t.micro_batch for t in found] == [1, 2, 4]
    assert fastest(found) == 4


def test_memory_that_runs_out_ends_the_trials_of_one_rank(recipe, monkeypatch):
    def run(stage, _):
        if stage.recipe.train.micro_batch > 1:
            raise torch.OutOfMemoryError
        return 1.0, 0

    monkeypatch.setattr(autotune, "_run", run)
    monkeypatch.setattr(autotune.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(autotune.dist, "all_reduce", lambda *_: None)
    (stage,) = stages_of(auto(recipe))
    found = [autotune._try(p, torch.device("cpu"))
             for p in (stage_at(stage, 1), stage_at(stage, 2))]
    assert [t.seconds for t in found] == [1.0, math.inf]
    assert fastest(found) == 1
    monkeypatch.setattr(autotune.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(autotune.dist, "get_rank", lambda: 1)
    with pytest.raises(ValueError,
                       match="micro-batch 2 did not fit in the memory of rank 1; set "
                             "train.micro_batch to"):
        autotune._try(stage_at(stage, 2), torch.device("cpu"))


def stage_at(stage, size: int):
    return autotune.replace(stage, recipe=stage.recipe.with_micro_batch(size))


def test_rules_hold_for_the_smallest(recipe):
    assert not list(rule_violations(auto(recipe, parallel={"data": 3})))
    (wrong,) = rule_violations(auto(recipe, parallel={"data": 5}))
    assert (
        "train.global_batch=48 is not divisible by train.micro_batch x parallel.data = 1 x 5"
        in wrong
    )


def test_a_dry_run_says_auto(recipe):
    (stage,) = stages_of(auto(recipe))
    assert "micro-batches of auto x 32 tokens" in render_layout(stage.recipe, stage.plan)


def test_an_engine_needs_a_number(recipe):
    (stage,) = stages_of(auto(recipe))
    with pytest.raises(ValueError, match="train.micro_batch=auto is for pretrain.py"):
        make_engine(stage.recipe, stage.plan, torch.device("cpu"))


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "x"])
def test_neither_a_number_nor_auto(recipe, value):
    with pytest.raises(ValueError, match="input should be a whole number over 0, or auto"):
        recipe(train={"micro_batch": value})


def test_a_runs_records_are_of_the_micro_batch_that_it_chose_last(recipe, tmp_path):
    save_recipe(auto(recipe), tmp_path / "recipe.yaml")
    (tmp_path / "log.jsonl").write_text(
        '{"kind": "train", "step": 1, "tokens": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="micro_batch.json"):
        read_run(tmp_path)
    (tmp_path / "micro_batch.json").write_text('[{"micro_batch": 2}, {"micro_batch": 8}]')
    assert read_run(tmp_path).recipe.micro_batches == 6
