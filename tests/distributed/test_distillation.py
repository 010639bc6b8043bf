"""Distillation: the loss and its gradient against float64, steps of all layouts and both engines
against transformers' models under plain PyTorch."""

import sys
from pathlib import Path

import pytest
from cases import train
from curves import close
from distill_cases import against_float64, chunks_of, distilled, plainly
from harness import world_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import save_family  # noqa: E402

pytestmark = pytest.mark.slow

STEPS = 3
LAYOUTS = {
    "one": {},
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
    "dp2": {"parallel": {"data": 2}},
    "deepspeed zero 3": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3}},
    "deepspeed tp2": {"engine": "deepspeed", "parallel": {"tensor": 2}},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A Llama with the student's vocabulary, wider and with another head."""
    return str(save_family("ungrouped llama", tmp_path_factory.mktemp("teacher") / "llama",
                           hidden_size=80, num_hidden_layers=1))


@pytest.fixture
def recipe(make_recipe, teacher):
    def make(**sections) -> dict:
        return make_recipe(distill={"teacher": teacher, "weight": 0.6, "temperature": 2.0},
                           **sections)
    return make


@pytest.mark.parametrize("world", [1, 2])
def test_loss_and_gradients_are_those_of_float64(ranks, make_recipe, world):
    made = make_recipe(parallel={"tensor": world})
    for errors in ranks(world).run_all(against_float64, made):
        for case, (loss, entropy, divergence, of_input, of_weight) in errors.items():
            assert max(loss, entropy, divergence) < 1e-6, case
            assert max(of_input, of_weight) < 1e-5, case


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_of_transformers(ranks, recipe, teacher, layout):
    plain = ranks(1).run(plainly, recipe(), STEPS, teacher)
    made = recipe(**LAYOUTS[layout])
    found = ranks(world_of(made)).run(distilled, made, STEPS)
    close(found["curve"], plain["curve"])
    for there, here in zip(found["parts"], plain["parts"], strict=True):
        assert there == pytest.approx(here, rel=1e-5)


def test_the_teacher_has_no_gradient_and_is_in_no_checkpoint(ranks, recipe):
    for layout in ("one", "tp2 sp"):
        made = recipe(**LAYOUTS[layout])
        found = ranks(world_of(made)).run(distilled, made, STEPS)
        assert found["gradients"] == [] and not found["added"] and found["saved"] == []
        assert found["held"] == found["planned"] > 0


def test_an_evaluation_measures_cross_entropy_alone(ranks, make_recipe, teacher):
    still = {"optimizer": {"lr": 1e-9, "warmup_tokens": 1024}}
    taught = ranks(1).run(distilled, make_recipe(distill={"teacher": teacher}, **still), 1)
    alone = ranks(1).run(train, make_recipe(**still), steps=1)
    assert taught["valid"] == pytest.approx(alone["valid"], rel=1e-5)


def test_a_weight_of_zero_is_no_teacher(ranks, make_recipe, teacher):
    off = ranks(1).run(train, make_recipe(distill={"teacher": teacher, "weight": 0.0}), steps=2)
    assert off["curve"] == ranks(1).run(train, make_recipe(), steps=2)["curve"]


def chunked(recipe: dict, steps: int, tokens: int) -> dict:
    with chunks_of(tokens):
        return distilled(recipe, steps)


def test_chunks_change_nothing(ranks, recipe):
    whole = ranks(1).run(distilled, recipe(), STEPS)
    close(ranks(1).run(chunked, recipe(), STEPS, 11)["curve"], whole["curve"], 1e-6)
