"""Stages in a recipe: what they say, what they inherit, and what is refused."""

from __future__ import annotations

import json

import pytest

from megatron_spdf.recipe import rules
from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.sparsity.patterns.base import Pattern
from megatron_spdf.sparsity.patterns.tiles import Tiles

RECIPE = """
output: run
model: {layers: 4, hidden: 64, heads: 4, vocab_size: 256, max_positions: 32}
train: {tokens: 25600, global_batch: 8, micro_batch: 2}
optimizer: {lr: 1.0e-3, warmup_tokens: 512, decay: linear, weight_decay: 0.05}
"""
SPARSE, DENSE = {"share": 0.9, "sparsity": 0.75, "lr": 2e-3}, {"share": 0.1, "sparsity": 0}


@pytest.fixture
def load(tmp_path):
    """The recipe with these stages, and further words."""
    def load(*stages: dict, words: tuple[str, ...] = ()):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"{RECIPE}stages: {json.dumps(stages)}\n")
        return load_recipe(path, words)
    return load


def test_a_stage_inherits_the_optimizers_schedule_and_changes_it(load):
    recipe = load(SPARSE, {**DENSE, "warmup_tokens": "1k", "min_lr_ratio": 0.0})
    one, two = recipe.in_stage(0), recipe.in_stage(1)
    assert (one.sparsity.level, two.sparsity.level) == (0.75, 0.0)
    assert [(r.optimizer.lr, r.optimizer.warmup_tokens, r.optimizer.min_lr_ratio, r.optimizer.decay)
            for r in (one, two)] == [(2e-3, 512, 0.1, "linear"), (1e-3, 1000, 0.0, "linear")]
    recipe = load({**SPARSE, "embedding_lr": 3e-2, "decay_share": 0.5}, DENSE,
                  words=("optimizer.embedding_lr=2e-2", "optimizer.norm_lr=4e-3"))
    found = [recipe.in_stage(n).optimizer for n in (0, 1)]
    assert [(o.embedding_lr, o.norm_lr, o.decay_share) for o in found] == [(3e-2, 4e-3, 0.5),
                                                                          (2e-2, 4e-3, 1.0)]
    assert one.optimizer.weight_decay == two.optimizer.weight_decay == 0.05
    assert recipe.stage_ends == [90, 100] and one.steps == 100


def test_only_schedules_that_a_stage_has_are_judged(load):
    """The optimizer's own share of decay would be no step, and no stage takes it."""
    stages = [{**SPARSE, "decay_share": 0.5}, {**DENSE, "decay_share": 0.5}]
    recipe = load(*stages, words=("optimizer.decay_share=1e-6",))
    assert [recipe.in_stage(n).optimizer.decay_share for n in (0, 1)] == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"stages\.1\.decay_share=1e-06 of 10 steps is no step"):
        load(stages[0], DENSE, words=("optimizer.decay_share=1e-6",))


def test_a_stage_may_prune_what_was_dense_or_denser(load):
    levels = [0.0, 0.5, 0.75, 0.75, 0.0]
    recipe = load(*({"share": 0.2, "sparsity": level} for level in levels))
    assert [recipe.in_stage(n).sparsity.level for n in range(5)] == levels


@pytest.mark.parametrize("pattern", [{"pattern": "tile", "tile": 16}, {"pattern": "2:4"}], ids=str)
def test_a_stage_may_prune_to_every_pattern_with_a_mask_of_the_largest(load, pattern):
    sparse = {**SPARSE, "share": 0.1, "sparsity": {"level": 0.5, **pattern}}
    assert load({**DENSE, "share": 0.9}, sparse).in_stage(1).sparsity.masks.selects


def test_the_sparsity_of_a_stage_has_all_forms(load):
    rules = [{"weights": "*.mlp.*", "level": 0.5}]
    assert load({**SPARSE, "sparsity": rules}, DENSE).in_stage(0).sparsity.rules[0].level == 0.5
    assert load({**SPARSE, "sparsity": {"level": 0.5, "seed": 3}},
                DENSE).in_stage(0).sparsity.seed == 3


