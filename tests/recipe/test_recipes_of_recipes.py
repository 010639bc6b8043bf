"""A recipe that is made of another is that recipe but for what is listed here, to the last key."""

from __future__ import annotations

import json

import pytest

from megatron_spdf.recipe.distillation import as_teacher
from megatron_spdf.recipe.finetune import Finetune, training_recipe
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.settings import Sparsity

# of every section something that is not the default
SECTIONS = {
    "seed": 5, "model": {"dropout": 0.2, "init_std": 0.05}, "parametrization": "mup",
    "mup_base": {"hidden": 32, "density": 0.5, "input_multiplier": 2.0},
    "sparsity": {"level": 0.75, "algorithm": "set", "seed": 9, "dense_copy": "per_layer"},
    "data": {"reset_attention": True, "workers": 0},
    "train": {"recompute": "full", "precision": "fp32", "label_smoothing": 0.1},
    "optimizer": {"warmup_tokens": 256, "decay": "linear", "beta2": 0.95},
    "distill": {"teacher": "there", "weight": 0.3, "temperature": 2.0},
    "parallel": {"tensor": 2, "sequence": True, "data": 2}, "evaluate": {"every": 3},
    "checkpoint": {"every": 7}, "log": {"every": 2}, "fault_tolerance": {"hang_seconds": 9.0},
    "kernels": {"norm": "torch"}}
SCHEDULE = {"lr": 3e-3, "embedding_lr": 2e-3, "norm_lr": 1e-3, "min_lr_ratio": 0.2,
            "decay": "linear", "decay_share": 0.5, "warmup_tokens": 512}
STAGES = [{"share": 0.4, "sparsity": 0.75}, {"share": 0.6, "sparsity": 0.5, **SCHEDULE}]


@pytest.fixture
def usual(recipe) -> dict:
    """What a recipe says that leaves out all it can."""
    return recipe().model_dump()


def test_a_teacher_is_dense_standard_and_without_dropout_or_recomputation(recipe, usual):
    made, model = recipe(**SECTIONS), recipe(model={"layers": 2, "dropout": 0.3}).model
    values = made.model_dump()
    assert as_teacher(made, model).model_dump() == values | {
        "model": model.model_dump() | {"dropout": 0.0}, "parametrization": "standard",
        "train": values["train"] | {"recompute": "none"}, "stages": [],
        **{key: usual[key] for key in ("sparsity", "distill")}}
    assert as_teacher(recipe(stages=STAGES), model).stages == []


def test_a_layer_on_its_own_is_dense_standard_and_whole_on_one_rank(recipe, usual):
    from megatron_spdf.model.layer_by_layer import single_layer

    made = recipe(**SECTIONS | {"train": {"recompute": "full", "precision": "bf16"}})
    values = made.model_dump()
    assert single_layer(made).model_dump() == values | {
        "model": values["model"] | {"layers": 1, "dropout": 0.0}, "parametrization": "standard",
        "train": values["train"] | {"recompute": "none", "precision": "fp32"}, "stages": [],
        **{key: usual[key] for key in ("sparsity", "parallel", "kernels")}}
    assert single_layer(recipe(stages=STAGES)).stages == []


def test_a_stage_has_its_sparsity_and_schedule_and_the_engine_its_tokens_alone(recipe, usual):
    made = recipe(**{key: SECTIONS[key] for key in SECTIONS if key != "sparsity"}, stages=STAGES)
    values, (first, second) = made.model_dump(), stages_of(made)
    own = values | {"sparsity": usual["sparsity"] | {"level": 0.5},
                    "optimizer": values["optimizer"] | SCHEDULE}
    assert second.recipe.model_dump() == own == made.in_stage(1).model_dump()
    assert second.as_single_run.model_dump() == own | {
        "stages": [], "train": values["train"] | {"tokens": 6 * 256}}
    assert first.as_single_run.train.tokens == 4 * 256
    assert second.recipe.without_stages().model_dump() == own | {"sparsity": usual["sparsity"]}
    assert recipe(**SECTIONS).without_stages() == recipe(**SECTIONS)


def test_parts_and_trials_change_one_key(recipe):
    made = recipe(**SECTIONS)
    values = made.model_dump()
    assert made.with_micro_batch(8).model_dump() == values | {
        "train": values["train"] | {"micro_batch": 8}}
    assert made.stored_at(0.5).model_dump() == values | {
        "sparsity": values["sparsity"] | {"reached": 0.5}}
    assert made.stored_at(1.0) is made


def test_the_whole_recipe_of_a_fine_tuning_run(recipe, usual, tmp_path):
    """Of 100 examples: 7 steps an epoch of 16, each nominally of 16 x 24 tokens."""
    model = recipe(model={"dropout": 0.1}).model
    teacher, settings = tmp_path / "teacher", tmp_path / "settings.json"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({
        **model.huggingface_config(), "model_type": model.huggingface}))
    settings.write_text('{"wall_clock_breakdown": true}')
    sections = {
        "distill": {"teacher": str(teacher), "weight": 0.3, "temperature": 2.0},
        "parallel": {"tensor": 2, "data": 2, "zero_stage": 2, "timeout": 99},
        "log": {"every": 2, "ranks_every": 5, "slow_factor": 1.7},
        "fault_tolerance": {"max_skipped": 4}, "kernels": {"norm": "torch"}}
    batches = {"global_batch": 16, "micro_batch": 4, "sequence_length": 24, "precision": "fp32",
               "recompute": "full", "label_smoothing": 0.1}
    rates = {"lr": 0.01, "min_lr_ratio": 0.2, "decay": "cosine", "decay_share": 0.5,
             "weight_decay": 0.3, "clip_grad": 0.7, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6,
             "embedding_lr": 0.02, "norm_lr": 0.03}
    finetune = Finetune.model_validate({
        "checkpoint": "start", "output": "tuned", "seed": 31, "engine": "deepspeed",
        "deepspeed": str(settings), "data": {"task": "e2e", "path": "data"},
        "train": {"epochs": 3, "dropout": 0.3, **batches},
        "optimizer": rates | {"warmup_steps": 5}, "evaluate": {"every": 9, "patience": 4},
        "save": {"every": 11, "keep": 3}, **sections})
    made = training_recipe(finetune, model, Sparsity(level=0.5), examples=100)
    assert made.model_dump() == usual | {
        "output": "tuned", "seed": 31, "engine": "deepspeed", "deepspeed": str(settings),
        "model": model.model_dump() | {"dropout": 0.3},
        "train": batches | {"tokens": 3 * 7 * 16 * 24},
        "optimizer": usual["optimizer"] | rates | {"warmup_tokens": 5 * 16 * 24},
        "evaluate": {"every": 9, "batches": 10, "patience": 4},
        "checkpoint": usual["checkpoint"] | {"every": 11, "keep": 3, "best": True},
        **{key: usual[key] | section for key, section in sections.items()}}
    finetune = Finetune.model_validate(finetune.model_dump() | {"evaluate": {}, "save": {}})
    again = training_recipe(finetune, model, Sparsity(level=0.5), examples=100)
    assert again.evaluate.every == 7  # once an epoch
    assert again.checkpoint.model_dump() == usual["checkpoint"] | {"every": 0, "keep": 1,
                                                                   "best": True}
