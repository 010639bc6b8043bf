"""Fine-tuning recipes: the shipped ones are the paper's, and what a run comes to follows from model
and data."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_spdf.architecture.gpt import Gpt
from megatron_spdf.data.finetuning.task import TASKS
from megatron_spdf.recipe.finetune import Finetune, load_finetune, training_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.selection import trials
from megatron_spdf.sparsity.settings import Sparsity

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = {path.stem: path for path in sorted((CONFIGS / "finetune").glob("*.yaml"))}
NLG = ["e2e", "webnlg", "dart"]
SUMMARIES = ["curation", "scitldr"]
SMALL_RUNS = {"demo", "e2e_10m", "e2e_tiny"}
SMALL = Gpt(preset="gpt2_small")


def shipped(name: str, *words: str) -> Finetune:
    return load_finetune(SHIPPED[name], ["checkpoint=runs/start", *words])


def test_a_recipe_is_shipped_for_every_task():
    """Under its name, as launch/finetune.sh and launch/spdf.sh look for it."""
    assert set(SHIPPED) - SMALL_RUNS == set(TASKS.names())
    assert all(shipped(name).data.task == name for name in set(SHIPPED) - SMALL_RUNS)
    assert len({shipped(name).output for name in SHIPPED}) == len(SHIPPED)


@pytest.mark.parametrize("name", [*NLG, *SUMMARIES])
def test_recipe_is_the_papers(name):
    recipe = shipped(name)
    o = recipe.optimizer
    assert (recipe.mode, recipe.revived, recipe.engine) == ("dense", "zeros", "deepspeed")
    assert (recipe.train.epochs, recipe.train.dropout, recipe.evaluate.patience) == (5, None, 1)
    assert (o.decay, o.min_lr_ratio, o.beta1, o.beta2, o.eps,
            o.weight_decay) == ("linear", 0.0, 0.9, 0.999, 1e-8, 0.01)
    rates = [float(rate) for rate in recipe.sweep["optimizer.lr"]]
    if name in NLG:
        assert (recipe.train.label_smoothing, o.warmup_steps,
                recipe.train.sequence_length) == (0.1, 500, 512)
        assert rates == [1e-4, 5e-5,
                         2.5e-5] and recipe.sweep["train.global_batch"] == [8, 16, 32, 64]
    else:
        assert (recipe.train.global_batch, recipe.train.sequence_length) == (32, None)
        assert (max(rates), min(rates)) == (3e-3, 1e-5) and set(recipe.sweep) == {"optimizer.lr"}


def test_what_a_recipe_leaves_out_is_lora_s_schedule_and_not_pre_trainings():
    """Linear to zero with a weight decay of 0.01 (Hu et al. 2022, table 11)."""
    o = Finetune.model_validate({
        "output": "run", "checkpoint": "run", "data": {"task": "e2e", "path": "x"},
        "train": {"epochs": 1, "global_batch": 8, "micro_batch": 8},
        "optimizer": {"lr": 1e-4}}).optimizer
    assert (o.decay, o.min_lr_ratio, o.weight_decay, o.warmup_steps) == ("linear", 0.0, 0.01, 0)


def test_a_run_is_so_many_steps_of_the_training_recipe():
    finetune = shipped("e2e", "train.global_batch=64", "train.micro_batch=8", "parallel.data=2",
                       "parallel.zero_stage=3")
    recipe = training_recipe(finetune, SMALL, Sparsity(level=0.75), examples=42_061)
    assert finetune.steps_per_epoch(42_061) == 658 == recipe.evaluate.every
    assert recipe.steps == 5 * 658 and recipe.micro_batches == 4
    assert recipe.optimizer.warmup_tokens == 500 * recipe.tokens_per_step
    assert recipe.model == SMALL and recipe.sparsity == Sparsity()
    assert (recipe.engine, recipe.parallel.zero_stage,
            recipe.checkpoint.best) == ("deepspeed", 3, True)
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize("name", [*NLG, *SUMMARIES])
def test_every_run_of_a_papers_sweep_is_possible_on_a_node(name):
    """docs/reproducing_spdf.md starts them on 8 GPUs."""
    for trial in trials(shipped(name)):
        assert shipped(name, "parallel.data=8", *trial.words).parallel.data == 8


def test_a_batch_that_replicas_do_not_divide_is_refused_before_model_and_data_are_known():
    with pytest.raises(ValueError, match="train.global_batch=16 is not divisible by .* 4 x 8 = 32"):
        shipped("e2e", "train.micro_batch=4", "parallel.data=8")


def test_the_sparse_mode_keeps_the_sparsity_of_the_start():
    sparsity = Sparsity(level=0.5, seed=3)
    assert training_recipe(shipped("e2e", "mode=sparse"), SMALL, sparsity,
                           42_061).sparsity == sparsity


def test_dropout_and_length_may_differ_from_the_start():
    recipe = training_recipe(shipped("e2e", "train.dropout=0.1", "train.sequence_length=256"),
                             SMALL, Sparsity(), 9999)
    assert (recipe.model.dropout, recipe.train.sequence_length) == (0.1, 256)
    assert training_recipe(shipped("curation"), SMALL, Sparsity(),
                           9999).train.sequence_length == SMALL.max_positions


@pytest.mark.parametrize("words, parts", [
    (["train.global_batch=6", "train.micro_batch=4"], ["train.global_batch=6", "4 or 8"]),
    (["train.sequence_length=4096"], ["train.sequence_length=4096", "model.max_positions=2048"]),
    (["parallel.tensor=5"], ["model.query_groups=12", "parallel.tensor=5"]),
    (["optimizer.warmup_steps=99999"],
     ["optimizer.warmup_steps=99999", "13145 steps", "5 epochs of 2629"]),
    (["engine=megatron", "parallel.zero_stage=3"],
     ["parallel.zero_stage=3 needs engine=deepspeed"]),
])
def test_what_does_not_fit_model_and_data_is_named(words, parts):
    with pytest.raises(ValueError) as caught:
        training_recipe(shipped("e2e", *words), SMALL, Sparsity(), 42_061)
    for part in parts:
        assert part in str(caught.value)


def test_a_warm_up_may_end_with_the_step_before_the_last():
    training_recipe(shipped("e2e", "optimizer.warmup_steps=13144"), SMALL, Sparsity(), 42_061)
    with pytest.raises(ValueError, match="warmup_steps=13145 is not under the run's 13145 steps"):
        training_recipe(shipped("e2e", "optimizer.warmup_steps=13145"), SMALL, Sparsity(), 42_061)


@pytest.mark.parametrize("words, parts", [
    (["parallel.pipeline=2"], ["parallel.pipeline=2", "pipeline=1"]),
    (["mode=sparse", "revived=normal"], ["revived=normal", "mode=sparse"]),
    (["optimizer.warmup_tokens=1"],
     ["unknown key optimizer.warmup_tokens", "did you mean optimizer.warmup_steps?"]),
    (["train.tokens=1"], ["unknown key train.tokens"]),
    (["sweep={optimizer.lr: 1e-4}"], ["sweep.optimizer.lr='1e-4'", "list"]),
])
def test_bad_value_is_named(words, parts):
    with pytest.raises(ValueError) as caught:
        shipped("e2e", *words)
    for part in parts:
        assert part in str(caught.value)


def test_a_recipe_without_a_start_says_how_to_name_one():
    with pytest.raises(ValueError,
                       match=r"checkpoint is missing; set it in the recipe or as checkpoint=VALUE"):
        load_finetune(SHIPPED["e2e"])


def test_layout_and_engine_may_change_between_starts_and_the_rest_may_not():
    base = shipped("e2e").identity()
    for word in ("engine=megatron", "parallel.tensor=2", "parallel.zero_stage=0",
                 "train.micro_batch=4", "log.every=1",
                 "train.recompute=full", "output=elsewhere"):
        assert shipped("e2e", word).identity() == base, word
    for word in ("mode=sparse", "seed=1", "train.epochs=4", "optimizer.lr=1e-3", "data.path=x",
                 "evaluate.patience=3",
                 "revived=normal", "train.global_batch=8"):
        assert shipped("e2e", word).identity() != base, word
