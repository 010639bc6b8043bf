"""Dropout: how much is dropped where, anew in every step and on every replica, and never in an
evaluation."""

from __future__ import annotations

import pytest
import torch
from cases import bench
from megatron.core import parallel_state as ps

from megatron_spdf.engine import common
from megatron_spdf.recipe.recipe import Recipe

pytestmark = pytest.mark.slow

RATE = 0.3
STILL = {"lr": 1e-30, "weight_decay": 0.0}  # no step changes a weight
ENGINES = {"megatron": {}, "deepspeed": {"engine": "deepspeed"}}


def of_one_batch(recipe: dict) -> dict:
    """Losses of this rank on a batch that all ranks have alike: in steps 1, 2 and 1 again with
    evaluations between; and what a layer and the embedding drop in training and in evaluation."""
    with bench(recipe) as b:
        ids = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(0))
        micro = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(),
                 "loss_mask": torch.ones(4, 32), "position_ids": torch.arange(32).expand(4, -1)}
        batch, local, run = [micro] * b.recipe.micro_batches, [], b.engine._run

        def recorded(*arguments, **keywords) -> torch.Tensor:
            loss = run(*arguments, **keywords)
            local.append(float(loss))
            return loss

        b.engine._run = recorded
        for number in (1, 0, 2, 0, 1):
            if number:
                b.engine.step(batch, number, number, False)
            else:
                b.engine.evaluate(batch, False)
        return {"local": local, **{mode: dropped(b.engine.models[0], micro, mode)
                                   for mode in ("train", "eval")}}


def dropped(model: torch.nn.Module, micro: dict, mode: str) -> tuple[float, float]:
    """Shares of what the embedding drops, and attention of a token that has itself alone."""
    getattr(model, mode)()
    return tuple(float(places.float().mean()) for places in places_of(model, micro))


def places_of(model: torch.nn.Module, micro: dict) -> list[torch.Tensor]:
    """What the embedding drops, (T, B, H) bool, and attention of a token that has itself alone,
    (1, B, nh * hs) bool."""
    with torch.no_grad():
        embedded = model.embedding(micro["tokens"], micro["position_ids"])
        attention = model.decoder.layers[0].self_attention.core_attention
        one = torch.ones(1, 2000, 4, 16)  # (T, B, nh, hs)
        attended = attention(one, one, one, None)
    return [embedded == 0, attended == 0]


def places_of_step(recipe: dict) -> list[torch.Tensor]:
    """`places_of` this rank's model in training, as a step begins."""
    with bench(recipe) as b:
        micro = {"tokens": torch.arange(32).view(1, -1).expand(4, -1),
                 "position_ids": torch.arange(32).expand(4, -1)}
        common.seed_dropout(b.recipe, 1)
        return places_of(b.engine.models[0].train(), micro)


@pytest.fixture(scope="module")
def at(ranks, make_recipe):
    """What each of two replicas gives with an engine and a rate."""
    def run(engine: str, rate: float = RATE) -> list[dict]:
        return ranks(2).run_all(of_one_batch, make_recipe(
            model={"dropout": rate}, parallel={"data": 2}, optimizer=STILL, **ENGINES[engine]))
    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_every_step_and_every_replica_drops_others(at, engine):
    one, other = (there["local"] for there in at(engine))
    for first, _, second, _, again in (one, other):
        assert again == first != second
    assert one[0] != other[0] and one[2] != other[2]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_drops_nothing(at, engine):
    plain = at(engine, 0.0)[0]["local"]
    assert plain == [plain[0]] * 5
    for there in at(engine):
        assert there["local"][1::2] == plain[1::2] and plain[0] not in there["local"][::2]


@pytest.mark.parametrize("engine", ENGINES)
def test_embedding_and_attention_drop_the_recipes_share(at, engine):
    there = at(engine)[0]
    assert there["train"] == pytest.approx((RATE, RATE), abs=0.03)  # of 8,000 draws and more
    assert there["eval"] == (0.0, 0.0)
    assert at(engine, 0.0)[0]["train"] == (0.0, 0.0)


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks_drop_others_of_their_own_and_the_same_of_what_they_share(
        ranks, make_recipe, sequence):
    one, other = ranks(2).run_all(places_of_step, make_recipe(
        model={"dropout": RATE}, parallel={"tensor": 2, "sequence": sequence}))
    for own, there, shared in zip(one, other, (not sequence, False), strict=True):
        apart = float((own ^ there).float().mean())
        assert apart == pytest.approx(0.0 if shared else 2 * RATE * (1 - RATE), abs=0.03)


def test_steps_replicas_and_pipeline_stages_have_seeds_of_their_own(make_recipe, monkeypatch):
    recipe = Recipe.model_validate(make_recipe("run", model={"dropout": RATE, "layers": 4},
                                               parallel={"pipeline": 4, "data": 2}))
    seeds = set()
    monkeypatch.setattr(common.torch, "manual_seed", seeds.add)
    monkeypatch.setattr(common.tensor_parallel, "model_parallel_cuda_manual_seed",
                        lambda seed, **_: seeds.add(seed))
    places = [(step, replica, stage) for step in (1, 2, 11) for replica in (0, 1)
              for stage in range(4)]
    for step, replica, stage in places:
        monkeypatch.setattr(ps, "get_data_parallel_rank", lambda replica=replica: replica)
        monkeypatch.setattr(ps, "get_pipeline_model_parallel_rank", lambda stage=stage: stage)
        common.seed_dropout(recipe, step)
    assert len(seeds) == len(places)
