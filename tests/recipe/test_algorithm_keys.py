"""Keys of a mask algorithm in a recipe: read as the algorithm's own, refused with what is known."""

from __future__ import annotations

import pytest
from pydantic import Field

from megatron_spdf.optimizers.base import OPTIMIZERS, Optimizer
from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.load import make_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, MovingMasks


class Probe(MovingMasks):
    """Nothing of its own but another default."""

    name = "probe"
    every: int = Field(7, gt=0)


class Once(Optimizer):
    """Without state."""

    states = ()
    title = "Once"


@pytest.fixture(autouse=True)
def probe(monkeypatch):
    ALGORITHMS.names()
    monkeypatch.setitem(ALGORITHMS._tenants, "probe", Probe)


def loaded(recipe, *overrides: str, **sparsity) -> Recipe:
    values = recipe().model_dump()
    values["sparsity"] = {"level": 0.75, **sparsity}
    return make_recipe(values, overrides, "it")


def test_masks_stay_without_an_algorithm(recipe):
    assert loaded(recipe).model_dump()["sparsity"]["algorithm"] == "static"
    assert loaded(recipe).sparsity.update.moves(1000) == 0


def test_keys_have_the_algorithms_own_defaults(recipe):
    found = loaded(recipe, algorithm="probe", update={"fraction": 0.2}).sparsity
    assert found.update == Probe(every=7, fraction=0.2, start=0.0, stop=0.75)
    assert Recipe.model_validate(recipe(sparsity=found.model_dump()).model_dump()).sparsity == found
    words = loaded(recipe, "sparsity.algorithm=probe", "sparsity.update.every=5").sparsity
    assert words.update.every == 5


@pytest.mark.parametrize(("sparsity", "said"), [
    ({"algorithm": "prob"}, "sparsity.algorithm='prob': there is no mask algorithm 'prob'; known: "
                            "probe, "),
    ({"update": {"every": 3}}, r"sparsity.update.every=3: the mask algorithm static has no such "
                               "key; known: none. Leave it out, or set sparsity.update=null"),
    ({"algorithm": "probe", "update": {"fracton": 0.1}},
     "sparsity.update.fracton=0.1: the mask algorithm probe has no such key; known: fraction, "),
    ({"algorithm": "probe", "update": {"fraction": 1.5}},
     "sparsity.update.fraction=1.5: input should be less than or equal to 1"),
    ({"algorithm": "probe", "update": {"every": 0}}, "sparsity.update.every=0"),
    ({"algorithm": "probe", "update": {"start": 0.8}},
     "start=0.8 is not under stop=0.75, so that no mask would move; lower the first or"),
    ({"algorithm": "probe", "update": {"every": 9}}, "sparsity.update.every=9 from start=0 to "
     "stop=0.75 of 10 steps moves no mask; lower every, or train longer"),
    ({"algorithm": "gmp", "update": {"start": 0.99, "stop": 1.0}},
     "sparsity.update.start=0.99 and stop=1 of 10 steps leave none to prune in; lower start"),
    ({"algorithm": "gmp", "update": {"start": 0.5, "stop": 0.5}},
     "start=0.5 is not under stop=0.5, so that nothing would be pruned"),
    ({"algorithm": "acdc"}, "sparsity.update.turn=0.05 of 10 steps is no step; raise it, or train"),
    ({"algorithm": "acdc", "update": {"last_dense": 0.9}},
     "start=0.1, last_dense=0.9 and stop=0.85 must ascend; change one of them"),
    ({"algorithm": "probe", "update": {"newborn": "old"}}, "sparsity.update.newborn='old'"),
    ({"algorithm": "probe", "update": {"newborn": "ramp", "ramp": 0}}, "sparsity.update.ramp=0"),
    ({"algorithm": "gmp", "update": {"newborn": "ages"}}, "mask algorithm gmp has no such key"),
    ({"algorithm": "probe", "update": {"newborn": "ages", "ramp": 50}},
     "sparsity.update.ramp=50 says nothing where newborn=ages; set newborn=ramp, or leave it out"),
    ({"algorithm": "probe", "update": {"fraction": 1e-5}}, "sparsity.update.fraction=1e-05 of the "
     r"768 active entries of a slice of decoder\.\S+ is none, so that they would never move; raise "
     "it to 0.0013 or more"),
    ({"algorithm": "rigl", "update": {"every": 5, "gradient": "all"}},
     "sparsity.update.gradient='all': input should be 'step' or 'micro_batch'"),
    ({"algorithm": "set", "update": {"every": 5, "gradient": "step"}},
     "sparsity.update.gradient='step': the mask algorithm set has no such key"),
    ({"algorithm": "acdc", "update": {"turn": 0.7}}, "turn=0.7 is longer than start=0.1 to "
     "last_dense=0.75, so that nothing would be sparse in between; lower it"),
    ({"algorithm": "acdc", "update": {"turn": 0.2, "stop": 0.97}}, "sparsity.update.stop=0.97 of "
     "10 steps leaves none that are sparse at the end; lower it, or train longer"),
    ({"algorithm": "ste", "update": {"every": 10}},
     "sparsity.update.every=10 of 10 steps chooses masks once, of initial weights; lower every"),
    ({"algorithm": "ste", "update": {"decay_masked": -1}}, "sparsity.update.decay_masked=-1"),
    ({"algorithm": "top_kast", "update": {"backward": 0.5}}, "sparsity.update.backward=0.5"),
    ({"algorithm": "top_kast", "pattern": "2:4", "level": 0.5},
     "algorithm=top_kast compares single entries, and sparsity.pattern=2:4 ties them to each other;"
     " take pattern=unstructured, or algorithm=ste"),
    ({"algorithm": "ste", "pattern": "n_m"}, "level=0.75, and 2 of every 4 active are level 0.5"),
    ({"pattern": "n_m", "n": 4}, "n=4 of every m=4 leaves no zeros"),
    ({"reached": 0.5}, "sparsity.reached=0.5 is set by the run itself; leave it out"),
    ({"algorithm": "probe", "level": 0.0}, "sparsity.algorithm=probe moves masks, and no weight "
                                           "is sparse; set sparsity.level, or algorithm=static"),
    ({"algorithm": "probe", "level": 0.1}, r"sparsity.algorithm=probe moves 830 of the 2,765 "
     r"active entries of a slice of decoder\.\S+ at once, which has 307 zeros to take their "
     r"place; lower sparsity.update.fraction to 0.111 or raise the level 0.1"),
    ({"algorithm": "probe", "level": 0.5, "pattern": "2:4"}, "sparsity.algorithm=probe lets "
     "single entries die and be born, and sparsity.pattern=2:4 ties them to each other; set "
     "algorithm=ste, which chooses masks anew from dense weights, algorithm=static, or pattern="),
    ({"algorithm": "rigl", "update": {"every": 5}, "level": 0.5, "pattern": "2:4"},
     "sparsity.algorithm=rigl lets single entries die and be born, and sparsity.pattern=2:4 ties"),
    ({"algorithm": "probe", "pattern": "tile", "tile": 8}, "sparsity.pattern=tile ties them to "
     "each other; set algorithm=rigl or set, which move tiles as they are, algorithm=static, or"),
    ({"algorithm": "set", "pattern": "tile", "tile": 8, "update": {"every": 5, "fraction": 0.1}},
     r"sparsity.algorithm=set moves 1 of the 8 active tiles of a slice of decoder\.\S+ at once, "
     "and tiles are swapped two by two; raise sparsity.update.fraction to 0.25, or take smaller"),
])
def test_what_is_wrong_is_said(recipe, sparsity, said):
    with pytest.raises(ValueError, match=said):
        loaded(recipe, **sparsity)


