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
    monkeypatch.setattr(autotune, "_try", lambda stage, *_: (lambda m: timing(
        m, 1 / m, (30 + 8 * m) * GIB, (30 + 16 * m) * GIB))(stage.recipe.train.micro_batch))
    (stage,) = stages_of(auto(recipe))
    found = list(try_all(stage, torch.device("cuda")))
    assert [t.micro_batch for t in found] == [1, 2, 4]
    assert fastest(found) == 4


def test_memory_that_runs_out_ends_the_trials_of_one_rank(recipe, monkeypatch):
    def run(stage, *_):
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


class Engine:
    """Notes its steps, of which the first takes long."""

    def __init__(self, clock: list[float], needs_batches: bool = True):
        self.clock, self.needs_batches, self.steps, self.closed = clock, needs_batches, [], False

    def step(self, batch, number, tokens, stop_requested) -> None:
        assert not stop_requested
        self.steps.append((number, tokens, len(batch)))
        self.clock[0] += {1: 100.0, 2: 5.0, 3: 4.0}[number]

    def state_bytes(self) -> dict[str, int]:
        return {"parameters": 20, "gradients": 30, "optimizer": 50}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine(monkeypatch) -> Engine:
    clock = [0.0]
    made = Engine(clock)
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(autotune, "make_engine", lambda recipe, plan, device: made)
    return made


def test_a_trial_is_of_the_fastest_step_after_the_first_on_an_engine_of_its_own(recipe, engine):
    (stage,) = stages_of(auto(recipe))
    assert autotune._run(stage_at(stage, 4), torch.device("cpu")) == (4.0, 100)
    assert engine.steps == [(number, 48 * 32, 12) for number in (1, 2, 3)] and engine.closed


def test_an_engine_is_closed_where_memory_runs_out(recipe, engine):
    def fail(*_, **__) -> None:
        raise torch.OutOfMemoryError

    engine.step = fail
    (stage,) = stages_of(auto(recipe))
    with pytest.raises(torch.OutOfMemoryError):
        autotune._run(stage_at(stage, 4), torch.device("cpu"))
    assert engine.closed


def test_twice_the_micro_batch_doubles_all_but_the_state(recipe, engine, monkeypatch):
    """Of 160 bytes at most, 100 are state: 60 become 120. Of all ranks the worst counts."""
    reduced, others = [], torch.zeros(3, dtype=torch.float64)

    def all_reduce(figures, operation) -> None:
        reduced.append(operation)
        figures.copy_(torch.maximum(figures, others))

    monkeypatch.setattr(autotune.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 160)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    tensor = torch.tensor
    monkeypatch.setattr(autotune.torch, "tensor",
                        lambda figures, dtype, device: tensor(figures, dtype=dtype))
    (stage,) = stages_of(auto(recipe))
    assert autotune._try(stage_at(stage, 2), torch.device("cuda")) == Timing(2, 4.0, 160.0, 220.0)
    assert autotune._try(stage_at(stage, 2), torch.device("cpu")) == Timing(2, 4.0, 100.0, 100.0)
    others[:] = tensor([9.0, 120.0, 90.0])  # another rank is slower and holds more
    assert autotune._try(stage_at(stage, 2), torch.device("cpu")) == Timing(2, 9.0, 120.0, 100.0)
    assert reduced == [torch.distributed.ReduceOp.MAX] * 3


@pytest.mark.parametrize("reset", [False, True])
def test_trials_read_random_tokens_that_are_the_same_on_every_rank(recipe, engine, reset):
    made = auto(recipe, data={"reset_attention": reset}).with_micro_batch(4)
    batch = autotune._random_batch(made, engine)
    assert len(batch) == 12 and all(micro is batch[0] for micro in batch)
    micro = batch[0]
    assert set(micro) == {"tokens", "labels", "loss_mask", "position_ids",
                          *(["documents"] if reset else [])}
    assert {tuple(t.shape) for t in micro.values()} == {(4, 32)}
    assert {name: t.dtype for name, t in micro.items() if name != "loss_mask"} == dict.fromkeys(
        set(micro) - {"loss_mask"}, torch.int64)
    assert torch.equal(micro["labels"][:, :-1], micro["tokens"][:, 1:])
    assert 0 <= micro["tokens"].min() and micro["tokens"].max() < 256
    assert len(micro["tokens"].unique()) > 64 and (micro["loss_mask"] == 1).all()
    assert micro["position_ids"].tolist() == [list(range(32))] * 4
    assert torch.equal(autotune._random_batch(made, engine)[0]["tokens"], micro["tokens"])
    engine.needs_batches = False
    assert autotune._random_batch(made, engine) == [{}] * 12


def test_a_choice_is_kept_for_the_stage_the_layout_and_the_device(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(autotune.dist, "broadcast_object_list", lambda shared, src: None)
    tried = []
    timings = [timing(1, 2.0), timing(2, 1.0), timing(4, 3.0)]
    monkeypatch.setattr(autotune, "try_all",
                        lambda stage, device, teach: tried.append(stage) or iter(timings))
    run = SimpleNamespace(root=tmp_path, create=lambda: None)

    def choose(number: int = 0, **sections) -> int:
        stage = stages_of(auto(recipe, **sections))[number]
        before = len(tried)
        chosen, lines = autotune.choose_micro_batch(stage, run, torch.device("cpu"))
        assert chosen.recipe.train.micro_batch == 2 and chosen.number == stage.number
        asked = len(tried) > before
        assert lines[0].startswith("micro-batch 2 is the fastest of those tried:" if asked else
                                   "micro-batch 2, as chosen when this run first had this layout")
        return asked

    stages = {"stages": [{"share": 0.5, "sparsity": 0.5}, {"share": 0.5, "sparsity": 0.0}]}
    layouts = [{}, {"parallel": {"tensor": 2}}, {"parallel": {"data": 2, "zero_stage": 0}},
               {"train": {"recompute": "full"}}, {"engine": "deepspeed"}]
    assert [choose(**layout) for layout in layouts] == [True] * 5
    assert [choose(**layout) for layout in layouts] == [False] * 5
    assert not choose(parallel={"timeout": 77})
    assert [choose(1, **stages), choose(1, **stages), choose(0, **stages)] == [True, False, False]
    fixed = stage_at(stages_of(auto(recipe))[0], 8)
    assert autotune.choose_micro_batch(fixed, run, torch.device("cpu")) == (fixed, [])


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
    with pytest.raises(ValueError, match="input should be a (whole number over 0, or auto|number)"):
        recipe(train={"micro_batch": value})


def test_a_runs_records_are_of_the_micro_batch_that_it_chose_last(recipe, tmp_path):
    save_recipe(auto(recipe), tmp_path / "recipe.yaml")
    (tmp_path / "log.jsonl").write_text(
        '{"kind": "train", "step": 1, "tokens": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="micro_batch.json"):
        read_run(tmp_path)
    (tmp_path / "micro_batch.json").write_text('[{"micro_batch": 2}, {"micro_batch": 8}]')
    assert read_run(tmp_path).recipe.micro_batches == 6


def test_a_damaged_record_is_refused_on_the_ranks_that_do_not_read_it(monkeypatch, tmp_path):
    def broadcast(shared: list, src: int) -> None:
        shared[:] = [[], "what rank 0 found"]

    monkeypatch.setattr(autotune.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(autotune.dist, "broadcast_object_list", broadcast)
    with pytest.raises(ValueError, match="what rank 0 found"):
        autotune._read(SimpleNamespace(root=tmp_path))