@pytest.mark.parametrize(("stages", "words", "said"), [
    ((SPARSE, {**DENSE, "share": 0.2}), (), "the shares 0.9 + 0.2 = 1.1 must add up to 1"),
    (({**SPARSE, "share": 0.8}, DENSE), (), "the shares 0.8 + 0.1 = 0.9 must add up to 1"),
    ((SPARSE,), (), "stages has one entry"),
    (({**SPARSE, "sparsity": {"level": 0.5, "pattern": "tile", "tile": 48}}, DENSE), (),
     "sparsity.tile=48"),
    ((SPARSE, DENSE), ("sparsity=0.5",),
     "sparsity and stages both say what is sparse; leave sparsity out"),
    ((SPARSE, {**DENSE, "sparsity": 0.5}), (),
     "active entries before the border and 6,144 after it, and nothing says which are born; make"),
    ((SPARSE, {**DENSE, "sparsity": [{"weights": "*.mlp.*", "level": 0.5}]}), (),
     "stages.1.sparsity: decoder.layers.0.mlp.linear_fc1.weight has "),
    (({**SPARSE, "share": 0.999}, {**DENSE, "share": 0.001}), (),
     "stages.1.share=0.001 of 100 steps is no step"),
    ((SPARSE, {**DENSE, "warmup_tokens": 2560}), (),
     "stages.1.warmup_tokens=2,560 is not under the stage's 2,560"),
    ((SPARSE, {**DENSE, "decay": "constant", "decay_share": 0.5}), (),
     "stages.1.decay_share=0.5 is of a decay, and stages.1.decay=constant"),
    ((SPARSE, {**DENSE, "decay_share": 0.9, "warmup_tokens": 512}), (),
     "stages.1.decay_share=0.9 of 10 steps begins before the warm-up's end at step 2"),
    ((SPARSE, DENSE), ("evaluate.patience=3",),
     "evaluate.patience=3 ends a run before its last stage"),
    ((SPARSE, {"share": 0.1}), (), "stages.1.sparsity is missing"),
    ((SPARSE, {**DENSE, "lr": -1}), (), "stages.1.lr=-1: input should be greater than 0"),
    ((SPARSE, {**DENSE, "shares": 1}), (),
     "unknown key stages.1.shares (value 1); did you mean stages.1.share?"),
])
def test_what_does_not_fit_is_refused_by_name(load, stages, words, said):
    with pytest.raises(ValueError) as caught:
        load(*stages, words=words)
    assert said in str(caught.value)


@pytest.mark.parametrize(("algorithm", "update", "level", "fits"), [
    ("gmp", {"initial": 0.9}, 0.9, True),  # from 0.81 on
    ("gmp", {"initial": 0.5}, 0.9, False),  # from 0.45 on, and at 0.9 in the end
    ("gmp", {}, 0.5, True), ("acdc", {"start": 0.2, "turn": 0.2}, 0.5, True),  # from dense on
    ("acdc", {"start": 0.0, "turn": 0.2}, 0.5, False),
    ("acdc", {"start": 0.0, "turn": 0.2}, 0.9, True)])
def test_a_stage_is_judged_by_the_sparsity_that_it_begins_with(load, algorithm, update, level,
                                                               fits):
    after = {"share": 0.5, "sparsity": {"level": level, "algorithm": algorithm, "update": update}}
    before = {**SPARSE, "share": 0.5}
    if fits:
        assert load(before, after).in_stage(1).sparsity.level == level
    else:
        with pytest.raises(ValueError, match=r"stages\.1\.sparsity: .*nothing says which are born"):
            load(before, after)


@pytest.mark.parametrize("selects", [True, False])
def test_tiles_are_pruned_at_a_border_where_their_pattern_selects(load, monkeypatch, selects):
    monkeypatch.setattr("megatron_spdf.sparsity.patterns.base.Pattern.selects",
                        property(lambda self: selects))
    rules._border.cache_clear()
    tiles = {**SPARSE, "share": 0.1, "sparsity": {"level": 0.5, "pattern": "tile", "tile": 16}}
    if selects:
        load(DENSE | {"share": 0.9}, tiles)
    else:
        with pytest.raises(ValueError, match="stages.1.sparsity: pattern=tile has no mask of the"):
            load(DENSE | {"share": 0.9}, tiles)
    rules._border.cache_clear()


def test_a_run_is_the_same_in_all_its_stages_and_another_with_others(load):
    recipe = load(SPARSE, DENSE)
    for number in (0, 1):
        recorded = recipe.in_stage(number)
        assert changes_of_run(recorded, recipe) == changes_of_run(recipe, recorded) == []
        assert recorded.without_stages().sparsity == recipe.sparsity
    (said,) = changes_of_run(recipe, load({**SPARSE, "lr": 3e-3}, DENSE))
    assert said.startswith("stages is ") and "0.002" in said and "0.003" in said
    assert any("optimizer.weight_decay" in c for c in changes_of_run(
        recipe, load(SPARSE, DENSE, words=("optimizer.weight_decay=0.2",))))


def test_a_border_needs_masks_of_the_largest_magnitudes(load, monkeypatch):
    """Every pattern here has them; one of a plugin may not."""
    stages = [{**SPARSE, "sparsity": 0.0},
              {**DENSE, "sparsity": {"level": 0.5, "pattern": "tile", "tile": 16}}]
    assert load(*stages).stages[1].sparsity.pattern == "tile"
    monkeypatch.setattr(Tiles, "chosen", Pattern.chosen)
    stages[1]["sparsity"]["tile"] = 8  # nobody has asked yet
    with pytest.raises(ValueError, match="pattern=tile has no mask of the largest magnitudes"):
        load(*stages)


def test_a_stage_that_keeps_all_entries_may_be_denser_than_the_one_before(load):
    denser = {"level": 0.5, "algorithm": "ste"}
    assert load(SPARSE, {**DENSE, "sparsity": denser}).stages[1].sparsity.level == 0.5