@pytest.mark.parametrize(("optimizer", "rule", "said"), [
    ({"name": "once", "lr": 1.0}, "ages", "sparsity.update.newborn=ages corrects running averages "
     "of the gradient, and optimizer.name=once names none that start at zero; set newborn=plain"),
    ({"beta1": 0.0}, "ramp", "sparsity.update.newborn=ramp scales the first moment that is kept, "
     "and optimizer.beta1=0 keeps none; set newborn=ages or a larger beta1")])
def test_an_optimizer_without_moments_has_no_newborn_ones(recipe, monkeypatch, optimizer, rule,
                                                          said):
    OPTIMIZERS.names()
    monkeypatch.setitem(OPTIMIZERS._tenants, "once", Once)
    values = recipe().model_dump()
    values["sparsity"] = {"level": 0.75, "algorithm": "probe", "update": {"newborn": rule}}
    values["optimizer"] = optimizer if "name" in optimizer else values["optimizer"] | optimizer
    with pytest.raises(ValueError, match=said):
        make_recipe(values, [], "it")
    values["sparsity"]["update"]["newborn"] = "auto"
    assert make_recipe(values, [], "it").states == (
        () if "name" in optimizer else ("exp_avg", "exp_avg_sq", "age"))


def test_a_run_goes_on_with_its_own_algorithm_only(recipe):
    before = loaded(recipe, algorithm="probe")
    assert changes_of_run(before, loaded(recipe, algorithm="probe")) == []
    assert changes_of_run(before, loaded(recipe, algorithm="probe", update={"every": 6})) == [
        "sparsity.update.every is 7 there and 6 here"]
    assert "sparsity.algorithm is probe there and static here" in changes_of_run(before,
                                                                                 loaded(recipe))


def test_a_dense_run_of_the_same_recipe_moves_nothing(recipe):
    moving = {"algorithm": "probe", "update": {"every": 5}}
    assert loaded(recipe, "sparsity=0", **moving).sparsity.algorithm == "static"
    assert loaded(recipe, "sparsity=0.5", **moving).sparsity.update.every == 5


def test_held_masks_are_the_same_ones(recipe):
    moving = loaded(recipe, algorithm="probe", update={"every": 5}, seed=5).sparsity
    assert moving.held() == loaded(recipe, seed=5).sparsity
