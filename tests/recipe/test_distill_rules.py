"""What a teacher must be, and what it costs, before a device is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_spdf.planning.hardware import GPUS
from megatron_spdf.planning.memory import rank_bytes, zero_bytes
from megatron_spdf.planning.step_time import step_time
from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.distillation import teacher_of
from megatron_spdf.recipe.load import load_recipe, recipe_values, save_recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.schedule.flops import forward_flops, recipe_flops, training_flops
from megatron_spdf.sparsity.plan import Plan

CONTINUED = Path(__file__).resolve().parents[2] / "configs" / "continue"
CONFIG = {"model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 96,
          "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
          "tie_word_embeddings": False, "rope_theta": 1e4}


@pytest.fixture
def teacher(tmp_path):
    """Makes a directory with a config.json alone: the shape is all that rules and planner read."""
    def make(name: str = "teacher", **config) -> str:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(CONFIG | config))
        return str(directory)
    return make


def broken(recipe, **sections) -> list[str]:
    return list(rule_violations(recipe(**sections)))


def test_a_teacher_that_fits_breaks_no_rule(recipe, teacher):
    at = teacher(max_position_embeddings=32)  # as many as the model reads
    assert not broken(recipe, distill={"teacher": at, "weight": 1.0})
    # its slices are cut like the model's, so that tensor may be over its query groups
    assert not broken(recipe, distill={"teacher": at}, parallel={"tensor": 4})


@pytest.mark.parametrize("config, sections, said", [
    ({"vocab_size": 257}, {}, ["vocabulary of 257", "model.vocab_size=256", "take a teacher"]),
    ({"max_position_embeddings": 31}, {},
     ["at most 31 tokens", "train.sequence_length=32", "lower that"]),
    ({}, {"parallel": {"pipeline": 2}}, ["parallel.pipeline=2", "set pipeline=1"]),
    ({"num_attention_heads": 2, "num_key_value_heads": 1}, {"parallel": {"tensor": 4}},
     ["parallel.tensor=4", "tensor may be [1]"]),
    ({"model_type": "gemma2"}, {}, ["distill.teacher=", "gemma2", "llama"]),
])
def test_a_teacher_that_does_not_fit_is_refused(recipe, teacher, config, sections, said):
    (found,) = broken(recipe, distill={"teacher": teacher(**config)}, **sections)
    assert all(part in found for part in said), found


def test_a_directory_that_is_no_teacher_is_refused(recipe, tmp_path):
    (missing,) = broken(recipe, distill={"teacher": str(tmp_path / "nothing")})
    assert "nothing is no directory" in missing and "give a run" in missing
    (empty,) = broken(recipe, distill={"teacher": str(tmp_path)})
    assert "holds no weights" in empty and "give a run" in empty


@pytest.mark.parametrize("word, rule", [
    ("distill.weight=1.1", "less than or equal to 1"),
    ("distill.weight=-0.1", "greater than or equal to 0"),
    ("distill.temperature=0", "greater than 0"),
    ("distill.temprature=2", "did you mean distill.temperature?")])
def test_fields_have_bounds(recipe, tmp_path, teacher, word, rule):
    save_recipe(recipe(distill={"teacher": teacher()}), tmp_path / "r.yaml")
    with pytest.raises(ValueError, match=word.split("=")[0]) as error:
        load_recipe(tmp_path / "r.yaml", [word])
    assert rule in str(error.value)


def test_a_weight_without_a_teacher_is_refused(recipe):
    (found,) = broken(recipe, distill={"temperature": 2.0})
    assert "distill.temperature=2" in found and "set distill.teacher" in found


def test_a_run_goes_on_with_its_own_teacher(recipe, teacher):
    one, other = (recipe(distill={"teacher": teacher(name)}) for name in ("one", "other"))
    assert [said for said in changes_of_run(one, other) if "distill.teacher is" in said]
    assert changes_of_run(one, other, same={"distill.teacher"}) == []  # moved, by its content
    assert changes_of_run(recipe(), one)
    assert changes_of_run(one, recipe(distill={"teacher": one.distill.teacher,
                                               "temperature": 2.0}))
    # a weight of 0 is none
    assert not changes_of_run(recipe(), recipe(distill={"teacher": "gone", "weight": 0.0}))


def test_the_planner_counts_a_teacher(recipe, teacher):
    alone, made = (recipe(distill=d, parallel={"tensor": 2})
                   for d in ({}, {"teacher": teacher()}))
    plan, model = Plan.of(made), teacher_of(made)
    # two vocabularies, three layers of W_QKV, W_D, gate, up and down, norms
    split = 2 * 256 * 32 + 3 * (32 * (4 + 2 * 2) * 8 + 32 * 32 + 3 * 32 * 96)
    norms = (2 * 3 + 1) * 32
    assert rank_bytes(made, plan, 0, on_gpu=True).teacher == 2 * (split // 2 + norms)
    assert zero_bytes(made, plan, 0, 3).teacher == 2 * (split // 2 + norms)
    assert rank_bytes(alone, plan, 0, on_gpu=True).teacher == 0
    assert recipe_flops(made, plan).total == (
        training_flops(made.model, 32, plan).total + forward_flops(model, 32).total)
    gpu = next(iter(GPUS.values()))
    assert step_time(made, plan, gpu, 0.5).total > step_time(alone, plan, gpu, 0.5).total


@pytest.mark.parametrize("path", sorted(CONTINUED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_is_valid(path, tmp_path, monkeypatch):
    """Where the model that it goes on from lies."""
    monkeypatch.chdir(tmp_path)
    model = load_recipe(path, ["distill.teacher=null"]).model
    teacher = tmp_path / recipe_values(path)["distill"]["teacher"]
    teacher.mkdir(parents=True)
    (teacher / "config.json").write_text(json.dumps({
        **model.huggingface_config(), "model_type": model.huggingface}))
    recipe = load_recipe(path)
    assert recipe.distill.on and 0 < recipe.optimizer.warmup_tokens < 0.1 * recipe.train.tokens
    assert not teacher_of(recipe).differences(model)
